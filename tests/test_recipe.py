import importlib
from pathlib import Path
from string import Template

import pytest

from llmquant import plugins, recipe, shipped
from llmquant.errors import RecipeError
from llmquant.recipe import Recipe, matches

BASE = """
grid: {name: affine, bits: 4, group_size: 64}
algorithm: {name: gptq, dampening_frac: 0.05}
rules:
  - {match: "*.0.mlp.down_proj", grid: {bits: 8}}
  - {match: ["*.down_proj", "re:.*layers\\\\.[01]\\\\..*"], algorithm: {name: rtn}}
  - {match: "*.q_proj", keep: true}
calibration: {path: text.txt, sequences: 4}
"""


@pytest.fixture
def load(tmp_path):
    def load(text=BASE, changes=()):
        path = tmp_path / "mine.yaml"
        path.write_text(text, "utf-8")
        return recipe.load(path, list(changes))

    return load


@pytest.mark.parametrize("name", shipped.recipes())
def test_every_shipped_recipe_loads_and_explains_itself(name):
    loaded = recipe.load(name)
    assert loaded.name == name
    assert loaded.description
    type_ = "q4_k" if loaded.mixture else None
    assert loaded.choose("model.layers.0.mlp.up_proj", type_) is not None
    assert (loaded.choose("lm_head", type_, head=True) is None) == (loaded.mixture is None)


@pytest.mark.parametrize("name", [*shipped.recipes(), "mine"])
def test_a_dumped_recipe_reads_back_the_same(load, name):
    loaded = load() if name == "mine" else recipe.load(name)
    again = load(recipe.dump(loaded))
    assert again == loaded
    assert again.choices == loaded.choices


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("algoritm.name=rtn", "algoritm: unknown key. Did you mean 'algorithm'?"),
        ("grid.bit=3", "grid.bit: unknown key. Did you mean 'bits'?"),
        ("algorithm.actoder=true", "algorithm.actoder: unknown key. Did you mean 'actorder'?"),
        ("rules.0.grid.groupsize=32", "rules.0.grid.groupsize: unknown key. Did you mean 'group_size'?"),
        ("rules.1.algorithm.calibratd=true", "rules.1.algorithm.calibratd: unknown key. Did you mean 'calibrated'?"),
        ("rules.2.kep=true", "rules.2.kep: unknown key. Did you mean 'keep'?"),
        ("calibration.lenght=64", "calibration.lenght: unknown key. Did you mean 'length'?"),
        ("grid.xyz=1", "grid.xyz: unknown key. Known: bits, group_size,"),
        ("grid.name=gptq", "grid.name: no grid is called 'gptq'"),
        ("grid.name=os.path", "grid.name: no grid is called 'os.path'"),
        ("rules.0.grid={name: os.path}", "rules.0.grid.name: no grid is called 'os.path'"),
        ("algorithm.name=llmquant.algorithms.gptq", "algorithm.name: no algorithm is called"),
        ("formats=[compresed_tensors]", "formats.0: no exporter is called 'compresed_tensors'. Did you mean"),
        ("formats=[gptq, os.path]", "formats.1: no exporter is called 'os.path'"),
    ],
)
def test_what_is_unknown_is_named_with_its_place_and_the_nearest_key(load, change, said):
    with pytest.raises(RecipeError) as error:
        load(changes=[change])
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("grid.bits=four", "grid.bits: "),
        ("grid.bits=4.5", "grid.bits: "),
        ("grid.bits=9", "grid: bits is 9, not 2 to 8"),
        ("rules.0.grid.bits=0", "rules.0.grid: bits is 0, not 2 to 8"),
        ("grid.strategy=block", "grid.strategy: "),
        ("grid=affine", "grid: "),
        ("grid={bits: 4}", "grid: needs a `name`"),
        ("algorithm.actorder=perhaps", "algorithm.actorder: "),
        ("algorithm.dampening_frac=2", "algorithm: dampening_frac is 2"),
        ("rules={}", "rules: "),
        ("rules.2.keep=perhaps", "rules.2.keep: "),
        ("rules.0={keep: true}", "rules.0.match: "),
        ("calibration.sequences=0", "calibration.sequences: "),
        ("calibration.packing=tight", "calibration.packing: "),
        ("fallback=guess", "fallback: "),
        ("formats=[]", "formats: "),
        ("ignore=lm_head", "ignore: "),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_place(load, change, said):
    with pytest.raises(RecipeError) as error:
        load(changes=[change])
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("change", ["rules.0.match=re:(", "rules.1.match.1=re:[", "ignore=[lm_head, 're:*']"])
def test_a_regular_expression_that_is_none_is_refused_when_the_recipe_is_read(load, change):
    with pytest.raises(RecipeError, match=r"^(rules\.[01]\.match|ignore): 're:.*' is not a regular expression"):
        load(changes=[change])


def test_changes_reach_keys_at_every_depth(load):
    changed = load(
        changes=[
            "grid.bits=3",
            "rules.0.grid.bits=6",
            "rules.1.match.0=*.up_proj",
            "calibration.length=32",
            "true_sequential=true",
            "description=a=b",
        ]
    )
    assert changed.grid == {"name": "affine", "bits": 3, "group_size": 64}
    assert changed.rules[0].grid == {"bits": 6}
    assert changed.rules[1].match[0] == "*.up_proj"
    assert (changed.calibration.length, changed.calibration.sequences) == (32, 4)
    assert changed.true_sequential is True
    assert changed.description == "a=b"


def test_a_change_may_begin_a_section(load):
    changed = load("grid: {name: affine}", ["calibration.path=text.txt", "calibration.sequences=2"])
    assert changed.calibration.sequences == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("grid.bits", "--set grid.bits: has no `=`"),
        ("rules.3.keep=true", "--set rules.3.keep=true: rules.3: the list has 3 entries"),
        ("rules.first.keep=true", "--set rules.first.keep=true: rules.first: the list has 3 entries"),
        ("grid.bits.low=3", "--set grid.bits.low=3: grid.bits.low: its parent is 4"),
    ],
)
def test_a_change_that_leads_nowhere_is_refused(load, change, said):
    with pytest.raises(RecipeError) as error:
        load(changes=[change])
    assert str(error.value).startswith(said)


def test_the_first_matching_rule_wins_and_changes_only_what_it_names(load):
    loaded = load()
    first = loaded.choose("model.layers.0.mlp.down_proj")
    assert (first.grid_config.bits, first.grid_config.group_size) == (8, 64)
    assert (first.algorithm, first.algorithm_config.dampening_frac) == ("gptq", 0.05)
    second = loaded.choose("model.layers.9.mlp.down_proj")
    assert (second.grid_config.bits, second.algorithm) == (4, "rtn")
    assert loaded.choose("model.layers.1.self_attn.q_proj").algorithm == "rtn"
    assert loaded.choose("model.layers.9.self_attn.q_proj") is None
    assert loaded.choose("model.layers.9.self_attn.k_proj") == loaded.choices[-1]


def test_a_rule_that_names_a_grid_begins_from_its_defaults(load):
    chosen = load(changes=["rules.0.grid={name: affine, bits: 8}"]).choose("model.layers.0.mlp.down_proj")
    assert chosen.grid_config.group_size == 128


def test_ignored_linears_stay_float_unless_a_rule_names_them(load):
    assert load().choose("lm_head", head=True) is None
    assert load(changes=["ignore=[]"]).choose("lm_head", head=True) is not None
    assert load(changes=["ignore=['*.k_proj']"]).choose("model.layers.9.self_attn.k_proj") is None
    assert load(changes=["rules.0.match=lm_head"]).choose("lm_head", head=True).grid_config.bits == 8


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("*.q_proj", "model.layers.0.self_attn.q_proj", True),
        ("*.q_proj", "model.layers.0.self_attn.q_proj.inner", False),
        ("*.Q_PROJ", "model.layers.0.self_attn.q_proj", False),
        ("re:.*\\.[12]\\..*", "model.layers.2.mlp", True),
        ("re:.*\\.[12]\\..*", "model.layers.12.mlp", False),
        ("re:layers", "model.layers.0", False),
        ("re:model", "model.layers.0", False),
    ],
)
def test_a_pattern_matches_the_whole_name(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_a_mixture_gives_types_and_rules_give_others():
    text = [{"match": "*.down_proj", "grid": {"name": "q8_0"}}, {"match": "*.o_proj", "keep": True}]
    loaded = Recipe(name="x", mixture={"name": "q4_k_m"}, rules=text, formats=["gguf"])
    assert loaded.choose("model.layers.0.mlp.up_proj", "q4_k").grid == "q4_k"
    assert loaded.choose("model.layers.0.mlp.down_proj", "q6_k").grid == "q8_0"
    assert loaded.choose("model.layers.0.self_attn.o_proj", "q4_k") is None
    assert loaded.choose("model.layers.0.mlp.up_proj", "f16") is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "grid: a recipe needs a grid, or else a mixture; this one has neither"),
        ({"grid": {"name": "affine"}, "mixture": {"name": "q4_k_m"}}, "grid: .* this one has both"),
        ({"mixture": {"name": "q4_k_m"}, "rules": [{"match": "*"}]}, "rules.0: a rule beside a mixture needs a `grid`"),
        ({"mixture": {"name": "q4_k_m", "puree": True}}, "mixture.puree: unknown key. Did you mean 'pure'"),
    ],
)
def test_a_recipe_has_either_a_grid_or_a_mixture(values, said):
    with pytest.raises(RecipeError, match=said):
        plugins.validate(Recipe, {"name": "x", "formats": ["gguf"]} | values, "")


def test_a_mistyped_recipe_gets_the_nearest_name():
    with pytest.raises(RecipeError, match=r"no recipe is called 'gptq-w4g12'\. Did you mean 'gptq-w4g128"):
        recipe.load("gptq-w4g12")


@pytest.mark.parametrize(
    ("text", "said"), [("", "NoneType"), ("- a", "list"), ("a: [", "is not YAML"), ("name: x", "grid: ")]
)
def test_a_file_that_is_no_recipe_is_refused(load, text, said):
    with pytest.raises(RecipeError, match=said):
        load(text)


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot be read: No such file"):
        recipe.load(tmp_path / "none.yaml")


def test_a_recipe_is_named_after_its_file_unless_it_says_otherwise(load):
    assert load().name == "mine"
    assert load("name: yours\ngrid: {name: affine}").name == "yours"


def test_a_recipe_made_in_python_is_checked_like_one_from_a_file():
    with pytest.raises(RecipeError, match=r"grid\.bit: unknown key"):
        Recipe(name="x", grid={"name": "affine", "bit": 4})


def test_the_shipped_recipes_are_what_the_accuracy_study_measures(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "eval")
    accuracy = importlib.import_module("accuracy")
    text = ["calibration.path=text.txt"]

    def method(name, changes=()):
        found = recipe.load(name, [*text, *changes])
        return found.algorithm, found.transforms, found.mismatch_correction, found.learned_rounding, found.rotations

    for format_ in (*accuracy.MIXTURES, *accuracy.AFFINE):
        inputs = "" if format_ in accuracy.AFFINE else accuracy.INPUTS
        options = {
            name: [Template(c).safe_substitute(inputs=inputs) for c in found if c != "--set"]
            for name, found in accuracy.VARIANTS.items()
        }
        plain = f"gguf-{format_}" if format_ in accuracy.MIXTURES else "rtn-w4g128"
        assert method(f"gptq-{format_}") == method(plain, options["default"])
        assert method(f"best-{format_}") == method(plain, options["best"])
        if format_ in accuracy.AFFINE:
            bits, group, symmetric = accuracy.AFFINE[format_]
            for name in (f"gptq-{format_}", f"best-{format_}"):
                grid = recipe.load(name, text).grid
                assert (grid["bits"], grid["group_size"], grid["symmetric"]) == (bits, group, symmetric)
    assert method("gguf-auto") == method("gptq-q4_k_m")
    assert method("gptq-plain-w4g128")[0] == {"name": "gptq", "actorder": True}
    assert {f"gptq-{format_}" for format_ in accuracy.MIXTURES} <= shipped.recipes().keys()
