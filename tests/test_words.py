import pytest
import torch

from llmquant import words

widths = pytest.mark.parametrize("width", range(1, 9))
lengths = pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 64, 100, 256])


def codes_of(rows, n, width):
    generator = torch.Generator().manual_seed(100 * n + width)
    return torch.randint(2**width, (rows, n), dtype=torch.uint8, generator=generator)


@widths
@lengths
def test_the_words_of_a_row_are_one_little_endian_integer(n, width):
    codes = codes_of(3, n, width)
    packed = words.pack(codes, width)
    count = -(-n * width // 32)
    assert packed.dtype == torch.int32
    assert packed.shape == (3, count)
    for row in range(3):
        stream = sum(code << (i * width) for i, code in enumerate(codes[row].tolist()))
        raw = b"".join(word.to_bytes(4, "little", signed=True) for word in packed[row].tolist())
        assert int.from_bytes(raw, "little") == stream


@widths
@lengths
def test_unpacking_gives_the_codes_back(n, width):
    codes = codes_of(3, n, width)
    assert torch.equal(words.unpack(words.pack(codes, width), width, n), codes)


@widths
def test_the_largest_code_does_not_spill_into_its_neighbours(width):
    alone = torch.eye(64, dtype=torch.uint8) * (2**width - 1)
    assert torch.equal(words.unpack(words.pack(alone, width), width, 64), alone)


@widths
@pytest.mark.parametrize("shape", [(40,), (2, 3, 64), (1, 2, 2, 33)], ids=str)
def test_any_number_of_leading_dimensions_may_stand_before_the_row(shape, width):
    codes = codes_of(1, torch.Size(shape).numel(), width).view(shape)
    packed = words.pack(codes, width)
    assert torch.equal(packed.reshape(-1, packed.shape[-1]), words.pack(codes.reshape(-1, shape[-1]), width))
    assert torch.equal(words.unpack(packed, width, shape[-1]), codes)


@widths
@pytest.mark.parametrize("n", [64, 45])
def test_strided_codes_are_packed_as_they_read_and_are_not_changed(n, width):
    codes = codes_of(n, 6, width)
    before = codes.clone()
    packed = words.pack(codes.T, width)
    assert torch.equal(packed, words.pack(codes.T.contiguous(), width))
    assert torch.equal(words.unpack(packed, width, n), before.T)
    contiguous = before.T.contiguous()
    words.pack(contiguous, width)
    assert torch.equal(codes, before)
    assert torch.equal(contiguous, before.T)
