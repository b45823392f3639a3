"""Does any input, however broken, end in a traceback, a hang, much memory or a file where none belongs?

    python eval/fuzz.py --inputs 1000 --out eval/results/fuzz.md

Sound files of every kind that llmquant reads (float and packed models, GGUF and imatrix files, recipes,
tokenizers, texts, sensitivities, work folders) are mutated, and given to the command line in a process of its own:
a fork of one that has imported everything. It must end within ten seconds of processor time, with exit code 0 or
2, without a traceback, below a gigabyte of memory, and may write into the output folder alone. An input is its kind,
its number and the seed: ``--only safetensors:17`` runs that one again and shows what it printed.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

import torch
import transformers
import yaml
from checkout import commit
from forked import begin, run_here

from llmquant import api, demo, gguf_file
from llmquant.report import markdown

SECONDS = 10  # of processor time: others may use the machine, too
WAIT = 60  # seconds on the clock, for what hangs without computing
MEMORY = 10**9  # bytes, at the peak; the interpreter and its libraries count
ADDRESSES = 2 * 10**9  # bytes that a run may reserve above what the libraries take
HOSTILE = [
    None, True, False, 0, -1, 1, 3, 7, 2**31, 2**32 + 1, 2**63, 10**30, 1e308, -0.5, 1e-320, math.nan, math.inf,
    "", "0", "float16", "../../elsewhere/canary", "/etc/passwd", "\0", "\ud800", "a" * 100_000, "[red]{}", "re:(a+)+$",
    "re:[", [], {}, [[]], {"": {}}, [0] * 1000, ["../x"], {"name": "../../elsewhere/x"},
]  # fmt: skip
WORDS = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
QUICK = ["--set", "grid.group_size=32", "--no-eval"]

Mutation = Callable[[Path, random.Random], list[str]]
"""Breaks something in a folder of sound files, and returns the command line that reads it."""


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every part of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


def changed(value: Any, rng: random.Random, depth: int = 4) -> Any:
    """Return a JSON value with one part replaced, removed, renamed or added; deep parts of long lists count less."""
    paths = [path for path in nodes(value) if len(path) <= depth]
    path = rng.choice([p for p in paths if len(p) <= 2] if rng.random() < 0.6 else paths)
    if not path:
        return rng.choice(HOSTILE) if rng.random() < 0.1 else changed(value, rng, depth)
    value = json.loads(json.dumps(value))
    node = value
    for step in path[:-1]:
        node = node[step]
    match rng.randrange(8):
        case 0:
            del node[path[-1]]
        case 1 if isinstance(node, dict):
            node[rng.choice(["", "name", "x", "auto_map", "path", str(path[-1]).upper()])] = node.pop(path[-1])
        case 2 if isinstance(node[path[-1]], int | float) and not isinstance(node[path[-1]], bool):
            node[path[-1]] = rng.choice([node[path[-1]] * k for k in (-1, 0, 2, 1000, 10**9)])
        case 3:
            node[path[-1]] = [node[path[-1]]]
        case 4:
            node[path[-1]] = str(node[path[-1]])
        case _:
            node[path[-1]] = rng.choice(HOSTILE)
    return value


def as_json(value: Any, rng: random.Random) -> bytes:
    """Return a JSON text, sometimes one that no serializer writes."""
    text = json.dumps(value)
    match rng.randrange(12):
        case 0:
            text = text[: rng.randrange(len(text) + 1)]
        case 1:
            text = text.replace(":", ":" + "[" * 100_000, 1)
        case 2 if text.startswith('{"'):  # a key twice
            text = text[:-1] + "," + text[1:]
        case 3:
            text = re.sub(r"\d+", lambda m: m[0] + "0" * 5000, text, count=1)
        case 4:
            return bytes(garbled(text.encode("utf-8", "surrogatepass"), rng))
        case _:
            pass
    return text.encode("utf-8", "surrogatepass")


def garbled(raw: bytes, rng: random.Random, within: int = 0) -> bytes:
    """Return bytes of which some are changed, cut, doubled or left out; ``within``: among the first so many."""
    data = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        end = min(within or len(data), len(data))
        at = rng.randrange(max(end, 1))
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ (1 << rng.randrange(8))]) if data else b""
            case 2:
                size = rng.choice([4, 8])
                data[at : at + size] = struct.pack("<Q", rng.choice(WORDS))[:size]
            case 3:
                del data[at : at + rng.randrange(1, 64)]
            case 4:
                data[at:at] = data[at : at + rng.randrange(1, 64)]
            case 5 if rng.random() < 0.3:
                del data[at:]
            case _:
                data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\xc0\x7f", b"\0\0\0\0", b"\0\x7c\0\x7c"])
    return bytes(data)


def edit(path: Path, rng: random.Random, depth: int = 4) -> None:
    """Change a JSON file."""
    path.write_bytes(as_json(changed(json.loads(path.read_text("utf-8")), rng, depth), rng))


def edit_safetensors(path: Path, rng: random.Random) -> None:
    """Change a safetensors file: its header's length, the header or what follows it."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    begin, end = entry["data_offsets"]
    match rng.randrange(12):
        case 0:
            path.write_bytes(struct.pack("<Q", rng.choice([*WORDS, length - 1, length + 1, len(raw)])) + raw[8:])
            return
        case 1:
            path.write_bytes(raw[: rng.randrange(len(raw))])
            return
        case 2:
            path.write_bytes(garbled(raw, rng, 8 + length))
            return
        case 3:
            entry["shape"] = rng.choice(
                [[2**62, 4], [2**32, 2**32], [-1, 4], [0, 4], [], [10**30], [1] * 1000, "4", None]
            )
        case 4:
            entry["data_offsets"] = rng.choice([[0, 2**63], [end, begin], [-1, 4], [begin + 1, end + 1], [0], "x"])
        case 5:
            entry["data_offsets"] = header[rng.choice(names)]["data_offsets"]
        case 6:
            entry["dtype"] = rng.choice(
                ["F64", "F16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "X", 3, None, "I64", "C64"]
            )
        case 7:  # as many bytes, another shape or dtype
            entry["shape"] = entry["shape"][::-1] if rng.random() < 0.5 else [math.prod(entry["shape"])]
            entry["dtype"] = rng.choice([entry["dtype"], "F16", "I16", "BF16"])
        case 8:
            name = rng.choice(
                ["../../elsewhere/canary", "", "model.layers.999999999.x", "model.layers.x.y", "a" * 9999]
            )
            header[name] = header.pop(rng.choice(names))
        case 9 | 10:
            at = rng.randrange(begin, max(end - 8, begin + 1))
            body = body[:at] + rng.choice([b"\xff" * 8, b"\x80\x7f" * 4, b"\x7f\x7f" * 4]) + body[at + 8 :]
        case _:
            header = changed(header, rng)
    text = as_json(header, rng) if rng.random() < 0.3 else json.dumps(header).encode("utf-8", "surrogatepass")
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def packed_value(value: Any) -> tuple[int, bytes]:
    """Return the GGUF type of a value, and its bytes."""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return (4, struct.pack("<I", value)) if 0 <= value < 2**32 else (11, struct.pack("<q", max(value, -(2**63))))
    if isinstance(value, float):
        return 6, struct.pack("<f", value) if abs(value) < 3e38 or not math.isfinite(value) else struct.pack("<f", 3e38)
    if isinstance(value, list):
        items = [packed_value(item) for item in value] or [(4, b"")]
        kinds = {kind for kind, _ in items}
        if len(kinds) == 1 and kinds != {9}:
            raw = b"".join(piece for _, piece in items)
            return 9, struct.pack("<IQ", kinds.pop(), len(value)) + raw
        value = json.dumps(value)
    text = str(value).encode("utf-8", "surrogatepass")
    return 8, struct.pack("<Q", len(text)) + text


def edit_gguf(path: Path, rng: random.Random) -> None:
    """Change a GGUF file: its bytes, or a value of its metadata."""
    raw, found = path.read_bytes(), gguf_file.read(path)
    start = min(tensor.start for tensor in found.tensors.values())
    if rng.random() < 0.5:
        path.write_bytes(garbled(raw, rng, rng.choice([24, 400, start, start, len(raw)])))
        return
    metadata: dict[str, Any] = dict(found.metadata)
    key = rng.choice(list(metadata))
    match rng.randrange(5):
        case 0:
            del metadata[key]
        case 1 if isinstance(metadata[key], list):
            metadata[key] = metadata[key][: rng.randrange(3)] * rng.choice([1, 1, 1000])
        case 2 if isinstance(metadata[key], int | float):
            metadata[key] = type(metadata[key])(rng.choice([0, 1, 3, 2**31 - 1, 2**31]))
        case _:
            value = rng.choice(HOSTILE)
            metadata[key] = value if isinstance(value, str | bool | int | float | list) else "x"
            metadata[key] = 2**40 if metadata[key] == 10**30 or metadata[key] == 2**63 else metadata[key]
    out = b"GGUF" + struct.pack("<IQQ", 3, len(found.tensors), len(metadata))
    for key, value in metadata.items():
        kind, piece = packed_value(value)
        out += struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + piece
    old = raw[24:start]
    names = list(found.tensors)
    table = old.index(struct.pack("<Q", len(names[0])) + names[0].encode())
    out += old[table:].rstrip(b"\0") + bytes(8)  # the last offset may end in zeros
    out = out[: len(out) - (len(out) - _table_end(found, out, names))]
    path.write_bytes(out + bytes(-len(out) % 32) + raw[start:])


def _table_end(found: gguf_file.GgufFile, out: bytes, names: list[str]) -> int:
    last = names[-1]
    at = out.rindex(struct.pack("<Q", len(last)) + last.encode())
    return at + 8 + len(last) + 4 + 8 * len(found.tensors[last].shape) + 4 + 8


RECIPES = [
    "name: &a [x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
    "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
    "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\nf: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e]\n"
    "g: &g [*f, *f, *f, *f, *f, *f, *f, *f, *f]\ngrid: {name: *g}\n",
    "name: !!python/object/apply:os.system ['touch ../elsewhere/canary']\n",
    "grid: !!python/name:os.system\n",
    "&a grid: {name: affine, group_size: 32}\nrules: &r [*r]\n",
    "grid: {name: affine, bits: 4, group_size: 32}\nname: ../../elsewhere/canary\n",
    "grid: {name: affine, bits: 4, group_size: 32}\nrules: [{match: 're:(.*.*.*.*.*.*.*.*)*!', keep: true}]\n",
    "grid: {name: affine, bits: 4, group_size: 32}\nignore: ['re:(([a-z._0-9]+)+)+!']\n",
    "mixture: {name: q4_0, overrides: {'(([a-z._0-9]+)+)+!': q8_0}}\nformats: [gguf]\n",
    "grid: {name: affine, bits: 4, group_size: 32}\nformats: [os, ../gptq]\n",
    "grid: {name: affine, bits: " + "9" * 5000 + "}\n",
    "grid: {name: affine, bits: 2020-99-99, group_size: 1:60:60}\n",
    "grid: " + "[" * 5000 + "\n",
    "? {a: b}\n: c\n",
    "grid: {name: affine, group_size: 32}\nmax_shard_size: 1\n",
    "grid: {name: affine, group_size: 32}\ncalibration: {path: /dev/zero}\nalgorithm: {name: gptq}\n",
    "grid: {name: affine, group_size: 32}\nimatrix: /dev/zero\n",
]
SOUND = {
    "name": "sound", "algorithm": {"name": "gptq", "dampening_frac": 0.01, "block_size": 64},
    "grid": {"name": "affine", "bits": 4, "group_size": 32, "symmetric": True, "observer": "mse"},
    "rules": [{"match": "*.down_proj", "grid": {"bits": 8}}, {"match": ["re:.*up_proj"], "keep": True}],
    "transforms": [{"name": "awq", "clip": False}], "ignore": ["lm_head"], "true_sequential": True,
    "calibration": {"path": "text.txt", "sequences": 4, "length": 32, "seed": 1, "packing": "concat"},
    "formats": ["compressed_tensors"], "max_shard_size": "100kB", "fallback": "error", "tied_embeddings": "keep",
}  # fmt: skip


def floats(folder: Path, rng: random.Random) -> list[str]:
    edit_safetensors(folder / "model" / "model.safetensors", rng)
    return rng.choice([RTN, RTN, GGUF, GPTQ, ["inspect", "model"], ["plan", "model", "nf4"]])


def index(folder: Path, rng: random.Random) -> list[str]:
    shutil.rmtree(folder / "model")
    (folder / "sharded").rename(folder / "model")
    path = folder / "model" / "model.safetensors.index.json"
    shards = sorted(p.name for p in path.parent.glob("*.safetensors"))
    value = json.loads(path.read_text())
    names = list(value["weight_map"])
    match rng.randrange(6):
        case 0:
            bad = [
                "../elsewhere/model.safetensors",
                "/etc/passwd",
                "..",
                "",
                "x",
                "\0.safetensors",
                "a" * 5000,
                ".safetensors",
            ]
            value["weight_map"][rng.choice(names)] = rng.choice(bad)
        case 1:
            (path.parent / rng.choice(shards)).unlink()
        case 2:
            value["weight_map"] = dict.fromkeys(names, shards[0])
        case 3:
            edit_safetensors(path.parent / rng.choice(shards), rng)
        case 4:
            shard = path.parent / rng.choice(shards)
            shard.unlink()
            shard.symlink_to(rng.choice(["/dev/zero", ".", "nowhere", shard.name]))
        case _:
            value = changed(value, rng)
    path.write_bytes(as_json(value, rng))
    return rng.choice([RTN, ["inspect", "model"]])


def config(folder: Path, rng: random.Random) -> list[str]:
    path = folder / "model" / "config.json"
    if rng.random() < 0.3:
        value = json.loads(path.read_text())
        key, extra = rng.choice(
            [
                ("auto_map", {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}),
                ("model_type", rng.choice(["gpt2", "opt", "evil", "mixtral", "", "gemma3_text", 7])),
                ("architectures", rng.choice([["GPT2LMHeadModel"], [], [None], "x", [["a"]], {"a": 1}, ["Evil"] * 9])),
                ("num_hidden_layers", rng.choice([0, 1, 3, -1, 10**9, 2.5, "2"])),
                ("return_dict", False),
                (
                    "rope_parameters",
                    rng.choice([None, {}, {"rope_type": "yarn"}, {"rope_theta": 0}, [1], {"factor": 9}]),
                ),
                ("quantization_config", rng.choice([{}, {"quant_method": "gptq"}, {"quant_method": []}, [], 3])),
                ("layer_types", rng.choice([["x"], ["full_attention"] * 9, "x"])),
                ("_attn_implementation", rng.choice(["flash_attention_2", "evil/kernel", 3])),
                ("dtype", rng.choice(["int8", "x", 3, {}])),
                ("configuration_files", ["../elsewhere/config.4.0.0.json"]),
            ]
        )
        path.write_text(json.dumps({**value, key: extra}))
        (path.parent / "evil.py").write_text("open('../elsewhere/canary', 'w')\n")
    else:
        edit(path, rng)
    return rng.choice([GPTQ, GPTQ, RTN, GGUF, GGUF, EVAL, ["plan", *GPTQ[1:3], *GPTQ[6:]]])


def tokenizer(folder: Path, rng: random.Random) -> list[str]:
    path = folder / "model" / rng.choice(["tokenizer.json", "tokenizer_config.json"])
    if path.name == "tokenizer_config.json" and rng.random() < 0.6:
        value = json.loads(path.read_text())
        key, extra = rng.choice(
            [
                ("auto_map", {"AutoTokenizer": ["evil.T", "evil.T"]}),
                (
                    "tokenizer_class",
                    rng.choice(["LlamaTokenizer", "Evil", "GPT2Tokenizer", 3, "PreTrainedTokenizerFast"]),
                ),
                ("vocab_file", "../elsewhere/canary"),
                ("tokenizer_file", "/etc/passwd"),
                ("fast_tokenizer_files", ["../../elsewhere/tokenizer.4.0.0.json"]),
                ("chat_template", rng.choice(["{% for i in x %}", "{{ ''.__class__.__mro__ }}", 3, {"a": "b"}])),
                ("bos_token", rng.choice([None, 3, {"content": "x"}, ["a"], "zzz"])),
                ("added_tokens_decoder", rng.choice([{"x": {}}, {"999999": {"content": "q"}}, [], {"0": "a"}])),
                ("init_inputs", ["../elsewhere/canary"]),
                ("extra_special_tokens", rng.choice([["a"], {"a": "b"}, 3])),
                ("model_max_length", rng.choice([-1, 10**30, "x"])),
            ]
        )
        path.write_text(json.dumps({**value, key: extra}))
        (path.parent / "evil.py").write_text("open('../elsewhere/canary', 'w')\n")
    else:
        edit(path, rng, depth=5)
    return rng.choice([GPTQ, GGUF, EVAL])


def recipes(folder: Path, rng: random.Random) -> list[str]:
    path = folder / "r.yaml"
    match rng.randrange(4):
        case 0:
            path.write_text(rng.choice(RECIPES))
        case 1:
            path.write_bytes(garbled(yaml.safe_dump(SOUND).encode(), rng))
        case _:
            value = changed(SOUND, rng, depth=6)
            try:
                path.write_text(yaml.safe_dump(value), "utf-8")
            except (yaml.YAMLError, UnicodeError):
                path.write_text(json.dumps(value))
    if rng.random() < 0.2:
        key = rng.choice(
            ["grid.bits", "rules.0.match", "name", "x.y.z", "rules.99.x", "calibration", "formats", "..", "", "grid"]
        )
        value = rng.choice(["9" * 5000, "&a [*a]", "!!python/name:os.system", "[", "{", "", "~", "2020-99-99", "../x"])
        return ["plan", "model", "rtn-w4g128", "--set", f"{key}={value}"]
    return rng.choice(
        [
            ["quantize", "model", "r.yaml", "--out", "out", "--no-eval"],
            ["plan", "model", "r.yaml"],
            ["compare", "model", "r.yaml", "--out", "out", "--text", "test.txt", "--max-tokens", "256"],
        ]
    )


def packed(folder: Path, rng: random.Random) -> list[str]:
    name = rng.choice(PACKED)
    path = folder / name
    if rng.random() < 0.5:
        edit_safetensors(path / "model.safetensors", rng)
    else:
        value = json.loads((path / "config.json").read_text())
        value["quantization_config"] = changed(value["quantization_config"], rng, depth=6)
        if rng.random() < 0.1:
            value["quantization_config"]["dynamic"] = {"+:(([a-z._0-9]+)+)+!": {"bits": 8}}
        (path / "config.json").write_bytes(as_json(value, rng))
    return rng.choice([["inspect", name], ["eval", name, *EVAL[2:]], ["eval", name, *EVAL[2:]]])


def ggufs(folder: Path, rng: random.Random) -> list[str]:
    edit_gguf(folder / "m.gguf", rng)
    return rng.choice([["inspect", "m.gguf"], ["eval", "m.gguf", *EVAL[2:]], ["eval", "m.gguf", *EVAL[2:]]])


def imatrices(folder: Path, rng: random.Random) -> list[str]:
    path = folder / rng.choice(["imatrix.gguf", "imatrix.dat"])
    if path.suffix == ".gguf" and rng.random() < 0.7:
        edit_gguf(path, rng)
    else:
        path.write_bytes(garbled(path.read_bytes(), rng, rng.choice([0, 64])))
    return [*GGUF, "--set", f"imatrix={path.name}"]


def texts(folder: Path, rng: random.Random) -> list[str]:
    path = folder / rng.choice(["text.txt", "text.jsonl", "text.json", "text.txt.gz", "text.parquet"])
    rows = "".join(json.dumps({"text": line}) + "\n" for line in (folder / "text.txt").read_text().splitlines())
    sound = {".jsonl": rows.encode(), ".json": b"[" + rows.replace("\n", ",").rstrip(",").encode() + b"]"}
    raw = sound.get(path.suffix, (folder / "text.txt").read_bytes())
    if path.suffix == ".gz":
        import gzip

        raw = gzip.compress(raw, mtime=0)
    path.write_bytes(garbled(raw, rng, rng.choice([0, 0, 200])))
    extra = ["--set", f"calibration.path={path.name}", "--set", f"calibration.field={rng.choice(['text', 'x', ''])}"]
    return [*GPTQ, *extra]


def sensitivities(folder: Path, rng: random.Random) -> list[str]:
    path = folder / "sensitivity" / "sensitivity.json"
    edit(path, rng)
    fill = [
        "plan",
        "model",
        "rtn-w4g128",
        "--set",
        "grid.group_size=32",
        "--budget",
        "9bpw",
        "--sensitivity",
        str(path),
    ]
    again = [
        "sensitivity",
        "model",
        "rtn-w4g128",
        "--set",
        "grid.group_size=32",
        "--grids",
        "4,8",
        "--text",
        "test.txt",
    ]
    return rng.choice([[*fill, "--out", "out.yaml"], [*again, "--max-tokens", "256", "--out", "sensitivity"]])


def works(folder: Path, rng: random.Random) -> list[str]:
    path = rng.choice(sorted(p for p in (folder / "work").iterdir() if p.name != "lock"))
    if path.suffix == ".json":
        edit(path, rng)
    elif rng.random() < 0.7:
        edit_safetensors(path, rng)
    else:
        path.write_bytes(garbled(path.read_bytes(), rng))
    return rng.choice([["export", "work", "--format", "compressed_tensors", "--out", "out"], [*GPTQ, "--work", "work"]])


CALIBRATED = ["calibration.path=text.txt", "calibration.sequences=4", "calibration.length=32"]
RTN = ["quantize", "model", "rtn-w4g128", "--out", "out", *QUICK]
GPTQ = ["quantize", "model", "gptq-plain-w4g128", "--out", "out", "--no-eval"]
GPTQ += [x for change in ["grid.group_size=32", *CALIBRATED] for x in ("--set", change)]
GGUF = ["quantize", "model", "gguf-q4_0", "--out", "out", "--no-eval"]
EVAL = ["eval", "model", "--text", "test.txt", "--max-tokens", "256", "--protocol", "sliding"]
PACKED = ["gptq", "awq", "compressed_tensors", "w8a8-static", "nf4"]
KINDS: dict[str, Mutation] = {
    "safetensors": floats,
    "index": index,
    "config": config,
    "tokenizer": tokenizer,
    "recipe": recipes,
    "packed": packed,
    "gguf": ggufs,
    "imatrix": imatrices,
    "text": texts,
    "sensitivity": sensitivities,
    "work": works,
}
MAY_WRITE = {"sensitivity": "sensitivity", "work": "work"}


def sound_files(folder: Path) -> None:
    """Write one sound input of every kind, small."""
    source = transformers.AutoTokenizer.from_pretrained(demo.MODEL)
    shape = transformers.LlamaConfig(
        vocab_size=len(source), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(folder / "model")
    model.save_pretrained(folder / "sharded", max_shard_size="300kB")
    text = demo.text.text("evaluation")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        for to in ("model", "sharded"):
            shutil.copyfile(demo.MODEL / name, folder / to / name)
    (folder / "text.txt").write_text(text[:20_000], "utf-8")
    (folder / "test.txt").write_text(text[20_000:30_000], "utf-8")
    groups = [*CALIBRATED, "grid.group_size=32"]
    before = Path.cwd()
    os.chdir(folder)  # the work folder keeps the text's path as it is given
    made = {
        "gptq": ("gptq-plain-w4g128", [*groups, "formats=[gptq]"]),
        "awq": ("rtn-w4g128", ["grid.group_size=32", "grid.symmetric=false", "formats=[awq]"]),
        "compressed_tensors": ("rtn-w4g128", ["grid.group_size=32"]),
        "w8a8-static": ("w8a8-static", CALIBRATED),
        "nf4": ("nf4", []),
        "gguf": ("gguf-q4_0", []),
    }
    for name, (recipe_, changes) in made.items():
        work = folder / "work" if name == "gptq" else None
        api.quantize(folder / "model", recipe_, folder / name, changes=changes, work=work, evaluate=False)
        (folder / name / "llmquant-report.json").unlink()
    (made_file,) = (folder / "gguf").glob("*.gguf")
    made_file.rename(folder / "m.gguf")
    shutil.rmtree(folder / "gguf")
    api.imatrix(folder / "model", folder / "text.txt", folder / "imatrix.gguf", sequences=4, length=32)
    entries = [b"blk.0.attn_q.weight", b"blk.0.ffn_down.weight"]
    older = struct.pack("<i", 2)
    for name, cols in zip(entries, (64, 128), strict=True):
        older += (
            struct.pack("<i", len(name)) + name + struct.pack("<ii", 2, cols) + struct.pack(f"<{cols}f", *[1.0] * cols)
        )
    (folder / "imatrix.dat").write_bytes(older + struct.pack("<ii", 2, 4) + b"text")
    api.sensitivity(
        folder / "model", "rtn-w4g128", folder / "sensitivity", text=folder / "test.txt", grids="4,8", max_tokens=256,
        changes=["grid.group_size=32"],
    )  # fmt: skip
    os.chdir(before)
    outside = folder / "elsewhere"
    outside.mkdir()
    (outside / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes())


@dataclass(frozen=True)
class Outcome:
    """What one input led to. problem: empty where all is well."""

    kind: str
    number: int
    code: int
    seconds: float
    peak_bytes: int
    problem: str
    output: str


def mutate(kind: str, number: int, seed: int, folder: Path) -> list[str]:
    """Break a folder of sound files; return the command line that reads it, to be run there."""
    return KINDS[kind](folder, random.Random(f"{kind} {number} {seed}"))


def judge(kind: str, code: int, output: str, before: set[str], after: set[str]) -> str:
    """Return what is wrong with an outcome, or nothing.

    before, after: the files of the folder.
    """
    if "Traceback" in output or "No such option" in output or code not in (0, 2):
        return f"exit code {code}: {(output.strip().splitlines() or ['no output'])[-1][:200]}"
    allowed = ("out", *([MAY_WRITE[kind]] if kind in MAY_WRITE else []))
    strays = sorted(path for path in after - before if not path.startswith(allowed) or ".partial" in path)
    if strays:
        return f"writes {strays[0]}"
    if code == 2 and not output.strip():
        return "no message"
    return ""


def tree(folder: Path) -> set[str]:
    """Return the paths of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "output"}


_SOUND: Path | None = None


def prepare(sound: Path) -> None:
    """Load, in this process, whatever a run could load, so that every fork begins with it."""
    global _SOUND
    _SOUND = sound
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "warm"
        shutil.copytree(sound, folder)
        for command in (
            GPTQ,
            GGUF,
            EVAL,
            ["inspect", "m.gguf"],
            ["eval", "m.gguf", *EVAL[2:]],
            ["eval", "nf4", *EVAL[2:]],
        ):
            shutil.rmtree(folder / "out", ignore_errors=True)
            os.chdir(folder)
            run_here(command, os.devnull)
        os.chdir("/")
    gc.collect()
    gc.freeze()


def one(kind: str, number: int, seed: int) -> Outcome:
    """Run one mutated input in a fork of this process."""
    assert _SOUND is not None
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "root"
        shutil.copytree(_SOUND, folder)
        for path in (folder / "work" / "work.json", folder / "sensitivity" / "sensitivity.json"):
            path.write_text(path.read_text("utf-8").replace(str(_SOUND), str(folder)), "utf-8")
        command = mutate(kind, number, seed, folder)
        before, beyond = tree(folder), tree(Path(scratch))
        started = time.monotonic()

        def confine() -> None:
            reserved = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (reserved + ADDRESSES, reserved + ADDRESSES))
            sys.addaudithook(only_inside(folder))

        pid = begin(command, folder, confine)
        while True:
            done, status, usage = os.wait4(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() - started > WAIT:
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
                break
            time.sleep(0.005)
        seconds = usage.ru_utime + usage.ru_stime
        output = (folder / "output").read_text("utf-8", errors="replace")
        code, peak = os.waitstatus_to_exitcode(status), 1024 * usage.ru_maxrss
        hangs = not done or seconds > SECONDS
        problem = f"hangs: {seconds:.1f} s computed" if hangs else judge(kind, code, output, before, tree(folder))
        if not problem and peak > MEMORY:
            problem = f"takes {peak / 1e6:.0f} MB"
        if not problem and any(not path.startswith("root") for path in tree(Path(scratch)) - beyond):
            problem = "writes beside the folder"
    return Outcome(kind, number, code, seconds, peak, problem, " ".join(command) + "\n" + output)


def only_inside(folder: Path) -> Callable[[str, tuple[Any, ...]], None]:
    """Return an audit hook that names every file that is opened for writing outside of a folder."""
    allowed = (str(folder), "/dev/null", "/proc/self/", tempfile.gettempdir() + "/tmp")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        # datasets locks its cache before it reads a parquet file
        if (
            event == "open"
            and "/huggingface/datasets/" not in str(arguments[0])
            and isinstance(arguments[0], str | bytes)
            and isinstance(arguments[2], int)
        ):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and not path.startswith(allowed):
                os.write(2, f"Traceback: opened for writing: {path}\n".encode())
        if event in ("os.system", "subprocess.Popen", "os.exec", "socket.connect"):
            os.write(2, f"Traceback: {event} {arguments}\n".encode())

    return hook


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000, help="in all, spread evenly over the kinds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--only", help="KIND:NUMBER, and show what it printed")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sound = Path(scratch) / "sound"
        sound.mkdir()
        sound_files(sound)
        if args.only:
            prepare(sound)
            kind, number = args.only.split(":")
            print(outcome := one(kind, int(number), args.seed))
            print(outcome.output)
            return
        count = -(-args.inputs // len(args.kinds))
        inputs = [(kind, number) for number in range(count) for kind in args.kinds]
        outcomes = []
        with ProcessPoolExecutor(args.jobs, initializer=prepare, initargs=(sound,)) as pool:
            for outcome in pool.map(one, *zip(*inputs, strict=True), [args.seed] * len(inputs)):
                outcomes.append(outcome)
                if outcome.problem:
                    print(f"{outcome.kind}:{outcome.number}: {outcome.problem}", flush=True)
    table = report(outcomes, args.seed)
    print(table)
    if args.out:
        args.out.write_text(table, "utf-8")


def report(outcomes: list[Outcome], seed: int) -> str:
    """Return the Markdown table of all kinds."""
    rows = []
    for kind in [*dict.fromkeys(outcome.kind for outcome in outcomes), "all"]:
        of = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        codes = [sum(o.code == code and not o.problem for o in of) for code in (2, 0)]
        figures = [len(of), *codes, sum(bool(o.problem) for o in of)]
        slowest, peak = max(o.seconds for o in of), max(o.peak_bytes for o in of)
        rows.append([kind, *map(str, figures), f"{slowest:.1f}", f"{peak / 1e6:.0f}"])
    columns = ["kind", "inputs", "refused", "accepted", "failures", "slowest, s", "peak memory, MB"]
    return "\n".join(
        [
            "# Mutated inputs",
            "",
            f"Commit {commit()}, seed {seed}. Refused: one message and exit code 2. Accepted: the damage "
            "did not matter, or nothing can tell it from another model. A failure is a traceback, another exit code, "
            f"more than {SECONDS} s of processor time, more than {MEMORY / 1e6:.0f} MB, or a file outside the output "
            "folder. The memory is that of the whole process, Python, torch and transformers included.",
            "",
            markdown(columns, rows),
            "",
            *(f"- {o.kind}:{o.number}: {o.problem}" for o in outcomes if o.problem),
            "",
        ]
    )


if __name__ == "__main__":
    main()
