"""From a model folder to a GGUF file and back, beside what llama.cpp makes of the file."""

import errno
import hashlib

import gguf
import pytest
import torch
import transformers as hf

from llmquant import api, checkpoint, demo, evaluation, gguf_file, imatrix, recipe, run
from llmquant import plan as planning
from llmquant.cpp_runtime import CppModel
from llmquant.data import load_tokenizer
from llmquant.errors import FormatError, OutputError, RecipeError
from llmquant.packed import describe, open_model
from llmquant.stream import Stream
from tests.conftest import VOCABULARY
from tests.test_gguf_families import CONFIGS
from tests.test_gguf_vocabulary import byte_level, split

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "mxfp4")


def typed(**mixture):
    return recipe.Recipe(name="x", mixture=mixture, formats=["gguf"])


def resized(config):
    """Return a configuration with room for the tests' tokenizer."""
    config.vocab_size = VOCABULARY + 16
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, None
    return config


@pytest.mark.filterwarnings("ignore")  # transformers' own about tiny configurations
@pytest.mark.parametrize("name", CONFIGS)
def test_a_float_file_of_every_family_reads_back_as_the_same_model(name, save_model, tmp_path):
    model = save_model(tmp_path / "model", resized(CONFIGS[name]()))
    run.quantize(model, typed(name="f32"), tmp_path / "out")
    tokens = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(0))
    logits = []
    for path in (model, tmp_path / "out"):
        stream = Stream(open_model(path), torch.device("cpu"))
        (hidden,) = stream.hidden(tokens)
        logits.append(stream.finish(tokens, hidden))
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    text = "The file's own tokenizer, 123 <s>"
    assert open_model(tmp_path / "out").tokenizer()(text)["input_ids"] == load_tokenizer(model)(text)["input_ids"]


@pytest.mark.filterwarnings("ignore")
def test_square_matrices_that_are_stored_by_columns_are_turned_for_llama_cpp(save_model, tmp_path):
    model = save_model(tmp_path / "model", resized(CONFIGS["gpt2"]()))
    run.quantize(model, typed(name="f32"), tmp_path / "out")
    tokens = torch.randint(0, VOCABULARY, (24,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = hf.AutoModelForCausalLM.from_pretrained(model)(tokens[None]).logits[0]
    found = CppModel(next((tmp_path / "out").glob("*.gguf")), 24, exact=True).logits(tokens)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


@pytest.fixture(scope="module")
def windows(texts):
    return evaluation.read_windows(demo.MODEL, texts / "evaluation.txt", "llama.cpp", 3 * 512)


@pytest.mark.parametrize("type_", TYPES)
def test_llama_cpp_and_our_decoding_have_one_perplexity(type_, windows, tmp_path):
    run.quantize(demo.MODEL, recipe.Recipe(name="x", grid={"name": type_}, formats=["gguf"]), tmp_path / "out")
    assert {
        t.type for n, t in gguf_file.read(next((tmp_path / "out").glob("*.gguf"))).tensors.items() if "ffn_up" in n
    } == {type_}
    decoded = evaluation.evaluate(tmp_path / "out", windows)
    runs = evaluation.evaluate(tmp_path / "out", windows, runtime="llama.cpp")
    # llama.cpp rounds activations to 8 bits too
    assert runs.perplexity == pytest.approx(decoded.perplexity, rel=0.005)


@pytest.mark.parametrize(("threads", "piece"), [(3, 20_000), (40, 2_000)])  # at last more threads than rows
def test_threads_and_pieces_do_not_change_the_bytes(threads, piece, llama, tmp_path, monkeypatch):
    def written(folder):
        run.quantize(llama, recipe.Recipe(name="x", grid={"name": "q4_0"}, formats=["gguf"]), folder)
        (path,) = folder.glob("*.gguf")
        return path.read_bytes()

    whole = written(tmp_path / "whole")
    monkeypatch.setattr(planning, "PIECE", piece)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    assert written(tmp_path / "pieces") == whole


def test_torch_has_its_threads_back_when_a_file_cannot_be_written(llama, tmp_path, monkeypatch):
    def full(self):
        if torch.get_num_threads() == 1:  # while matrices are quantized side by side
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.Digest, "catch_up", full)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(OutputError, match="No space left") as error:
            run.quantize(llama, recipe.Recipe(name="x", grid={"name": "q4_0"}, formats=["gguf"]), tmp_path / "out")
        assert error.value.__context__.__traceback__  # it still holds every frame that it passed through
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_mixture_gives_the_types_of_the_plan(tmp_path):
    planned = api.plan(demo.MODEL, "gguf-q4_k_m")
    api.quantize(demo.MODEL, "gguf-q4_k_m", tmp_path / "out", evaluate=False)
    (path,) = (tmp_path / "out").glob("*.gguf")
    assert path.name == "model-5.5M-Q4_K_M.gguf"
    found = gguf_file.read(path)
    types = {n: t.type for n, t in found.tensors.items()}
    assert types["token_embd.weight"] == types["blk.2.ffn_down.weight"] == types["blk.5.attn_v.weight"] == "q6_k"
    assert types["blk.0.attn_q.weight"] == types["blk.1.ffn_up.weight"] == "q4_k"
    assert types["blk.0.attn_norm.weight"] == types["output_norm.weight"] == "f32"
    assert found.metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert planned.sizes["gguf"] == sum(t.bytes for t in found.tensors.values())
    assert describe(tmp_path / "out")["metadata"] == found.metadata


def test_types_may_be_set_one_by_one(tmp_path):
    changes = [
        "mixture.output=q8_0",
        "mixture.overrides={attn_q: q5_1, 'blk.[01].ffn_up': q8_0}",
        "rules=[{match: '*.3.mlp.up_proj', keep: true}]",
    ]
    api.quantize(demo.MODEL, "gguf-q3_k_m", tmp_path / "out", changes=changes, evaluate=False)
    (path,) = (tmp_path / "out").glob("*.gguf")
    types = {n: t.type for n, t in gguf_file.read(path).tensors.items()}
    assert types["token_embd.weight"] == "q8_0"
    assert types["blk.4.attn_q.weight"] == "q5_1"
    assert (types["blk.1.ffn_up.weight"], types["blk.2.ffn_up.weight"]) == ("q8_0", "q3_k")
    assert types["blk.3.ffn_up.weight"] == "f16"


def test_a_shape_that_no_block_divides_is_listed_before_any_work(save_model, tmp_path):
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=96, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4
    )
    model = save_model(tmp_path / "model", config)
    notes = api.plan(model, "gguf-q4_k_m").notes
    assert any("self_attn.q_proj: q5_0 for q4_k, whose blocks of 256 do not divide 96 columns" in n for n in notes)
    assert any("mlp.down_proj: f16 for q" in n and "172 columns" in n for n in notes)
    report, _ = run.quantize(model, recipe.load("gguf-q4_k_m"), tmp_path / "out")
    assert report.notes == notes
    assert open_model(tmp_path / "out").read("model.layers.0.mlp.down_proj.weight").shape == (96, 172)


def test_shards_are_written_and_read_as_one_model(tmp_path, windows):
    run.quantize(demo.MODEL, recipe.load("gguf-q4_0"), tmp_path / "whole")
    run.quantize(demo.MODEL, recipe.load("gguf-q4_0", ["max_shard_size=1MB"]), tmp_path / "shards")
    files = sorted(p.name for p in (tmp_path / "shards").glob("*.gguf"))
    assert files[0].endswith(f"-00001-of-{len(files):05}.gguf")
    assert len(files) >= 3
    (path,) = (tmp_path / "whole").glob("*.gguf")
    one, many = gguf_file.read(path), gguf_file.read(tmp_path / "shards" / files[0])
    assert {n: t.read().numpy().tobytes() for n, t in one.tensors.items()} == {
        n: t.read().numpy().tobytes() for n, t in many.tensors.items()
    }
    runs = [evaluation.evaluate(tmp_path / p, windows, runtime="llama.cpp").perplexity for p in ("whole", "shards")]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("123", 123), ("none", 0)])
def test_the_size_of_a_shard_is_read_with_its_unit(text, size):
    assert recipe.load("gguf-q4_0", [f"max_shard_size={text}"]).shard_bytes == size
    with pytest.raises(RecipeError, match="is not a size such as 5GB"):
        recipe.load("gguf-q4_0", ["max_shard_size=5 apples"])


def test_gptq_on_a_mixture_diverges_less_than_rounding(texts, windows, tmp_path):
    text = [f"calibration.path={texts / 'calibration.txt'}", "calibration.sequences=16", "calibration.length=256"]
    reference = evaluation.Reference(demo.MODEL)
    divergence = {}
    for name, changes in (("gguf-q3_k_m", []), ("gptq-q3_k_m", text)):
        run.quantize(demo.MODEL, recipe.load(name, changes), tmp_path / name)
        divergence[name] = evaluation.evaluate(tmp_path / name, windows, reference).kld_mean
    assert divergence["gptq-q3_k_m"] < 0.8 * divergence["gguf-q3_k_m"]


def test_an_embedding_rounded_by_its_information_diverges_less(texts, windows, tmp_path):
    reference = evaluation.Reference(demo.MODEL)
    changes = [
        f"calibration={{path: {texts / 'calibration.txt'}, sequences: 16, length: 256}}",
        "tied_embeddings=untie",
        "transforms=[]",
        "mismatch_correction=false",
    ]
    divergence = []
    for algorithm in ("rtn", "gptq"):
        rules = "[{match: '*.layers.*', keep: true}, {match: lm_head, keep: true}]"
        chosen = recipe.load("gptq-q3_k_m", [*changes, f"rules={rules}", f"algorithm={{name: {algorithm}}}"])
        run.quantize(demo.MODEL, chosen, tmp_path / algorithm)
        divergence.append(evaluation.evaluate(tmp_path / algorithm, windows, reference).kld_mean)
    assert divergence[1] < 0.7 * divergence[0]


def test_an_imatrix_that_was_written_is_importance_again(texts, windows, tmp_path):
    path = api.imatrix(demo.MODEL, texts / "calibration.txt", tmp_path / "im.gguf", sequences=16, length=256)
    known = imatrix.read(path)
    assert len(known.entries) == 6 * 7
    assert (known.chunk_count, known.chunk_size) == (16, 256)
    reference = evaluation.Reference(demo.MODEL)
    divergence = []
    for i, changes in enumerate(([], [f"imatrix={path}"])):
        run.quantize(demo.MODEL, recipe.load("gguf-q3_k_s", changes), tmp_path / str(i))
        divergence.append(evaluation.evaluate(tmp_path / str(i), windows, reference).kld_mean)
    assert divergence[1] < divergence[0]
    metadata = describe(tmp_path / "1")["metadata"]
    assert metadata["quantize.imatrix.entries_count"] == 42
    assert metadata["quantize.imatrix.dataset"] == "calibration.txt"
    changes = [f"imatrix={path}", "transforms=[]", "mismatch_correction=false"]
    for less, why in ((0, "transforms need text"), (1, "is corrected on text"), (2, "algorithm needs more")):
        with pytest.raises(RecipeError, match=why):
            api.plan(demo.MODEL, "gptq-q4_k_m", changes=changes[: less + 1])


def test_a_work_folder_of_an_imatrix_with_other_content_is_refused(tmp_path):
    def write(value):
        sums = torch.full((1, 256), float(value))
        entry = imatrix.Entry(sums, torch.ones(1, dtype=torch.int64))
        imatrix.write(path, imatrix.Imatrix({"blk.0.attn_q.weight": entry}, ("a text",), 1, 512))

    path = tmp_path / "im.gguf"
    chosen = recipe.load("gguf-q4_0", [f"imatrix={path}"])
    write(1)
    run.quantize(demo.MODEL, chosen, tmp_path / "a", tmp_path / "work")
    run.quantize(demo.MODEL, chosen, tmp_path / "b", tmp_path / "work")
    write(2)
    with pytest.raises(OutputError, match=r"was begun with imatrix = '[0-9a-f]{64}', and now it is '"):
        run.quantize(demo.MODEL, chosen, tmp_path / "c", tmp_path / "work")


def test_a_tokenizer_that_has_no_place_in_the_file_is_refused_before_calibration(save_model, texts, tmp_path):
    config = resized(CONFIGS["llama 3"]())
    config.vocab_size = 1000
    model = save_model(tmp_path / "model", config)
    hf.PreTrainedTokenizerFast(tokenizer_object=byte_level(split(r"\d"))).save_pretrained(model)
    text = [f"calibration.path={texts / 'calibration.txt'}", "calibration.sequences=4", "calibration.length=64"]
    done = []
    with pytest.raises(FormatError, match="none of those known here is this tokenizer's"):
        run.quantize(model, recipe.load("gptq-q4_k_m", text), tmp_path / "out", progress=lambda *x: done.append(x))
    assert not done


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("gguf-q4_k_m", ["mixture.name=q4_k_n"], RecipeError, r"'q4_k_n' is not a mixture .* Did you mean 'Q4_K_S'"),
        ("gguf-q4_k_m", ["mixture.output=q7_0"], RecipeError, "'q7_0' is not a GGUF type"),
        ("gguf-q4_k_m", ["formats=[gptq]"], FormatError, "a gptq file has no mixtures"),
        ("rtn-w4g128", ["formats=[gguf]"], FormatError, "a gguf file has no type for the grid Affine"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(name, changes, error, message):
    with pytest.raises(error, match=message):
        api.plan(demo.MODEL, name, changes=changes)


def test_the_hashes_of_a_report_are_those_of_the_written_shards(llama, tmp_path):
    chosen = recipe.Recipe(name="x", grid={"name": "q4_0"}, formats=["gguf"], max_shard_size="50KB")
    report, _ = run.quantize(llama, chosen, tmp_path / "out")
    files = sorted((tmp_path / "out").iterdir())
    assert len(files) > 3
    assert report.hashes["gguf"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
