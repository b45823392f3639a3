"""Codes of a few bits, side by side in 32-bit words.

The bits of a row form one stream: code i takes the bits [i * bits, (i + 1) * bits),
the low bit first, and word k holds the bits [32 * k, 32 * (k + 1)). A word of 2-,
4- or 8-bit codes holds 32 / bits whole codes; 32 codes of 3 bits fill three words,
of which the codes 10 and 21 each straddle two. (On a little-endian machine, which
torch supposes, the bytes of the words are the same stream.)
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor
from torch.nn.functional import pad as pad_last


def pack(codes: UInt8[Tensor, "*rows n"], bits: int) -> Int32[Tensor, "*rows words"]:
    """Return ceil(n * bits / 32) words a row; unused bits are 0."""
    *rows, n = codes.shape
    lanes = (pad_last(codes, (0, -n % 32)) if n % 32 else codes).flatten()
    width = bits
    while width <= 4:  # two codes fit into one byte: merge the two bytes of every pair
        pairs = lanes.view(torch.int16)
        merged = pairs >> (8 - width)
        merged |= pairs
        lanes = merged.to(torch.uint8)
        width *= 2
    if width < 8:  # eight codes fill exactly `width` bytes
        eights = lanes.view(-1, 8)
        stream = eights.new_zeros(len(eights), width)
        for i in range(8):
            byte, shift = divmod(i * width, 8)
            stream[:, byte] |= eights[:, i] << shift
            if shift + width > 8:
                stream[:, byte + 1] |= eights[:, i] >> (8 - shift)
        lanes = stream.flatten()
    return lanes.view(torch.int32).view(*rows, -1)[..., : math.ceil(n * bits / 32)].contiguous()


def unpack(words: Int32[Tensor, "*rows words"], bits: int, n: int) -> UInt8[Tensor, "*rows n"]:
    """Return the first ``n`` codes of every row."""
    *rows, count = words.shape
    whole = pad_last(words, (0, -count % bits)) if count % bits else words
    stream = whole.flatten().view(torch.uint8).view(-1, bits)
    codes = stream.new_empty(len(stream), 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = stream[:, byte] >> shift
        if shift + bits > 8:
            code |= stream[:, byte + 1] << (8 - shift)
        codes[:, i] = code & (2**bits - 1)
    return codes.view(*rows, -1)[..., :n].contiguous()
