"""The types that mixtures give, beside those that llama.cpp gives the same tensors.

cyllama's llama.cpp (b9190) quantizes tiny models here. What it cannot be asked
for (an imatrix, overrides) or refuses (Q2_K_S without an imatrix, columns that
32 does not divide) was written down from llama-quantize of llama.cpp 0.5.0.
"""

from itertools import groupby

import gguf
import numpy as np
import pytest

from llmquant.errors import RecipeError
from llmquant.exporters.gguf import mixtures
from llmquant.exporters.gguf.mixtures import Architecture

MODELS = {
    "gqa": (Architecture("llama", 16, 8, 2), {}),
    "mha": (Architecture("llama", 9, 8, 8), {"tied": True}),
    "fused": (Architecture("gpt2", 8, 8, 8), {"fused": True}),
    "288 columns": (Architecture("qwen2", 8, 8, 1), {"hidden": 288}),
    "288 columns, tied": (Architecture("gemma3", 4, 12, 4), {"hidden": 288, "tied": True}),
    "falcon": (Architecture("falcon", 31, 8, 1), {"fused": True}),
    "eighty layers": (Architecture("llama", 80, 8, 1), {}),
    "eighty layers, a key for each head": (Architecture("llama", 80, 8, 8), {}),
    "eighty layers, another family": (Architecture("qwen2", 80, 8, 8), {}),
    "eight experts": (Architecture("llama", 8, 8, 2, experts=8), {}),
    "four experts": (Architecture("llama", 8, 8, 8, experts=4), {}),
}
REFUSED = {"F32", "MXFP4", "Q2_K_S"}  # nothing to do, only as pure, only with an imatrix


def tensors_of(architecture, hidden=256, inner=512, tied=False, fused=False):
    """Return name -> shape, with two rows: the rules do not look at them."""
    shapes = {"output_norm.weight": (hidden,), "token_embd.weight": (2, hidden), "position_embd.weight": (2, hidden)}
    if not tied:
        shapes["output.weight"] = (2, hidden)
    heads = ["qkv"] if fused else ["q", "k", "v"]
    experts = (architecture.experts,) if architecture.experts else ()
    kind = "_exps" if experts else ""
    for layer in range(architecture.layers):
        at = f"blk.{layer}"
        shapes |= {f"{at}.attn_{head}.weight": (2, hidden) for head in heads}
        shapes |= {f"{at}.attn_{head}.bias": (8,) for head in heads}
        shapes[f"{at}.attn_norm.weight"] = (hidden,)
        shapes[f"{at}.attn_q_norm.weight"] = (2, 32)
        shapes[f"{at}.attn_output.weight"] = (2, hidden)
        shapes[f"{at}.ffn_up{kind}.weight"] = (*experts, 2, hidden)
        shapes[f"{at}.ffn_down{kind}.weight"] = (*experts, 2, inner)
        if experts:
            shapes[f"{at}.ffn_gate_inp.weight"] = (architecture.experts, hidden)
            shapes[f"{at}.ffn_down_shexp.weight"] = (2, inner)
    return shapes


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    """Return a function that writes a model of zeros, once, and returns the path."""
    folder = tmp_path_factory.mktemp("models")

    def write(name):
        path = folder / f"{name}.gguf"
        if path.exists():
            return path
        architecture, options = MODELS[name]
        writer = gguf.GGUFWriter(path, architecture.name)
        writer.add_block_count(architecture.layers)
        writer.add_context_length(64)
        writer.add_embedding_length(256)
        writer.add_feed_forward_length(512)
        writer.add_head_count(architecture.heads)
        writer.add_head_count_kv(architecture.kv_heads)
        writer.add_layer_norm_eps(1e-5)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_sliding_window(64)
        writer.add_vocab_size(8)
        if architecture.experts:
            writer.add_expert_count(architecture.experts)
            writer.add_expert_used_count(2)
        for tensor, shape in tensors_of(architecture, **options).items():
            writer.add_tensor(tensor, np.zeros(shape, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture
def quantized(write, tmp_path):
    """Return a function that quantizes a model with llama.cpp and returns the types and the number of the mixture."""
    llama_cpp = pytest.importorskip("cyllama.llama.llama_cpp")

    def quantized(name, mixture, **options):
        params = llama_cpp.LlamaModelQuantizeParams()
        params.ftype = int(mixtures.find(mixture).file_type)
        params.nthread = 1
        for option, value in options.items():
            setattr(params, option, value)
        out = tmp_path / "quantized.gguf"
        llama_cpp.model_quantize(str(write(name)), str(out), params)
        reader = gguf.GGUFReader(out)
        types = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
        return types, reader.fields["general.file_type"].contents()

    return quantized


def chosen(name, mixture, imatrix=False, **options):
    architecture, shape = MODELS[name]
    types = mixtures.types(mixture, tensors_of(architecture, **shape), architecture, imatrix=imatrix, **options)
    return {tensor: choice.type for tensor, choice in types.items()}


def layers(types, part):
    """Return a part's types from the first layer to the last, such as "2 q6_k, 14 q4_k"."""
    found = [type_ for name, type_ in types.items() if part in name]
    return ", ".join(f"{len(list(group))} {type_}" for type_, group in groupby(found))


CASES = [(name, mixture) for name in MODELS for mixture in mixtures.MIXTURES if mixture not in REFUSED]


@pytest.mark.parametrize(
    ("name", "mixture"), [c for c in CASES if "eighty" not in c[0] or c[1] in ("Q3_K_S", "Q3_K_L", "Q4_K_M")]
)
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(name, mixture, quantized):
    types, file_type = quantized(name, mixture)
    assert chosen(name, mixture) == types
    assert mixtures.find(mixture).file_type == file_type


@pytest.mark.parametrize("name", ["gqa", "falcon", "mha"])
@pytest.mark.parametrize("mixture", ["Q3_K_M", "Q4_K_M", "Q4_0", "Q8_0", "MXFP4", "BF16"])
def test_a_pure_file_has_one_type_for_every_matrix(name, mixture, quantized):
    types, _ = quantized(name, mixture, pure=True)
    assert chosen(name, mixture, pure=True) == types
    assert set(types.values()) == {"f32", mixtures.find(mixture).base}


@pytest.mark.parametrize("name", ["gqa", "mha", "288 columns"])
@pytest.mark.parametrize(
    "wishes", [{"output": "q5_0"}, {"token_embedding": "Q8_0"}, {"output": "f16", "token_embedding": "q4_1"}]
)
def test_the_output_and_the_embedding_get_the_type_asked_for(name, wishes, quantized):
    options = {"output": "output_tensor_type", "token_embedding": "token_embedding_type"}
    asked = {options[key]: int(gguf.GGMLQuantizationType[type_.upper()]) for key, type_ in wishes.items()}
    assert chosen(name, "Q4_K_M", **wishes) == quantized(name, "Q4_K_M", **asked)[0]


def test_a_tied_output_gets_the_type_asked_for_in_pure_files_too():
    assert chosen("mha", "Q4_K_M", pure=True, output="q8_0")["token_embd.weight"] == "q8_0"


@pytest.mark.parametrize(
    ("mixture", "imatrix", "values", "downs"),
    [
        ("Q2_K_S", False, "16 q4_k", "2 q4_k, 14 q2_k"),
        ("Q2_K_S", True, "16 q4_k", "2 q4_k, 14 q2_k"),
        ("Q2_K", True, "16 q4_k", "16 q3_k"),
        ("Q3_K_M", True, "2 q5_k, 14 q4_k", "1 q5_k, 15 q4_k"),
        ("Q4_K_S", True, "4 q5_k, 12 q4_k", "2 q5_k, 14 q4_k"),
        ("Q4_0", False, "16 q4_0", "16 q4_0"),
        ("Q4_0", True, "16 q4_0", "2 q4_1, 14 q4_0"),
        ("Q5_0", False, "16 q5_0", "16 q5_0"),
        ("Q5_0", True, "16 q5_0", "2 q5_1, 14 q5_0"),
        ("IQ4_NL", False, "16 q5_k", "2 q5_k, 14 iq4_nl"),
        ("IQ4_NL", True, "16 q5_k", "16 iq4_nl"),
        ("IQ4_XS", False, "16 q5_k", "2 q5_k, 14 iq4_xs"),
        ("IQ4_XS", True, "16 q5_k", "16 iq4_xs"),
    ],
)
def test_an_imatrix_changes_what_it_changes_in_llama_quantize(mixture, imatrix, values, downs):
    types = chosen("gqa", mixture, imatrix)
    assert (layers(types, "attn_v.weight"), layers(types, "ffn_down")) == (values, downs)
    assert types["output.weight"] == "q6_k"
    assert types["token_embd.weight"] == types["blk.0.ffn_up.weight"] == mixtures.find(mixture).base


HALF = "2 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 3 q6_k"
MOVED = "1 q8_0, 2 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 1 q6_k, 2 q4_k, 2 q6_k"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([(r"blk\.0\.attn_v", "q8_0")], (MOVED, HALF, "16 q4_k", "q6_k", "q4_k")),
        ([(r"blk\.0\.ffn_down", "q8_0")], (HALF, MOVED, "16 q4_k", "q6_k", "q4_k")),
        (
            [(r"blk\.[0-2]\.(attn_v|ffn_down)", "q3_k"), ("ATTN_", "iq4_nl"), ("blk", "q8_0")],
            ("3 q3_k, 13 iq4_nl", "3 q3_k, 13 q8_0", "16 iq4_nl", "q6_k", "q4_k"),
        ),
        ([("output", "q2_k"), ("token_embd", "Q5_1")], (HALF, HALF, "16 q2_k", "q2_k", "q5_1")),
    ],
)
def test_overrides_act_as_in_llama_quantize(overrides, expected):
    types = chosen("gqa", "Q4_K_M", overrides=overrides)
    parts = [layers(types, part) for part in ("attn_v.weight", "ffn_down", "attn_output")]
    assert (*parts, types["output.weight"], types["token_embd.weight"]) == expected


def test_the_options_for_output_and_embedding_outrank_overrides():
    types = chosen("gqa", "Q4_K_M", output="q8_0", token_embedding="q3_k", overrides=[("weight", "q2_k")])
    assert (types["output.weight"], types["token_embd.weight"]) == ("q8_0", "q3_k")


def test_overrides_also_work_in_float_files():
    types = chosen("gqa", "F16", overrides=[("ffn_down", "q8_0")])
    assert layers(types, "ffn_down") == "16 q8_0"
    assert layers(types, "ffn_up") == "16 f16"


@pytest.mark.parametrize("mixture", [m for m in mixtures.MIXTURES if m not in ("F32", "BF16")])
def test_columns_that_32_does_not_divide_stay_float16(mixture):
    architecture = Architecture("llama", 2, 8, 2)
    shapes = tensors_of(architecture, hidden=272, inner=528)
    types = mixtures.types(mixture, shapes, architecture, imatrix=False)
    matrices = {n for n, shape in shapes.items() if len(shape) > 1 and "norm" not in n and "position" not in n}
    assert {types[name].type for name in matrices} == {"f16"}
    assert {types[name].type for name in types.keys() - matrices} == {"f32"}


def test_every_fallback_is_noted_and_nothing_else():
    architecture = Architecture("llama", 8, 8, 8)
    types = mixtures.types("Q3_K_S", tensors_of(architecture, hidden=288), architecture, imatrix=False)
    assert types["blk.0.ffn_up.weight"].type == "q4_0"
    assert types["blk.0.ffn_up.weight"].note == "q4_0 for q3_k, whose blocks of 256 do not divide 288 columns"
    noted = {name for name, choice in types.items() if choice.note}
    assert noted == {name for name, choice in types.items() if choice.type in ("q4_0", "q8_0")}


def test_a_matrix_of_one_row_is_a_vector():
    shapes = {"output.weight": (4, 256), "blk.0.cls.weight": (1, 256), "blk.1.cls.weight": (1, 5, 256)}
    types = mixtures.types("Q4_K_S", shapes, Architecture("llama", 1, 8, 8), imatrix=False)
    assert [choice.type for choice in types.values()] == ["q6_k", "f32", "q4_k"]


@pytest.mark.parametrize("mixture", ["Q4_K_M", "Q4_K_S", "Q3_K_M"])
def test_layers_count_by_their_number_whatever_the_order_of_the_tensors(mixture):
    architecture, options = MODELS["gqa"]
    shapes = tensors_of(architecture, **options)
    backwards = dict(reversed(shapes.items()))
    types = mixtures.types(mixture, backwards, architecture, imatrix=False)
    assert list(types) == list(backwards)
    assert types == mixtures.types(mixture, shapes, architecture, imatrix=False)


def test_capitals_do_not_matter():
    assert chosen("gqa", "q4_k_m", output="Q8_0") == chosen("gqa", "Q4_K_M", output="q8_0")


@pytest.mark.parametrize(
    ("mixture", "options", "message"),
    [
        ("Q4KM", {}, "'Q4KM' is not a mixture of GGUF types. Did you mean 'Q4_K_M'?"),
        ("Q4_K_M", {"output": "q6k"}, "output.weight: 'q6k' is not a GGUF type. Did you mean 'q6_k'?"),
        ("Q4_K_M", {"token_embedding": "int8"}, "token_embd.weight: 'int8' is not a GGUF type. Known: bf16, "),
        ("Q4_K_M", {"overrides": [("attn_v", "q6k")]}, "override 'attn_v': 'q6k' is not a GGUF type. Did you mean"),
        ("Q4_K_M", {"overrides": [("attn_(v", "q6_k")]}, "override 'attn_(v' is not a regular expression: missing )"),
        ("Q4_K_M", {"overrides": [("attn_w", "q6_k")]}, "override 'attn_w' = q6_k: no matrix that is quantized has"),
        ("Q4_K_M", {"overrides": [("norm", "q6_k")]}, "override 'norm' = q6_k: no matrix that is quantized has"),
    ],
)
def test_a_wish_that_means_nothing_is_an_error(mixture, options, message):
    with pytest.raises(RecipeError) as error:
        chosen("gqa", mixture, **options)
    assert message in str(error.value)
