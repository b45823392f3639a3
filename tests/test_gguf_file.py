"""GGUF files are read as the gguf package reads them, and what is broken is refused."""

import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch

from llmquant import gguf_file
from llmquant.errors import CheckpointError

LIMIT = 8 << 20  # bytes that reading a broken file of a few kilobytes may take


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "sample.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "Ġb", "漢字", ""])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0, 0.0])
    writer.add_string("general.name", "sämple")
    for name, shape, dtype in (("norm.weight", (64,), np.float32), ("half.weight", (3, 64), np.float16)):
        writer.add_tensor(name, rng.normal(size=shape).astype(dtype))
    for type_ in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.TQ2_0, gguf.GGMLQuantizationType.BF16):
        raw = gguf.quants.quantize(rng.normal(size=(2, 5, 256)).astype(np.float32), type_)
        writer.add_tensor(f"{type_.name}.weight", raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_those_that_the_gguf_package_reads(sample):
    found, judge = gguf_file.read(sample), gguf.GGUFReader(sample)
    wanted = {key: field.contents() for key, field in judge.fields.items() if not key.startswith("GGUF.")}
    assert found.metadata == wanted
    assert list(found.tensors) == [t.name for t in judge.tensors]
    for tensor in judge.tensors:
        mine = found.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.type == tensor.tensor_type.name.lower()
        assert mine.read().numpy().tobytes() == tensor.data.tobytes()
        floats = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        assert torch.equal(gguf_file.to_float(mine), torch.from_numpy(floats.reshape(-1, mine.shape[-1]).copy()))
        if len(mine.shape) > 1:
            assert torch.equal(gguf_file.to_float(mine, (1, 3)), gguf_file.to_float(mine)[1:3])


def test_shards_are_read_as_one_file(sample, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for i in range(5):
        writer.add_tensor(f"t{i}", np.full((2, 32), i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shards = sorted(tmp_path.iterdir())
    assert len(shards) == 3
    found = gguf_file.read(shards[0])
    assert [float(gguf_file.to_float(t)[0, 0]) for t in found.tensors.values()] == [0, 1, 2, 3, 4]
    assert found.bytes == sum(p.stat().st_size for p in shards)
    with pytest.raises(CheckpointError, match=r"is shard 2 of 3\. Give the first"):
        gguf_file.read(shards[1])
    shards[2].unlink()
    with pytest.raises(CheckpointError, match="missing, although"):
        gguf_file.read(shards[0])


def header(version=3, tensors=1, pairs=0, body=b""):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, pairs) + body


def string(text):
    return struct.pack("<Q", len(text)) + text


def entry(name=b"t", shape=(32, 2), type_=0, offset=0):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, type_, offset)


def key(name, type_, value):
    return string(name) + struct.pack("<I", type_) + value


DATA = bytes(1024)
HOSTILE = {
    "empty": (b"", "cannot be read|is not"),
    "magic": (b"GGML" + bytes(100), "does not begin with GGUF"),
    "version": (header(version=9, body=DATA), "GGUF version 9"),
    "big-endian": (header(version=3 << 24, body=DATA), "big-endian"),
    "tensors": (header(tensors=2**40, body=DATA), "claims 1099511627776 tensors"),
    "keys": (header(pairs=2**63, body=DATA), "claims 9223372036854775808 keys"),
    "string": (header(pairs=1, body=struct.pack("<Q", 2**62) + DATA), "a key takes 4611686018427387904 bytes"),
    "array": (header(pairs=1, body=key(b"k", 9, struct.pack("<IQ", 4, 2**60)) + DATA), "k has 1152921504606846976 it"),
    "array of arrays": (header(pairs=1, body=key(b"k", 9, struct.pack("<IQ", 9, 1)) + DATA), "array of value type 9"),
    "value type": (header(pairs=1, body=key(b"k", 77, b"") + DATA), "value type 77"),
    "key twice": (header(pairs=2, body=2 * key(b"k", 0, b"\x01") + DATA), "the key k comes twice"),
    "key not text": (header(pairs=1, body=key(b"\xff", 0, b"\x01") + DATA), "a key is not UTF-8"),
    "alignment": (header(pairs=1, body=key(b"general.alignment", 0, b"\x07") + entry() + DATA), "not a power"),
    "no alignment": (header(pairs=1, body=key(b"general.alignment", 0, b"\0") + entry() + DATA), "not a power"),
    "dimensions": (header(body=entry(shape=(1,) * 5) + DATA), "5 dimensions"),
    "zero": (header(body=entry(shape=(32, 0)) + DATA), "it is empty"),
    "overflow": (header(body=entry(shape=(2**62, 2**62)) + DATA), "takes .* bytes, but the file has"),
    "type": (header(body=entry(type_=12345) + DATA), "tensor type 12345"),
    "columns": (header(body=entry(shape=(33, 2), type_=8) + DATA), "33 columns, not a multiple of the 32 of Q8_0"),
    "offset": (header(body=entry(offset=2**40) + DATA), "but the file has"),
    "unaligned": (header(body=entry(offset=4) + DATA), "offsets are multiples of 32"),
    "name twice": (header(tensors=2, body=entry() + entry(offset=256) + DATA), "the tensor t comes twice"),
    "overlap": (header(tensors=2, body=entry() + entry(name=b"u", offset=64) + DATA), "begins inside"),
    "cut": (header(body=entry()), "but the file has"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_refused_without_allocating_what_it_claims(case, tmp_path):
    content, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=message):
        gguf_file.read(path)
    assert tracemalloc.get_traced_memory()[1] < LIMIT
    tracemalloc.stop()


def test_every_truncation_is_refused(sample, tmp_path):
    content = sample.read_bytes()
    path = tmp_path / "cut.gguf"
    end = max(t.start + t.bytes for t in gguf_file.read(sample).tensors.values())
    for length in {*range(0, 1200, 7), *range(1200, end, 499), end - 1}:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=str(path)):
            gguf_file.read(path)


def test_random_damage_never_ends_in_another_error(sample, tmp_path):
    content, path = bytearray(sample.read_bytes()), tmp_path / "damaged.gguf"
    rng = random.Random(0)
    tracemalloc.start()
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(900)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            found = gguf_file.read(path)
        except CheckpointError:
            continue
        for tensor in found.tensors.values():
            tensor.read()
    assert tracemalloc.get_traced_memory()[1] < LIMIT
    tracemalloc.stop()
