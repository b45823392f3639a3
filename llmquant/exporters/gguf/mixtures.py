"""Which type every tensor of a GGUF file gets.

A mixture such as Q4_K_M is a base type and the parts of a layer that get
another: more bits for what suffers most from rounding (the values of the
attention, the second matrix of the feed-forward part, the output), and a type
with smaller blocks where the base's do not divide the columns. Source: the
rules of llama-quantize in llama.cpp 0.5.0 (src/llama-quant.cpp). They give the
same type for every tensor, so that our files and its files have one size and
may be compared.

Two departures, where llama-quantize drops a wish without a word: overrides
also work in float files, and in a model that ties its output to the token
embedding a type for the output is always one for the embedding.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf import LlamaFileType as FileType

from llmquant import patterns
from llmquant.errors import RecipeError
from llmquant.plugins import hint

TYPES = (
    *("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4"),
)

SUBSTITUTES = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0", "iq4_xs": "iq4_nl"}
"""Type with blocks of 256 columns -> the one with blocks of 32 that llama.cpp takes where 256 do not fit."""

UNQUANTIZED = re.compile(r"_norm\.weight|ffn_gate_inp\.weight|^position_embd\.weight$|^token_types\.weight$")
"""Matrices that llama.cpp reads as floats only, or that are too small to be worth it."""

PARTS = {
    "attn_qkv.weight": "value",
    "attn_kv_b.weight": "value",
    "attn_v.weight": "value",
    "attn_k.weight": "key",
    "attn_output.weight": "mix",
    "ffn_down": "down",
}
"""Piece of a name -> the part of a layer it is to the rules; a fused matrix counts as the values it holds."""


@dataclass(frozen=True)
class Architecture:
    """What the rules ask about a model: ``general.architecture`` and the numbers under that name in the metadata."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0


@dataclass(frozen=True)
class Chosen:
    """The type of a tensor, in lower case. ``note`` is empty, or says why it is not the one that was wanted."""

    type: str
    note: str = ""


@dataclass(frozen=True)
class Place:
    """Where a matrix stands: number ``index`` among ``count`` of its part."""

    index: int
    count: int
    sharing: int  # heads that read the same keys and values
    imatrix: bool


def everywhere(at: Place) -> bool:
    return True


def first_two(at: Place) -> bool:
    return at.index < 2


def first_four(at: Place) -> bool:
    return at.index < 4


def first_eighth(at: Place) -> bool:
    return at.index < at.count // 8


def first_sixteenth(at: Place) -> bool:
    return at.index < at.count // 16


def first_eighth_with_imatrix(at: Place) -> bool:
    return at.imatrix and first_eighth(at)


def first_eighth_without_imatrix(at: Place) -> bool:
    return not at.imatrix and first_eighth(at)


def half(at: Place) -> bool:
    """Return whether this is in the first or last eighth, or the last of three in between: about half of all."""
    return first_eighth(at) or at.index >= 7 * at.count // 8 or (at.index - at.count // 8) % 3 == 2


def shared(at: Place) -> bool:
    """Return whether the values are small beside the queries, so that bits for them cost little."""
    return at.sharing >= 4


Rules = tuple[tuple[Callable[[Place], bool], str], ...]


@dataclass(frozen=True)
class Mixture:
    """A base type, and for some parts of a layer rules, of which the first that holds gives the type.

    file_type: what ``general.file_type`` holds.
    value, down, mix: rules for attn_v, ffn_down and attn_output.
    mix_of_eight: the type of attn_output in models of eight experts, instead of ``mix``; empty for the base.
    plain: the base type for every matrix, the output and the embedding too.
    """

    file_type: FileType
    base: str
    value: Rules = ()
    down: Rules = ()
    mix: Rules = ()
    mix_of_eight: str = ""
    plain: bool = False


MIXTURES = {
    "F32": Mixture(FileType.ALL_F32, "f32", plain=True),
    "F16": Mixture(FileType.MOSTLY_F16, "f16", plain=True),
    "BF16": Mixture(FileType.MOSTLY_BF16, "bf16", plain=True),
    "MXFP4": Mixture(FileType.MOSTLY_MXFP4_MOE, "mxfp4", plain=True),
    "Q8_0": Mixture(FileType.MOSTLY_Q8_0, "q8_0"),
    "Q4_0": Mixture(FileType.MOSTLY_Q4_0, "q4_0", down=((first_eighth_with_imatrix, "q4_1"),)),
    "Q4_1": Mixture(FileType.MOSTLY_Q4_1, "q4_1"),
    "Q5_0": Mixture(FileType.MOSTLY_Q5_0, "q5_0", down=((first_eighth_with_imatrix, "q5_1"),)),
    "Q5_1": Mixture(FileType.MOSTLY_Q5_1, "q5_1"),
    "Q2_K": Mixture(
        FileType.MOSTLY_Q2_K,
        "q2_k",
        value=((shared, "q4_k"), (everywhere, "q3_k")),
        down=((everywhere, "q3_k"),),
        mix=((everywhere, "q3_k"),),
        mix_of_eight="q5_k",
    ),
    "Q2_K_S": Mixture(FileType.MOSTLY_Q2_K_S, "q2_k", value=((shared, "q4_k"),), down=((first_eighth, "q4_k"),)),
    "Q3_K_S": Mixture(FileType.MOSTLY_Q3_K_S, "q3_k", mix_of_eight="q5_k"),
    "Q3_K_M": Mixture(
        FileType.MOSTLY_Q3_K_M,
        "q3_k",
        value=((first_two, "q5_k"), (everywhere, "q4_k")),
        down=((first_sixteenth, "q5_k"), (everywhere, "q4_k")),
        mix=((everywhere, "q4_k"),),
        mix_of_eight="q5_k",
    ),
    "Q3_K_L": Mixture(
        FileType.MOSTLY_Q3_K_L,
        "q3_k",
        value=((everywhere, "q5_k"),),
        down=((everywhere, "q5_k"),),
        mix=((everywhere, "q5_k"),),
    ),
    "Q4_K_S": Mixture(
        FileType.MOSTLY_Q4_K_S,
        "q4_k",
        value=((first_four, "q5_k"),),
        down=((first_eighth, "q5_k"),),
        mix_of_eight="q5_k",
    ),
    "Q4_K_M": Mixture(
        FileType.MOSTLY_Q4_K_M, "q4_k", value=((half, "q6_k"),), down=((half, "q6_k"),), mix_of_eight="q5_k"
    ),
    "Q5_K_S": Mixture(FileType.MOSTLY_Q5_K_S, "q5_k"),
    "Q5_K_M": Mixture(FileType.MOSTLY_Q5_K_M, "q5_k", value=((half, "q6_k"),), down=((half, "q6_k"),)),
    "Q6_K": Mixture(FileType.MOSTLY_Q6_K, "q6_k"),
    "IQ4_NL": Mixture(
        FileType.MOSTLY_IQ4_NL,
        "iq4_nl",
        value=((shared, "q5_k"),),
        down=((first_eighth_without_imatrix, "q5_k"),),
        mix_of_eight="q5_k",
    ),
    "IQ4_XS": Mixture(
        FileType.MOSTLY_IQ4_XS,
        "iq4_xs",
        value=((shared, "q5_k"),),
        down=((first_eighth_without_imatrix, "q5_k"),),
        mix_of_eight="q5_k",
    ),
}

FALCON = MIXTURES | {
    "Q2_K": replace(MIXTURES["Q2_K"], mix=()),
    "Q3_K_M": replace(MIXTURES["Q3_K_M"], down=((first_sixteenth, "q5_k"), (half, "q4_k")), mix=()),
    "Q3_K_L": replace(MIXTURES["Q3_K_L"], down=((everywhere, "q4_k"),), mix=((everywhere, "q4_k"),)),
    "Q4_K_S": replace(MIXTURES["Q4_K_S"], down=()),
    "Q4_K_M": replace(MIXTURES["Q4_K_M"], down=((first_sixteenth, "q6_k"), (half, "q5_k"))),
}


def find(mixture: str) -> Mixture:
    """Return a mixture by its name, in capitals or not, or raise RecipeError."""
    name = mixture.upper()
    if name not in MIXTURES:
        raise RecipeError(f"{mixture!r} is not a mixture of GGUF types.{hint(name, MIXTURES)}")
    return MIXTURES[name]


def types(
    mixture: str,
    tensors: Mapping[str, tuple[int, ...]],
    architecture: Architecture,
    *,
    imatrix: bool,
    pure: bool = False,
    output: str | None = None,
    token_embedding: str | None = None,
    overrides: Sequence[tuple[str, str]] = (),
) -> dict[str, Chosen]:
    """Return the type of every tensor, in the order given.

    tensors: every tensor of the file, under its GGUF name, with its shape ([experts,] rows, columns).
    imatrix: whether there are activation statistics.
    pure: the base type for every matrix.
    output, token_embedding: types for these two, whatever else is asked for.
    overrides: pairs of a regular expression, searched in the name, and a type; the first that fits counts. A matrix
        that one takes out of the mixture is not counted among the layers, as in llama-quantize: the bonus of the
        first layers then moves on.

    Raises RecipeError for a mixture, type or expression that does not exist, and an override that fits no matrix.
    """
    chosen = find(mixture)
    if architecture.name == "falcon":
        chosen = FALCON[mixture.upper()]
    wishes = [(pattern, _type(type_, f"override {pattern!r}")) for pattern, type_ in overrides]
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    asked = [(head, output), ("token_embd.weight", token_embedding)]
    named = {name: _type(type_, name) for name, type_ in asked if type_ is not None}
    matrices = [name for name in sorted(tensors, key=_by_layer) if _quantizable(name, tensors[name])]
    for pattern, type_ in wishes:
        if not any(_fits(pattern, name) for name in matrices):
            raise RecipeError(f"override {pattern!r} = {type_}: no matrix that is quantized has such a name")
    values = sum(_part(name) == "value" for name in tensors)
    seen: Counter[str] = Counter()
    wanted = dict.fromkeys(tensors, "f32")
    for name in matrices:
        override = next((type_ for pattern, type_ in wishes if _fits(pattern, name)), None)
        if name in named:
            wanted[name] = named[name]
        elif override is not None:
            wanted[name] = override
        elif pure or chosen.plain:
            wanted[name] = chosen.base
        elif name == head:
            wanted[name] = "q8_0" if chosen.base == "q8_0" or architecture.name == "falcon" else "q6_k"
        else:
            part = _part(name)
            index = seen[part]
            if part == "down" and architecture.experts > 1:  # several such matrices a layer
                index = _by_layer(name)[0]
            seen[part] += 1
            count = values if part == "value" else architecture.layers
            place = Place(index, count, architecture.heads // architecture.kv_heads, imatrix)
            wanted[name] = _mixed(chosen, part, place, architecture)
    return {name: _fit(wanted[name], shape[-1]) if shape else Chosen("f32") for name, shape in tensors.items()}


def _mixed(mixture: Mixture, part: str, place: Place, architecture: Architecture) -> str:
    """Return the type of a matrix of a layer by the rules of a mixture."""
    eight = architecture.experts == 8
    if eight and part in ("value", "key"):
        return "q8_0"
    if eight and part == "mix":
        return mixture.mix_of_eight or mixture.base
    rules = {"value": mixture.value, "down": mixture.down, "mix": mixture.mix}.get(part, ())
    type_ = next((type_ for holds, type_ in rules if holds(place)), mixture.base)
    if part == "value" and type_ in ("q3_k", "q4_k") and _is_70b(architecture):
        return "q5_k"
    return type_


def _is_70b(architecture: Architecture) -> bool:
    """Return whether this is the shape that llama.cpp calls 70B."""
    shares = architecture.heads != architecture.kv_heads
    return architecture.layers == 80 and (architecture.name == "qwen2" or (architecture.name == "llama" and shares))


def _fit(wanted: str, cols: int) -> Chosen:
    """Return the wanted type, or what stands in for it where its blocks do not divide the columns."""
    if cols % _block(wanted) == 0:
        return Chosen(wanted)
    substitute = SUBSTITUTES.get(wanted, wanted)
    if cols % _block(substitute):
        substitute = "f16"
    return Chosen(
        substitute, f"{substitute} for {wanted}, whose blocks of {_block(wanted)} do not divide {cols} columns"
    )


def _block(type_: str) -> int:
    """Return the number of columns that a type stores together."""
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[type_.upper()]][0])


def _quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor is a matrix (of more than one row) that llama.cpp quantizes."""
    return any(n > 1 for n in shape[:-1]) and name.endswith("weight") and not UNQUANTIZED.search(name)


def _part(name: str) -> str:
    return next((part for piece, part in PARTS.items() if piece in name), "")


def _by_layer(name: str) -> tuple[int, str]:
    """Return what llama.cpp sorts tensors by and so counts layers in: the layer (-1 outside of all), then the name."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return (int(layer[1]) if layer else -1, name)


def _type(type_: str, where: str) -> str:
    if type_.lower() not in TYPES:
        raise RecipeError(f"{where}: {type_!r} is not a GGUF type.{hint(type_.lower(), TYPES)}")
    return type_.lower()


def _fits(pattern: str, name: str) -> bool:
    try:
        return patterns.matches(pattern, name, "search", ignore_case=True)
    except ValueError as error:
        raise RecipeError(f"override {pattern!r:.200} {error}") from None
