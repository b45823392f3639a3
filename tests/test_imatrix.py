"""Imatrix files, built here byte by byte from the definition of their two forms, and broken in many ways."""

import random
import struct
import tracemalloc

import gguf
import pytest
import torch

from llmquant import imatrix
from llmquant.errors import CheckpointError
from llmquant.imatrix import Entry, Imatrix
from llmquant.stats import Accumulator

DENSE = ("blk.0.attn_q.weight", [[4.0, 0.0, 12.0]], [8])
EXPERTS = ("blk.0.ffn_up_exps.weight", [[2.0, 4.0], [0.0, 0.0]], [4, 0])
KEYS = (
    ("general.type", 8, "imatrix"),
    ("imatrix.datasets", 9, ["calibration.txt", "more.txt"]),
    ("imatrix.chunk_count", 4, 3),
    ("imatrix.chunk_size", 4, 512),
)


def text(value, code="Q"):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack(f"<{code}", len(data)) + data


def gguf_bytes(entries=(DENSE, EXPERTS), keys=KEYS, tensor_count=None, describe=None):
    """Return an imatrix in the GGUF form. ``describe`` may change (name, dimensions, type, offset) of a tensor."""
    tensors = []
    for name, sums, counts in entries:
        stacked = len(counts) > 1
        shape = [len(sums[0]), len(counts)] if stacked else [len(sums[0])]
        tensors.append((f"{name}.in_sum2", shape, [x for row in sums for x in row]))
        tensors.append((f"{name}.counts", [1, len(counts)] if stacked else [1], counts))
    head = b"GGUF" + struct.pack("<IQQ", 3, tensor_count or len(tensors), len(keys))
    for key, kind, value in keys:
        head += text(key) + struct.pack("<I", kind)
        if kind == 8:
            head += text(value)
        elif kind == 9:
            head += struct.pack("<IQ", 8, len(value)) + b"".join(map(text, value))
        else:
            head += struct.pack({4: "<I", 5: "<i", 6: "<f"}[kind], value)
    data = b""
    for name, shape, values in tensors:
        described = (name, shape, 0, len(data))
        name, shape, kind, offset = describe(*described) if describe else described
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
        data += struct.pack(f"<{len(values)}f", *values)
        data += bytes(-len(data) % 32)
    return head + bytes(-len(head) % 32) + data


def dat_bytes(
    entries=(("blk.0.attn_q.weight", 2, [1.0, 0.0, 3.0]), ("b", 1, [5.0])), tail=(2, "calibration.txt"), count=None
):
    """Return an imatrix in the older form: entries of a name, chunks, and mean x² times chunks."""
    out = struct.pack("<i", len(entries) if count is None else count)
    for name, chunks, values in entries:
        out += text(name, "i") + struct.pack(f"<ii{len(values)}f", chunks, len(values), *values)
    return out + (struct.pack("<i", tail[0]) + text(tail[1], "i") if tail else b"")


@pytest.fixture
def read(tmp_path):
    """Return a function that reads bytes as a file."""

    def read(data):
        path = tmp_path / "file.imatrix"
        path.write_bytes(data)
        return imatrix.read(path)

    return read


def same(a, b):
    assert a.entries.keys() == b.entries.keys()
    for name, entry in a.entries.items():
        assert torch.equal(entry.sums, b.entries[name].sums)
        assert torch.equal(entry.counts, b.entries[name].counts)
    return (a.datasets, a.chunk_count, a.chunk_size) == (b.datasets, b.chunk_count, b.chunk_size)


def test_the_gguf_form_is_read(read):
    found = read(gguf_bytes())
    assert found.datasets == ("calibration.txt", "more.txt")
    assert (found.chunk_count, found.chunk_size) == (3, 512)
    assert found.square_mean(DENSE[0], 3).tolist() == [[0.5, 0.0, 1.5]]
    assert found.entries[EXPERTS[0]].counts.tolist() == [4, 0]


def test_an_expert_that_saw_no_token_weighs_all_columns_the_same(read):
    assert read(gguf_bytes()).square_mean(EXPERTS[0], cols=2, matrices=2).tolist() == [[0.5, 1.0], [1.0, 1.0]]


def test_the_older_form_is_read_as_chunks_of_512_tokens(read):
    found = read(dat_bytes())
    assert found.square_mean("blk.0.attn_q.weight", 3).tolist() == [[0.5, 0.0, 1.5]]
    assert found.square_mean("b", 1).tolist() == [[5.0]]
    assert found.entries["blk.0.attn_q.weight"].counts.tolist() == [1024]
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("calibration.txt",), 2, 512)


def test_the_oldest_files_do_not_name_their_text(read):
    found = read(dat_bytes(tail=None))
    assert (found.datasets, found.chunk_count) == ((), 2)


def test_the_older_form_has_the_experts_of_a_matrix_in_one_row(read):
    found = read(dat_bytes([("blk.0.ffn_up_exps.weight", 2, [1.0, 2.0, 3.0, 4.0])]))
    assert found.square_mean("blk.0.ffn_up_exps.weight", cols=2, matrices=2).tolist() == [[0.5, 1.0], [1.5, 2.0]]


def test_written_bytes_are_those_of_the_definition(read, tmp_path):
    imatrix.write(tmp_path / "ours.gguf", read(gguf_bytes()))
    assert (tmp_path / "ours.gguf").read_bytes() == gguf_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.imatrix", "ours.gguf"]


def test_another_reader_finds_the_same_numbers(tmp_path):
    sums, counts = torch.rand(3, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([7, 0, 512])
    imatrix.write(tmp_path / "ours.gguf", Imatrix({"blk.0.ffn_up_exps.weight": Entry(sums, counts)}, ("a",), 1, 512))
    reader = gguf.GGUFReader(tmp_path / "ours.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert tensors["blk.0.ffn_up_exps.weight.in_sum2"].data.tolist() == sums.tolist()
    assert tensors["blk.0.ffn_up_exps.weight.counts"].data.tolist() == [[7.0], [0.0], [512.0]]
    assert reader.fields["imatrix.datasets"].contents() == ["a"]
    assert "general.architecture" not in reader.fields


def test_what_is_written_is_read_back(read, tmp_path):
    first = read(dat_bytes())
    imatrix.write(tmp_path / "a.gguf", first)
    assert same(imatrix.read(tmp_path / "a.gguf"), first)


def test_our_own_statistics_come_back_from_a_file(tmp_path):
    sums = Accumulator(16, "diagonal")
    sums.add(torch.randn(100, 16, generator=torch.Generator().manual_seed(0)))
    stats = sums.result()
    imatrix.write(tmp_path / "a.gguf", Imatrix({"blk.0.attn_q.weight": Entry.of(stats)}, ("a",), 1, 100))
    found = imatrix.read(tmp_path / "a.gguf").square_mean("blk.0.attn_q.weight", 16)
    torch.testing.assert_close(found[0], stats.square_mean)


def test_a_name_of_a_text_that_is_no_utf8_can_be_written_again(read, tmp_path):
    keys = [(key, kind, [b"\xff.txt"] if key == "imatrix.datasets" else value) for key, kind, value in KEYS]
    imatrix.write(tmp_path / "a.gguf", read(gguf_bytes(keys=keys)))
    assert imatrix.read(tmp_path / "a.gguf").datasets == ("\ufffd.txt",)


def test_an_imatrix_of_no_text_can_be_written(tmp_path):
    imatrix.write(tmp_path / "a.gguf", Imatrix({"a": Entry(torch.ones(1, 2), torch.tensor([1]))}, (), 1, 512))
    assert imatrix.read(tmp_path / "a.gguf").datasets == ("",)


def test_a_tensor_without_entry_has_no_importance(read):
    assert read(gguf_bytes()).square_mean("output.weight", 3) is None


@pytest.mark.parametrize(("cols", "matrices"), [(4, 1), (3, 2), (1, 1)])
def test_an_imatrix_of_another_model_is_refused(read, cols, matrices):
    with pytest.raises(CheckpointError, match=f"has 3 columns, but the model's has {matrices} x {cols}"):
        read(gguf_bytes()).square_mean(DENSE[0], cols, matrices)


@pytest.mark.parametrize("data", [gguf_bytes(), dat_bytes()], ids=["gguf", "dat"])
def test_a_file_that_was_cut_anywhere_is_refused(read, data):
    last_byte = data.rstrip(b"\0")  # what pads the end says nothing
    for length in range(len(last_byte)):
        if data[:length] != dat_bytes(tail=None):
            with pytest.raises(CheckpointError):
                read(data[:length])


@pytest.mark.parametrize("data", [gguf_bytes(), dat_bytes()], ids=["gguf", "dat"])
def test_a_file_with_changed_bytes_is_read_or_refused(read, data):
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        changed = bytearray(data)
        for _ in range(generator.randint(1, 3)):
            changed[generator.randrange(len(data))] = generator.choice([0, 1, 127, 128, 255, generator.randrange(256)])
        try:
            found = read(bytes(changed))
        except CheckpointError:
            refused += 1
        else:
            assert all(bool((e.sums >= 0).all()) and e.sums.isfinite().all() for e in found.entries.values())
    assert 50 < refused < 150


def without(key):
    return [k for k in KEYS if k[0] != key]


def described(suffix, **changes):
    """Return a function that changes the description of the tensors whose name ends like this."""

    def describe(name, shape, kind, offset):
        values = {"name": name, "shape": shape, "kind": kind, "offset": offset}
        return tuple((values | changes if name.endswith(suffix) else values).values())

    return describe


NAME = DENSE[0]
BROKEN = {
    "empty": (b"", "the number of entries takes 4 bytes, where 0 are left"),
    "another file": (b"Once upon a time. " * 9, "the name of entry 0 takes 1869640992 bytes"),
    "a model": (gguf_bytes(keys=[("general.type", 8, "model"), *KEYS[1:]]), "general.type is 'model'"),
    "no type": (gguf_bytes(keys=KEYS[1:]), "general.type is None"),
    "no texts": (gguf_bytes(keys=without("imatrix.datasets")), "imatrix.datasets is None"),
    "no chunks": (gguf_bytes(keys=without("imatrix.chunk_count")), "imatrix.chunk_count is None"),
    "chunks of a fraction": (
        gguf_bytes(keys=[*without("imatrix.chunk_size"), ("imatrix.chunk_size", 6, 0.5)]),
        "imatrix.chunk_size is 0.5",
    ),
    "fewer than no chunks": (
        gguf_bytes(keys=[*without("imatrix.chunk_count"), ("imatrix.chunk_count", 5, -1)]),
        "imatrix.chunk_count is -1",
    ),
    "no tensors": (gguf_bytes(entries=()), "it has no entries"),
    "absurdly many tensors": (gguf_bytes(tensor_count=2**62), "claims 4611686018427387904 tensors"),
    "an absurd shape": (gguf_bytes(describe=described("q.weight.in_sum2", shape=[2**40])), "takes 4398046511104 bytes"),
    "half precision": (gguf_bytes(describe=described("in_sum2", kind=1)), f"no tensor {NAME}.in_sum2 of type f32"),
    "sums without counts": (
        gguf_bytes(describe=described("q.weight.counts", name="x.counts")),
        f"no tensor {NAME}.counts of type f32",
    ),
    "counts without sums": (
        gguf_bytes(describe=described("q.weight.in_sum2", name="x.in_sum2")),
        f"no tensor {NAME}.in_sum2 of type f32",
    ),
    "another tensor": (gguf_bytes(describe=described("q.weight.in_sum2", name="x")), "no tensor .*in_sum2 of type f32"),
    "too many counts": (
        gguf_bytes([(NAME, [[1.0, 2.0, 3.0]], [1, 2])], describe=described("sum2", shape=[3])),
        "3 sums for 2",
    ),
    "negative sums": (gguf_bytes([(NAME, [[1.0, -1.0]], [1])]), f"'{NAME}' has sums of squares that are negative"),
    "sums that are no numbers": (gguf_bytes([(NAME, [[1.0, float("nan")]], [1])]), "negative or not finite"),
    "infinite sums": (gguf_bytes([(NAME, [[1.0, float("inf")]], [1])]), "negative or not finite"),
    "negative counts": (gguf_bytes([(NAME, [[1.0]], [-1.0])]), "counts that are negative or not finite"),
    "counts that are no numbers": (gguf_bytes([(NAME, [[1.0]], [float("nan")])]), "counts that are negative"),
    "infinite counts": (gguf_bytes([(NAME, [[1.0]], [float("inf")])]), "counts that are negative or not finite"),
    "no entries": (dat_bytes([]), "the number of entries is 0"),
    "fewer than no entries": (dat_bytes(count=-1), "the number of entries is -1"),
    "absurdly many entries": (dat_bytes(count=2**31 - 1), "takes 7676208560 bytes, where 9 are left"),
    "an absurd name": (struct.pack("<ii", 1, 2**31 - 1) + b"a", "the name of entry 0 takes 2147483647 bytes"),
    "a name shorter than nothing": (struct.pack("<ii", 1, -5) + bytes(64), "the length of the name of entry 0 is -5"),
    "absurdly many columns": (struct.pack("<ii1sii", 1, 1, b"a", 1, 2**31 - 1), "'a' takes 8589934588 bytes"),
    "no columns": (dat_bytes([("a", 1, [])]), "the number of columns of 'a' is 0"),
    "entries twice": (dat_bytes([("a", 1, [1.0])] * 2), "'a' occurs twice"),
    "fewer than no chunks of an entry": (dat_bytes([("a", -1, [1.0])]), "the number of chunks of 'a' is -1"),
    "fewer than no chunks in all": (dat_bytes(tail=(-1, "")), "the number of chunks is -1"),
    "negative means": (dat_bytes([("a", 1, [-1.0])]), "'a' has sums of squares that are negative"),
    "bytes behind the end": (dat_bytes() + b"\0", "1 bytes behind the end"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_with_its_fault_and_without_allocating_what_it_claims(case, read):
    data, message = BROKEN[case]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as error:
            read(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert "file.imatrix: is not " in str(error.value)


def test_a_missing_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        imatrix.read(tmp_path / "none")
