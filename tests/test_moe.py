"""Mixtures of experts from the model folder to the files; judges are transformers' own model, llama.cpp and algebra."""

import copy
import itertools
import shutil
import weakref

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from llmquant import api, evaluation, experts, gguf_file, imatrix, recipe, run, work
from llmquant.checkpoint import Checkpoint
from llmquant.cpp_runtime import CppModel
from llmquant.errors import CalibrationError, FormatError
from llmquant.experts import Reader, Routed
from llmquant.mismatch import corrected
from llmquant.models import moe
from llmquant.packed import open_model
from llmquant.rotation import Rotated
from llmquant.stats import Accumulator
from llmquant.stream import Stream
from tests.conftest import VOCABULARY
from tests.test_models import build, tokens
from tests.test_rotation import expected, stream_of
from tests.test_rotation import logits as rotated_logits

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
}
SMALL = BASE | {"num_experts": 4, "moe_intermediate_size": 64, "intermediate_size": 96}
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**BASE, intermediate_size=128, num_local_experts=4),
    "qwen2-moe": lambda: hf.Qwen2MoeConfig(**SMALL, shared_expert_intermediate_size=96),
    "qwen3-moe": lambda: hf.Qwen3MoeConfig(**SMALL, head_dim=16, norm_topk_prob=True),
    "qwen3-moe-mixed": lambda: hf.Qwen3MoeConfig(**SMALL, head_dim=16, mlp_only_layers=[0]),
}
LONELY = "model.layers.1.mlp.experts.2"
"""An expert of all these models that no token is routed to."""


@pytest.fixture(scope="session")
def saved(save_model, tmp_path_factory):
    """Return a function that writes one of the models, once, with one expert that no token is routed to."""
    folder = tmp_path_factory.mktemp("moe")

    def save(key):
        if not (folder / key).exists():
            save_model(folder / key, CONFIGS[key]())
            model = hf.AutoModelForCausalLM.from_pretrained(folder / key)
            # a channel of the residual stream is the same for all tokens, and the lonely expert's router is against it
            model.model.embed_tokens.weight.data[:, 0] = 0.5
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.data[0] = 0
            for name, parameter in model.model.layers[0].named_parameters():
                if "down_proj" in name:
                    parameter.data[..., 0, :] = 0
            model.model.layers[1].mlp.gate.weight.data[:, 0] = 0
            model.model.layers[1].mlp.gate.weight.data[2, 0] = -5
            model.save_pretrained(folder / key)
        return folder / key

    return save


def quantize(model, texts, out, name, *changes):
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 8, length: 128}}"
    return api.quantize(model, name, out, changes=[text, *changes], evaluate=False)


def logits(folder, x):
    stream = Stream(open_model(folder), torch.device("cpu"))
    return torch.cat([stream.finish(x, h) for h in stream.hidden(x)])


def of_transformers(folder, x, **options):
    with torch.no_grad():
        return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)(x).logits


@pytest.mark.parametrize("key", CONFIGS)
def test_the_stream_gives_the_logits_of_transformers_fused_experts(key, saved):
    x = torch.arange(5, 60)[None]
    torch.testing.assert_close(logits(saved(key), x), of_transformers(saved(key), x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_gptq_beats_rounding_to_nearest(key, saved, texts, tmp_path):
    windows = evaluation.read_windows(saved(key), texts / "evaluation.txt", "llama.cpp", 2048)
    reference = evaluation.Reference(saved(key))
    found = {}
    for algorithm in ("rtn", "gptq"):
        grid = ("grid.group_size=32", "grid.bits=3", "formats=[compressed_tensors]")
        quantize(saved(key), texts, tmp_path / algorithm, f"{algorithm}-w4g128", *grid)
        found[algorithm] = evaluation.evaluate(tmp_path / algorithm, windows, reference).kld_mean
    assert found["gptq"] < 0.75 * found["rtn"]


@pytest.mark.parametrize("key", ["mixtral", "qwen2-moe", "qwen3-moe"])
def test_an_expert_without_tokens_is_rounded_sanely_and_listed(key, saved, texts, tmp_path):
    options = ("grid.group_size=32", "algorithm.actorder=false", "formats=[compressed_tensors]")
    report = quantize(saved(key), texts, tmp_path / "out", "gptq-plain-w4g128", *options)
    for part in ("gate_proj", "up_proj", "down_proj"):
        told = report.linears[f"{LONELY}.{part}"]
        assert (told["tokens"], told["prior"]) == (0, 1)
        # no worse, in what it would give to all tokens, than those that were given some
        others = [r["error"] for n, r in report.linears.items() if n.endswith(part) and "experts" in n]
        assert 0 < told["error"] < 2 * sorted(others)[len(others) // 2]
    listed = [note for note in report.notes if note.startswith("model.layers.1.mlp.experts: no token")]
    assert len(listed) == 1
    assert listed[0].endswith("1 of 4 experts, which were rounded as if all were: 2")
    shared = sum(
        r["tokens"]
        for n, r in report.linears.items()
        if n.startswith("model.layers.1.mlp.experts.") and n.endswith("up_proj")
    )
    assert shared == 2 * 8 * 128  # two experts a token


@pytest.mark.parametrize(
    ("key", "name"),
    [("mixtral", "gguf-q8_0"), ("qwen2-moe", "gguf-q4_k_m"), ("qwen3-moe", "gguf-q8_0"), ("qwen3-moe", "gptq-q4_k_m")],
)
def test_llama_cpp_computes_our_decoded_weights(key, name, saved, texts, tmp_path):
    quantize(saved(key), texts, tmp_path / "out", name, "fallback=substitute")
    x = torch.arange(5, 69)[None]
    (path,) = (tmp_path / "out").glob("*.gguf")
    wanted, found = logits(path, x)[0], CppModel(path, 64, exact=True).logits(x[0])
    # it rounds activations to 8 bits, which now and then sends a token to another expert
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.median() < 0.02
    float_ = (logits(saved(key), x)[0] - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert errors.median() < float_.median() or name == "gguf-q8_0"


def test_a_gguf_file_holds_the_experts_as_one_tensor_and_gives_each_back(saved, texts, tmp_path):
    quantize(saved("mixtral"), texts, tmp_path / "out", "gguf-q8_0")
    (path,) = (tmp_path / "out").glob("*.gguf")
    file = gguf_file.read(path)
    assert file.tensors["blk.1.ffn_down_exps.weight"].shape == (4, 64, 128)
    assert file.tensors["blk.1.ffn_gate_inp.weight"].type == "f32"
    assert (file.metadata["llama.expert_count"], file.metadata["llama.expert_used_count"]) == (4, 2)
    decoded, plain = open_model(path), open_model(saved("mixtral"))
    for expert, part in itertools.product(range(4), ("gate_proj", "up_proj", "down_proj")):
        name = f"model.layers.1.mlp.experts.{expert}.{part}.weight"
        torch.testing.assert_close(decoded.read(name), plain.read(name), rtol=0, atol=3e-3)
        assert torch.equal(decoded.read(name)[3:7], decoded.read(name, (3, 7)))


def test_experts_of_one_layer_have_one_type_in_a_gguf_file(saved):
    chosen = recipe.load("gguf-q8_0", ['rules=[{match: "*.1.mlp.experts.3.up_proj", grid: {name: q4_0}}]'])
    with pytest.raises(
        FormatError, match=r"experts\.3\.up_proj: its grid is q4_0, that of .*experts\.0\.up_proj is q8_0"
    ):
        run.make_plan(saved("mixtral"), chosen)
    chosen = recipe.load("gguf-q8_0", ['rules=[{match: "*.1.mlp.experts.3.up_proj", keep: true}]'])
    with pytest.raises(FormatError, match=r"its grid is float"):
        run.make_plan(saved("mixtral"), chosen)
    chosen = recipe.load("gguf-q8_0", ['rules=[{match: "*.1.mlp.experts.*.up_proj", grid: {name: q4_0}}]'])
    plan = run.make_plan(saved("mixtral"), chosen)
    assert plan.quantized["model.layers.1.mlp.experts.3.up_proj"].grid.name == "q4_0"


def test_an_imatrix_counts_the_tokens_of_every_expert(saved, texts, tmp_path):
    path = api.imatrix(saved("qwen2-moe"), texts / "calibration.txt", tmp_path / "im.gguf", sequences=8, length=128)
    known = imatrix.read(path)
    for name in ("blk.1.ffn_gate_exps.weight", "blk.1.ffn_down_exps.weight"):
        counts = known.entries[name].counts
        assert counts[2] == 0
        assert counts.sum() == 2 * 8 * 128
        assert known.entries[name].sums[2].abs().max() == 0
    gate, up = known.entries["blk.0.ffn_gate_exps.weight"], known.entries["blk.0.ffn_up_exps.weight"]
    assert torch.equal(gate.sums, up.sums)
    everything = known.entries["blk.0.ffn_gate_shexp.weight"]
    torch.testing.assert_close(gate.sums.sum(0), 2 * everything.sums[0], rtol=1e-4, atol=0)
    chosen = recipe.load("gguf-q4_k_m", [f"imatrix={path}", "fallback=substitute"])
    report, _ = run.quantize(saved("qwen2-moe"), chosen, tmp_path / "out")
    assert LONELY + ".down_proj" in report.linears


@pytest.mark.parametrize("key", ["mixtral", "qwen2-moe", "qwen3-moe"])
@pytest.mark.filterwarnings("ignore")
def test_transformers_computes_a_compressed_tensors_folder(key, saved, texts, tmp_path, read_json):
    options = ("grid.group_size=32", "grid.scale_dtype=float32", "formats=[compressed_tensors]")
    quantize(saved(key), texts, tmp_path / "out", "rtn-w4g128", *options)
    ignored = read_json(tmp_path / "out" / "config.json")["quantization_config"]["ignore"]
    assert any("mlp\\.gate$" in name for name in ignored)
    assert key != "qwen2-moe" or any("shared_expert_gate" in name for name in ignored)
    x = torch.arange(5, 60)[None]
    torch.testing.assert_close(of_transformers(tmp_path / "out", x), logits(tmp_path / "out", x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("key", ["mixtral", "qwen2-moe"])
def test_a_folder_that_holds_fused_experts_is_read_like_any_other(key, saved, tmp_path):
    model = hf.AutoModelForCausalLM.from_pretrained(saved(key))
    model.save_pretrained(tmp_path, save_original_format=False)
    fused, plain = open_model(tmp_path), open_model(saved(key))
    assert "model.layers.0.mlp.experts.gate_up_proj" in {info.stored for info in fused.infos.values()}
    assert fused.infos.keys() == plain.infos.keys()
    for name, info in plain.infos.items():
        assert fused.infos[name].shape == info.shape
        assert torch.equal(fused.read(name), plain.read(name))
        assert len(info.shape) == 1 or torch.equal(fused.read(name, (3, 9)), plain.read(name, (3, 9)))


@pytest.mark.parametrize("name", ["rtn-w4g128", "gptq-plain-w4g128"])
def test_one_expert_cannot_be_left_float(name, saved, texts, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(saved("qwen2-moe"), model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.experts.1.up_proj.weight"][0, 0] = 9e5  # its scale is more than float16 holds
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 8, length: 128}}"
    changes = [text, "grid.group_size=32", "grid.scale_dtype=float16"]
    told = r"^model\.layers\.1\.mlp\.experts\.1\.up_proj\.weight: (?!model).* keep all"
    with pytest.raises(CalibrationError, match=told):
        api.quantize(model, name, tmp_path / "out", changes=changes, evaluate=False, on_error="skip")
    assert not (tmp_path / "out").exists()


def test_a_plan_knows_what_the_work_folder_holds_of_experts(saved, texts, tmp_path, monkeypatch):
    sizes = []

    def drop(log, index):
        sizes.append(sum(path.stat().st_size for path in log.folder.glob("fisher-*")))
        dropped(log, index)

    dropped = work.Work.drop_information
    monkeypatch.setattr(work.Work, "drop_information", drop)
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 8, length: 128}}"
    changes = [text, "grid.group_size=32", "algorithm.two_sided=true"]
    quantize(saved("qwen2-moe"), texts, tmp_path / "out", "gptq-plain-w4g128", *changes)
    planned = api.plan(saved("qwen2-moe"), "gptq-plain-w4g128", changes=changes)
    assert max(sizes) == pytest.approx(planned.scratch_bytes, rel=0.05)


def test_names_in_a_written_folder_are_those_of_the_checkpoint(saved, texts, tmp_path, read_json):
    changes = ["grid.group_size=32", "rules=[{match: '*.experts.*.down_proj', grid: {bits: 8}}]"]
    quantize(saved("mixtral"), texts, tmp_path / "out", "rtn-w4g128", *changes, "formats=[compressed_tensors]")
    settings = read_json(tmp_path / "out" / "config.json")["quantization_config"]
    targets = [target for group in settings["config_groups"].values() for target in group["targets"]]
    for pattern in (r"block_sparse_moe\.experts\.\d+\.w2$", r"mlp\.experts\.\d+\.down_proj$"):
        assert any(target.endswith(pattern) for target in targets)
    assert any(name.endswith(r"block_sparse_moe\.gate$") for name in settings["ignore"])
    linear = open_model(tmp_path / "out").read("model.layers.1.mlp.experts.3.down_proj.weight")
    plain = open_model(saved("mixtral")).read("model.layers.1.mlp.experts.3.down_proj.weight")
    assert (linear - plain).abs().max() < 2e-3  # 8 bits
    names = set(Checkpoint(tmp_path / "out").infos)
    assert "model.layers.0.block_sparse_moe.experts.1.w2.weight_packed" in names
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


@pytest.mark.parametrize(
    ("key", "name", "changes"),
    [
        ("mixtral", "awq-gptq-w4g128", ["grid.group_size=32"]),
        (
            "qwen3-moe-mixed",
            "gptq-plain-w4g128",
            ["grid.group_size=32", "true_sequential=false", "mismatch_correction=true"],
        ),
        ("qwen2-moe", "best-w4g128", ["grid.group_size=32", "learned_rounding.steps=2"]),
        ("qwen2-moe", "w8a8-smoothquant", []),
        ("mixtral", "w8a8-static", []),
        ("qwen3-moe-mixed", "gptq-plain-w4g128", ["grid.group_size=32", "rotations=[residual, heads]"]),
    ],
    ids=["awq and mismatch", "one pass for all sites", "everything", "smoothquant", "static", "rotated"],
)
def test_every_method_leaves_a_model_like_the_float_one(key, name, changes, saved, texts, tmp_path):
    quantize(saved(key), texts, tmp_path / "out", name, *changes, "formats=[compressed_tensors]")
    x = torch.randint(5, VOCABULARY, (1, 100), generator=torch.Generator().manual_seed(0))
    wanted, found = of_transformers(saved(key), x)[0], logits(tmp_path / "out", x)[0]
    assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median() < 0.15


def test_a_killed_run_goes_on_to_the_same_bytes(saved, texts, tmp_path):
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 8, length: 128}}"
    chosen = recipe.load("awq-gptq-w4g128", [text, "grid.group_size=32"])
    whole, _ = run.quantize(saved("qwen2-moe"), chosen, tmp_path / "whole")

    def die(step, done, total):
        if step == "quantizing layers" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.quantize(saved("qwen2-moe"), chosen, tmp_path / "out", progress=die)
    again, _ = run.quantize(saved("qwen2-moe"), chosen, tmp_path / "out")
    assert again.resumed_layers == 1
    (hashes,), (others,) = whole.hashes.values(), again.hashes.values()
    assert hashes["model.safetensors"] == others["model.safetensors"]


def test_a_sensitivity_takes_all_experts_of_a_layer_together(saved, texts, tmp_path):
    text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 4, length: 128}}"
    chosen = recipe.load("gptq-q4_k_m", [text, "fallback=substitute", "transforms=[]", "mismatch_correction=false"])
    found = api.sensitivity(
        saved("qwen3-moe"), chosen, tmp_path / "s", text=texts / "evaluation.txt", max_tokens=512, by="site"
    )
    units = {unit.name: unit for unit in found.units}
    assert len(units["model.layers.1.mlp.experts.*.in"].linears) == 8
    assert len(units["model.layers.1.mlp.experts.*.out"].linears) == 4
    assert all(result.kld > 0 for result in found.results)


@pytest.mark.parametrize("key", ["mixtral", "qwen2-moe", "qwen2-moe-mixed", "qwen3-moe", "qwen3-moe-mixed"])
def test_rotating_leaves_the_function_unchanged_routers_included(key, tmp_path):
    model = build(key)[0]
    fresh = hf.AutoModelForCausalLM.from_config(model.config)
    state = {n: p.float() + (p.ndim == 1) for n, p in model.state_dict().items()}
    for index, layer in enumerate(fresh.model.layers):
        if hasattr(layer.mlp, "experts"):
            at = f"model.layers.{index}.mlp.experts."
            of = [[state.pop(f"{at}{i}.{part}_proj.weight") for part in ("gate", "up", "down")] for i in range(4)]
            state[f"{at}gate_up_proj"] = torch.stack([torch.cat(three[:2]) for three in of])
            state[f"{at}down_proj"] = torch.stack([three[2] for three in of])
    fresh.load_state_dict(state)
    fresh.save_pretrained(tmp_path)
    x = tokens(1)
    right = expected(tmp_path, x)
    rotated = Rotated(stream_of(tmp_path), ("residual", "heads"), untie=True)
    assert (rotated_logits(rotated, x) - right).abs().max() < 5e-4 * right.abs().max()
    router = "model.layers.1.mlp.gate.weight"
    assert (rotated.read(router) - open_model(tmp_path).read(router)).abs().max() > 0.1


# what an expert's statistics are


def reader(layer, x, chosen, aimed=()):
    routed = Routed()
    for i, (batch, numbers) in enumerate(zip(x, chosen, strict=True)):
        routed.add(batch, numbers, aimed[i] if i < len(aimed) else None)

    def sums(site):
        cols = layer.get_submodule(site.linears[0]).weight.shape[1]
        return Accumulator(cols, "hessian", drift=bool(aimed))

    return Reader(layer, routed, sums, (lambda site: moe.before(layer, site)) if aimed else None)


def draw(seed, count=3, size=40):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 32, generator=generator) for _ in range(count)]


@pytest.fixture
def experts_layer():
    """A layer, and the sites of its experts."""
    model, spec = build("qwen3-moe")
    return copy.deepcopy(model.model.layers[1]).float(), [site for site in spec.sites_of(1) if site.expert]


@torch.no_grad()
def test_without_tokens_the_statistics_are_those_of_all_tokens(experts_layer):
    layer, sites = experts_layer
    x = draw(0)
    chosen = [torch.zeros(len(batch), 1, dtype=torch.int64) for batch in x]  # all to the first
    known = reader(layer, x, chosen)
    everything = torch.cat(x)
    for site in sites[2:4]:  # of the second
        read = everything
        if moe.reads_inner(site):
            expert = layer.get_submodule(site.expert)
            read = expert.act(everything @ expert.gate_proj.weight.T) * (everything @ expert.up_proj.weight.T)
        stats, told = known.stats(site)
        torch.testing.assert_close(stats.hessian, read.T @ read / len(read), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.abs_mean, read.abs().mean(0))
        assert told == {"tokens": 0, "prior": 1}
        assert stats.tokens == len(everything)


@torch.no_grad()
def test_the_prior_counts_as_so_many_tokens_as_a_share_of_the_columns(experts_layer):
    layer, sites = experts_layer
    x = draw(1)
    chosen = [torch.randint(0, 4, (len(batch), 1), generator=torch.Generator().manual_seed(2)) for batch in x]
    known = reader(layer, x, chosen)
    everything, numbers = torch.cat(x), torch.cat(chosen)[:, 0]
    for number in range(4):
        mine = everything[numbers == number]
        pseudo = experts.PRIOR * 32
        wanted = (mine.T @ mine + pseudo * everything.T @ everything / len(everything)) / (len(mine) + pseudo)
        stats, told = known.stats(sites[2 * number])
        torch.testing.assert_close(stats.hessian, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.square_mean, wanted.diagonal(), rtol=1e-4, atol=1e-5)
        assert told["tokens"] == len(mine)
        assert len(mine) <= stats.tokens <= len(everything)


def test_with_very_many_tokens_there_is_no_prior():
    assert experts.prior_share(0, 64) == 1
    assert experts.prior_share(10**6, 64) == 0
    shares = [experts.prior_share(n, 64) for n in range(0, 2000, 50)]
    assert shares == sorted(shares, reverse=True)


@torch.no_grad()
def test_a_mismatch_is_that_of_the_same_tokens(experts_layer):
    """The float model's tokens follow the quantized model's routes."""
    layer, sites = experts_layer
    x, noise = draw(3, size=400), draw(4, size=400)
    aimed = [a + 0.1 * b @ torch.ones(32, 32) / 32 + 0.2 * a.roll(1, 1) for a, b in zip(x, noise, strict=True)]
    chosen = [torch.randint(0, 4, (len(batch), 1), generator=torch.Generator().manual_seed(5)) for batch in x]
    stats, _ = reader(layer, x, chosen, aimed[:2]).stats(sites[0])
    w = torch.randn(8, 32, generator=torch.Generator().manual_seed(6))
    ((target, share),) = corrected([w], stats)
    mine = torch.cat(chosen)[:, 0] == 0
    read, meant = torch.cat(x)[mine], torch.cat(aimed)[mine]
    before, after = ((read @ q.T - meant @ w.T).square().mean() for q in (w, target))
    assert share > 0.8
    assert after < 0.3 * before


def test_the_hessians_of_all_experts_never_exist_together(save_model, texts, tmp_path, monkeypatch):
    alive, most = [], {}
    result = Accumulator.result

    def counted(self):
        stats = result(self)
        alive.append(weakref.ref(stats.hessian))
        most[experts_now] = max(most.get(experts_now, 0), sum(hessian() is not None for hessian in alive))
        return stats

    monkeypatch.setattr(Accumulator, "result", counted)
    for experts_now in (3, 12):
        config = hf.MixtralConfig(
            **BASE | {"num_hidden_layers": 1}, intermediate_size=64, num_local_experts=experts_now
        )
        model = save_model(tmp_path / f"float-{experts_now}", config)
        text = f"calibration={{path: {texts / 'calibration.txt'}, sequences: 2, length: 64}}"
        chosen = recipe.load("gptq-plain-w4g128", [text, "grid.group_size=32", "formats=[compressed_tensors]"])
        run.quantize(model, chosen, tmp_path / f"out-{experts_now}")
    assert most[12] == most[3] <= 4
