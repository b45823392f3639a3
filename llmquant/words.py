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
    needed = math.ceil(codes.shape[-1] * bits / 32)
    lanes = pad_last(codes, (0, -codes.shape[-1] % 32)) if codes.shape[-1] % 32 else codes.contiguous()
    while bits <= 4:  # two codes fit into one byte: merge the two bytes of every pair
        pairs = lanes.view(torch.int16)
        merged = pairs >> (8 - bits)
        merged |= pairs
        lanes = merged.to(torch.uint8)
        bits *= 2
    if bits < 8:  # eight codes fill exactly `bits` bytes
        eights = lanes.unflatten(-1, (-1, 8))
        stream = eights.new_zeros(*eights.shape[:-1], bits)
        for i in range(8):
            byte, shift = divmod(i * bits, 8)
            stream[..., byte] |= eights[..., i] << shift
            if shift + bits > 8:
                stream[..., byte + 1] |= eights[..., i] >> (8 - shift)
        lanes = stream.flatten(-2)
    return lanes.view(torch.int32)[..., :needed].contiguous()


def unpack(words: Int32[Tensor, "*rows words"], bits: int, n: int) -> UInt8[Tensor, "*rows n"]:
    """Return the first ``n`` codes of every row."""
    whole = pad_last(words, (0, -words.shape[-1] % bits)) if words.shape[-1] % bits else words.contiguous()
    stream = whole.view(torch.uint8).unflatten(-1, (-1, bits))
    codes = stream.new_empty(*stream.shape[:-1], 8)
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = stream[..., byte] >> shift
        if shift + bits > 8:
            code |= stream[..., byte + 1] << (8 - shift)
        codes[..., i] = code & (2**bits - 1)
    return codes.flatten(-2)[..., :n].contiguous()
