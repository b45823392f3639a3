"""Codes of a few bits in 32-bit words: a dense little-endian bit stream, 32 codes in ``bits`` words."""

from __future__ import annotations

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor


def pack(codes: UInt8[Tensor, "n cols"], bits: int) -> Int32[Tensor, "words cols"]:
    """Return every column's codes as ceil(n * bits / 32) words, the first code in the lowest bits.

    Code i occupies the bits from i * bits on; where 32 is not a multiple of
    ``bits`` a code may begin in one word and end in the next.
    """
    n, cols = codes.shape
    runs = torch.nn.functional.pad(codes, (0, 0, 0, -n % 32)).view(-1, 32, cols)
    words = torch.zeros(len(runs), bits, cols, dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = runs[:, i].to(torch.int32)
        words[:, word] |= code << shift
        if shift + bits > 32:
            words[:, word + 1] |= code >> (32 - shift)
    return words.view(-1, cols)[: -(-n * bits // 32)]


def unpack(words: Int32[Tensor, "words cols"], bits: int, n: int) -> UInt8[Tensor, "n cols"]:
    """Return the first ``n`` codes of every column."""
    count, cols = words.shape
    runs = torch.nn.functional.pad(words, (0, 0, 0, -count % bits)).view(-1, bits, cols)
    codes = torch.empty(len(runs), 32, cols, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        code = runs[:, word] >> shift
        if shift + bits > 32:
            # >> copies the sign: clear what it brought before adding the rest
            code = (code & (2 ** (32 - shift) - 1)) | (runs[:, word + 1] << (32 - shift))
        codes[:, i] = (code & mask).to(torch.uint8)
    return codes.view(-1, cols)[:n]
