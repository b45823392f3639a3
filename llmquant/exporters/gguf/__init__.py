"""GGUF files, as llama.cpp reads them: one file (or numbered shards) with weights, settings and tokenizer.

Every matrix has a type of its own: a block grid (``llmquant.grid.BlockGrid``) or a
float type. The recipe's mixture picks them as llama-quantize would; without one,
what the recipe leaves float stays in the model's dtype. Vectors are float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gguf import Keys, LlamaFileType
from torch import Tensor

import llmquant
from llmquant import gguf_file, imatrix
from llmquant.checkpoint import check_finite, read_json
from llmquant.data import load_tokenizer
from llmquant.errors import FormatError, OutputError, RecipeError
from llmquant.exporters.gguf import families, general, mixtures, ollama, vocabulary, writer
from llmquant.files import write_text
from llmquant.grid import BlockGrid, Grid, QuantizedTensor
from llmquant.plan import PIECE

if TYPE_CHECKING:
    from llmquant.checkpoint import Checkpoint
    from llmquant.export import Source
    from llmquant.plan import Linear, Plan
    from llmquant.recipe import Mixture
    from llmquant.stats import Stats

METHOD = "gguf"
CONV1D = True
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def check(grid: Grid, rows: int, cols: int) -> None:
    """Raise FormatError when a GGUF file has no type for this grid."""
    if not isinstance(grid, BlockGrid):
        raise FormatError(
            f"a gguf file has no type for the grid {type(grid).__name__}. Use one of its types, e.g. "
            "`grid: {name: q4_k}`, or a mixture, e.g. `mixture: {name: q4_k_m}`"
        )


def check_tokenizer(tokenizer: Any, config: Any) -> None:
    """Raise FormatError when llama.cpp has no equal for a tokenizer. config: the model's configuration."""
    text = config.get_text_config()
    vocabulary.metadata(tokenizer, text.vocab_size, text)


def pack(q: QuantizedTensor) -> dict[str, Tensor]:
    """Return the blocks of a linear, a row of bytes for each of its rows."""
    grid = q.grid
    assert isinstance(grid, BlockGrid)
    rows = q.codes.shape[0]
    params = {name: value.flatten(0, 1) for name, value in q.params.items()}
    return {"": grid.to_bytes(q.codes.reshape(-1, grid.span), params).view(rows, -1)}


def choose_types(
    mixture: Mixture | None,
    config: Any,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    calibrated: bool,
) -> dict[str, tuple[str, str]]:
    """Return (type, note) of every tensor by its name in the checkpoint.

    config: the model's transformers configuration. shapes: of all tensors by name, matrices as [rows, columns].
    dtype: what the model is stored in. calibrated: whether there are activation statistics.

    Raises FormatError for a model that llama.cpp does not run, RecipeError for a mixture that does not exist.
    """
    layout = families.layout(config, shapes)
    text = config.get_text_config()
    architecture = mixtures.Architecture(
        layout.architecture,
        text.num_hidden_layers,
        text.num_attention_heads,
        layout.metadata[Keys.Attention.HEAD_COUNT_KV.format(arch=layout.architecture)],
        layout.metadata.get(Keys.LLM.EXPERT_COUNT.format(arch=layout.architecture), 0),
    )
    named = {entry.name: entry.shape(shapes) for entry in layout.entries}
    plain = next((name.upper() for name, known in FLOATS.items() if known == dtype), "F32")
    types = mixtures.types(
        mixture.name if mixture else plain,
        named,
        architecture,
        imatrix=calibrated,
        pure=mixture is not None and mixture.pure,
        output=mixture.output if mixture else None,
        token_embedding=mixture.token_embedding if mixture else None,
        overrides=list(mixture.overrides.items()) if mixture else [],
    )
    chosen = {entry.name: (types[entry.name].type, types[entry.name].note) for entry in layout.entries}
    return {source: chosen[entry.name] for entry in layout.entries for source in entry.sources}


def check_together(linears: Mapping[str, Grid | None]) -> None:
    """Raise FormatError when the experts of a layer, which a file stacks, have several grids."""
    stacks: dict[str, tuple[str, Grid | None]] = {}
    for name, grid in linears.items():
        if families.EXPERT.search(f"{name}."):
            first, wanted = stacks.setdefault(families.EXPERT.sub(".experts.", name), (name, grid))
            if grid != wanted:
                raise FormatError(
                    f"{name}: its grid is {grid or 'float'}, that of {first} is {wanted or 'float'}, but a gguf file "
                    "keeps a matrix of all experts of a layer as one tensor of one type. Let rules match all experts, "
                    'e.g. match: "*.experts.*.down_proj"'
                )


def importance(plan: Plan, config: Any) -> dict[str, Tensor]:
    """Return mean squares [columns] by a weight's name in the checkpoint, from the recipe's imatrix file.

    Raises CheckpointError for a file that is broken or of another model, RecipeError for one that knows no weight.
    """
    assert plan.recipe.imatrix is not None
    known = imatrix.read(plan.recipe.imatrix)
    shapes = {x.weight_name: (x.rows, x.cols) for x in plan.linears}
    found: dict[str, Tensor] = {}
    for entry in families.layout(config, shapes).entries:
        mean = known.square_mean(entry.name, shapes[entry.source][1], len(entry.sources))
        if mean is not None:
            found |= dict(zip(entry.sources, mean, strict=True))
    if not found:
        raise RecipeError(f"imatrix: {plan.recipe.imatrix} has no entry for any weight of this model")
    return found


def write_importance(path: Path, config: Any, stats: Mapping[str, Stats], text: str, chunk: int) -> None:
    """Write an imatrix file.

    config: the model's transformers configuration. stats: by the weight's name in the checkpoint.
    text: its name. chunk: tokens of a sequence.
    """
    shapes = {name: (0, len(known.square_mean)) for name, known in stats.items()}
    entries = {
        e.name: imatrix.Entry.of(*(stats[source] for source in e.sources))
        for e in families.layout(config, shapes).entries
    }
    chunks = max(known.tokens for known in stats.values()) // chunk
    imatrix.write(path, imatrix.Imatrix(entries, (text,), chunks, chunk))


def float_bytes(plan: Plan) -> int:
    """Return the size of all tensors that are not quantized."""
    sizes = {name: info.numel for name, info in plan.kept.items() if name in plan.types}
    sizes |= {x.weight_name: x.weights for x in plan.linears if x.grid is None}
    return sum(count * FLOATS[_float_type(plan, name)].itemsize for name, count in sizes.items())


def write(
    folder: Path, plan: Plan, checkpoint: Checkpoint, source: Source, config: Any, tell: Callable[[int, int], None]
) -> dict[str, str]:
    """Write the file or its shards into ``folder``, tensor by tensor, and return the SHA-256 of each by its name.

    config: the model's transformers configuration.
    """
    linears = {x.weight_name: x for x in plan.linears}
    layout, tensors, metadata = _contents(plan, checkpoint, config)

    def data(blocks: Iterator[Iterator[Tensor]]) -> Iterator[Iterable[Tensor]]:
        for i, entry in enumerate(layout.entries):
            tell(i, len(tensors))
            linear = linears.get(entry.source)
            if linear is not None and linear.grid is not None:
                pieces = (piece for _ in entry.sources for piece in next(blocks))
                yield pieces if entry.rows is None else [torch.cat(list(pieces))[entry.rows]]
            else:
                yield _float_data(plan, checkpoint, entry, tensors[i])
        for value in layout.extra.values():
            yield [value.contiguous().view(torch.uint8)]
        tell(len(tensors), len(tensors))

    name = general.file_name(metadata, checkpoint.folder, _file_type_name(plan))
    sources = (source for entry in layout.entries for source in entry.sources)
    quantized = [x for x in map(linears.get, sources) if x and x.grid]
    # closed as soon as writing fails, not when the exception is dropped: until then torch has one thread
    with closing(source.pieces(quantized, lambda q: pack(q)[""].cpu())) as blocks:
        split = plan.recipe.shard_bytes or 0
        files = writer.write(folder / f"{name}.gguf", metadata, tensors, data(blocks), split)
    if len(files) == 1:  # Ollama imports no shards
        write_text(folder / "Modelfile", _modelfile(f"{name}.gguf", checkpoint.folder, metadata, layout.architecture))
    return {path.name: digest for path, digest in files.items()}


def read_back(folder: Path, plan: Plan, checkpoint: Checkpoint, config: Any) -> Callable[[str, int], Tensor | None]:
    """Check the file that was written, and return what decodes the first rows of a matrix of the checkpoint.

    That is, (name, rows) -> these rows, or None of a matrix that has them in another order in the file.

    config: the model's transformers configuration. Raises OutputError for a tensor that is not there as it should be.
    """
    layout, tensors, _ = _contents(plan, checkpoint, config)
    file = gguf_file.read(min(folder.glob("*.gguf")))
    for stored in tensors:
        found = file.tensors.get(stored.name)
        shape = None if found is None else found.shape
        if found is None or (math.prod(found.shape), found.type) != (math.prod(stored.shape), stored.type):
            raise OutputError(f"{stored.name} is {found and found.type} {shape}, and {stored} was written.")
        if found.type in FLOATS:
            rows = math.prod(found.shape[:-1])
            step = max(PIECE // found.shape[-1], 1)
            for start in range(0, rows, step):
                check_finite(gguf_file.to_float(found, (start, min(start + step, rows))), stored.name)
    entries = {source: entry for entry in layout.entries for source in entry.sources}

    def decoded(name: str, rows: int) -> Tensor | None:
        entry = entries[name]
        if entry.rows is not None:
            return None
        stored = file.tensors[entry.name]
        first = entry.sources.index(name) * (math.prod(stored.shape[:-1]) // len(entry.sources))
        return gguf_file.to_float(stored, (first, first + rows))

    return decoded


def file_bytes(plan: Plan, checkpoint: Checkpoint, config: Any) -> int:
    """Return the size of the file or its shards, to the byte. config: the model's transformers configuration."""
    _, tensors, metadata = _contents(plan, checkpoint, config)
    return writer.file_bytes(metadata, tensors, plan.recipe.shard_bytes or 0)


def _contents(
    plan: Plan, checkpoint: Checkpoint, config: Any
) -> tuple[families.Layout, list[writer.Stored], dict[str, Any]]:
    """Return what the file holds: where its tensors come from, their descriptions, the metadata."""
    linears = {x.weight_name: x for x in plan.linears}
    shapes = {name: info.shape for name, info in plan.kept.items()}
    shapes |= {name: (x.rows, x.cols) for name, x in linears.items()}
    layout = families.layout(config, shapes)
    tensors = [
        writer.Stored(entry.name, entry.shape(shapes), _type(plan, entry.source, linears)) for entry in layout.entries
    ]
    tensors += [writer.Stored(name, tuple(value.shape), "f32") for name, value in layout.extra.items()]
    metadata = general.metadata(checkpoint.folder, checkpoint.config, layout.architecture, plan.weights)
    metadata |= _made(plan, layout) | layout.metadata
    text, tokenizer = config.get_text_config(), load_tokenizer(checkpoint.folder)
    metadata |= vocabulary.metadata(tokenizer, text.vocab_size, text)
    metadata[Keys.General.NAME] = vocabulary.model_name(metadata[Keys.General.NAME], tokenizer)
    return layout, tensors, metadata


def _modelfile(file: str, model: Path, metadata: Mapping[str, Any], architecture: str) -> str:
    """Return the Modelfile of a file with these keys. model: the folder of the float model."""
    settings = model / "generation_config.json"
    told = read_json(settings, "it gives the ends of answers").get("eos_token_id") if settings.is_file() else None
    ends = [metadata.get(Keys.Tokenizer.EOS_ID), *(told if isinstance(told, list) else [told])]
    known = range(len(metadata[Keys.Tokenizer.LIST]))
    return ollama.modelfile(
        file,
        load_tokenizer(model),
        metadata[Keys.LLM.CONTEXT_LENGTH.format(arch=architecture)],
        bool(metadata.get(Keys.Tokenizer.ADD_BOS)),
        {number for number in ends if isinstance(number, int) and number in known},
        metadata,
    )


def _float_data(plan: Plan, checkpoint: Checkpoint, entry: families.Entry, stored: writer.Stored) -> Iterator[Tensor]:
    """Yield the bytes of a tensor that stays float, some rows at a time where it can be read so."""
    shape = stored.shape[1:] if entry.stack else stored.shape
    rows = shape[0]
    for source in entry.sources:
        name = source if source in checkpoint else f"{plan.spec.embed}.weight"
        by_columns = plan.spec.conv1d and name.startswith(f"{plan.spec.layers}.") and len(shape) == 2
        whole = by_columns or entry.rows is not None
        step = rows if whole else max(PIECE * rows // math.prod(shape), 1)
        for start in range(0, rows, step):
            value = checkpoint.read(name, None if whole else (start, start + step))
            if by_columns:
                value = value.T
            if entry.rows is not None:
                value = value[entry.rows]
            if entry.plus_one:
                value = value.float() + 1
            stored_value = value.to(FLOATS[stored.type]).contiguous()
            check_finite(stored_value, f"{checkpoint.folder}: {name}, as {stored.type},")
            yield stored_value.view(-1).view(torch.uint8)


def _type(plan: Plan, name: str, linears: Mapping[str, Linear]) -> str:
    """Return the type of a tensor in the file."""
    linear = linears.get(name)
    if linear is not None and isinstance(linear.grid, BlockGrid):
        return linear.grid.name
    return _float_type(plan, name)


def _float_type(plan: Plan, name: str) -> str:
    """Return the float type of a tensor that is not quantized: the mixture's, or 16 bits where a rule has kept it.

    Its own where it could not be quantized: the values may be the reason.
    """
    own = next((x.dtype for x in plan.linears if x.weight_name == name and x.name in plan.given_up), None)
    if own is not None:
        return next((type_ for type_, dtype in FLOATS.items() if dtype == own), "f32")
    type_ = plan.types[name]
    return type_ if type_ in FLOATS else "f16"


def _made(plan: Plan, layout: families.Layout) -> dict[str, Any]:
    """Return the keys that tell what the file is and how it was made."""
    keys: dict[str, Any] = {}
    if plan.recipe.imatrix is not None:
        known = imatrix.read(plan.recipe.imatrix)
        keys = {
            "quantize.imatrix.file": str(plan.recipe.imatrix),
            "quantize.imatrix.dataset": ", ".join(known.datasets),
            "quantize.imatrix.entries_count": len(known.entries),
            "quantize.imatrix.chunks_count": known.chunk_count,
        }
    return keys | {
        Keys.General.ARCHITECTURE: layout.architecture,
        Keys.General.TYPE: "model",
        Keys.General.FILE_TYPE: int(_file_type(plan)),
        Keys.General.QUANTIZATION_VERSION: 2 if plan.quantized else 0,
        Keys.General.QUANTIZED_BY: f"llmquant {llmquant.__version__}",
    }


def _file_type(plan: Plan) -> LlamaFileType:
    """Return the mixture's number, or the one that comes nearest to what most weights are stored in."""
    if plan.recipe.mixture is not None:
        return mixtures.find(plan.recipe.mixture.name).file_type
    linears = {x.weight_name: x for x in plan.linears}
    counts: Counter[str] = Counter()
    for name, linear in linears.items():
        counts[_type(plan, name, linears)] += linear.weights
    commonest = counts.most_common(1)[0][0].upper()
    return next(
        (kind for kind in LlamaFileType if kind.name.removeprefix("MOSTLY_").removesuffix("_S") == commonest),
        LlamaFileType.GUESSED,
    )


def _file_type_name(plan: Plan) -> str:
    return str(_file_type(plan).name).removeprefix("MOSTLY_").removeprefix("ALL_")
