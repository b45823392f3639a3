"""Recipes: YAML in, a typed and complete description of a run out."""

from __future__ import annotations

import fnmatch
import re
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from llmquant import patterns, plugins, shipped
from llmquant.activations import ActivationScheme
from llmquant.data import Calibration, TextSource
from llmquant.distillation import Training
from llmquant.errors import RecipeError
from llmquant.learned import LearnedRounding

MOST_BYTES = 1 << 20  # of a recipe; a budget's rules for a large model have a hundredth of that
MOST_DEPTH = 20  # of its lists and mappings


class Rule(BaseModel):
    """What to do with the linears whose name matches; the first rule that matches decides.

    match: a glob ("*.down_proj"), a regular expression ("re:.*layers\\.[01]\\..*"), or a list of them.
        Compared with the module's name, "model.layers.0.mlp.down_proj".
    grid, algorithm: as in the recipe. Without a `name` they change keys of the recipe's own.
    keep: leave these linears in float.
    activations: as in the recipe, or "float": what these linears read is not rounded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: str | list[str]
    grid: dict[str, Any] = {}
    algorithm: dict[str, Any] = {}
    keep: bool = False
    activations: ActivationScheme | Literal["float"] | None = None

    @property
    def patterns(self) -> list[str]:
        return [self.match] if isinstance(self.match, str) else self.match


class Choice(BaseModel):
    """The grid and the algorithm of one linear, by name and settings, and what its inputs are rounded to."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    grid: str
    grid_config: Any
    algorithm: str
    algorithm_config: Any
    activations: ActivationScheme | None = None


class Mixture(BaseModel):
    """Types of a GGUF file, tensor by tensor: those that llama-quantize picks for a name such as "q4_k_m".

    pure: the base type for every matrix.
    output, token_embedding: types for these two matrices.
    overrides: types by a regular expression, searched in the tensor's GGUF name ("blk.0.ffn_down.weight"); the first
        that fits counts.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    pure: bool = False
    output: str | None = None
    token_embedding: str | None = None
    overrides: dict[str, str] = {}


class Recipe(BaseModel):
    """A run: which numbers, which algorithm, which text, which files.

    name, description: for people, reports and model cards.
    grid: {name: affine, bits: 4, ...}; see `llmquant list grids`.
    mixture: {name: q4_k_m, ...} instead of a grid: each matrix gets its own, for a GGUF file.
    algorithm: {name: gptq, ...}; see `llmquant list algorithms`.
    transforms: [{name: awq, ...}, ...], what is done to the float model before, in this order; see
        `llmquant list transforms`.
    rotations: [residual, heads], or one of them: fold Hadamard rotations into the float model before all else; see
        `llmquant/rotation.py`. They help where many columns share a scale.
    activations: {type: int8, dynamic: true, ...}: round what the linears read, too; a runtime then multiplies 8-bit
        numbers. Left out: only weights are quantized.
    rules: exceptions, by name.
    ignore: linears that stay float, by glob or "re:" expression; without a mixture the output matrix, if not given.
    fallback: what to do where a weight's columns do not divide into groups. "error" stops before
        any work, "substitute" takes what the grid names for it (affine: one scale a row), "keep" leaves
        them float; both are listed in the report.
    calibration: the text to calibrate on; algorithms that read no statistics need none.
    imatrix: llama.cpp's file of how large the activations of each column are, for algorithms that need no more.
    true_sequential: let every site of a layer see the rounding of the sites before it in the same layer.
        Off: it sees that of the layers before it.
    mismatch_correction: let every linear make up for the rounding of those before it as far as that carries over to
        text it was not fitted on.
    learned_rounding: tune the codes of each layer on its own output error, once all its linears are quantized; {} for
        the usual settings. Takes long.
    bias_correction: add the mean error of a linear's outputs to its bias, where it has one.
    tied_embeddings: "keep" the embedding and the output matrix one tensor, or "untie" them into two.
    formats: the containers to write; see `llmquant list formats`.
    budget: the most that the weights' files may have: 4.5bpw (in bits, over all weights of the model), 3.2GB, 3GiB, or
        a mixture such as q4_k_m for the size of its file. The types are then chosen tensor by tensor.
    selection: the text to choose them on, other than the calibration text; by default sequences of that which are not
        calibrated on.
    max_shard_size: the most bytes of tensors in one file, such as 5GB or 500MB; "none" for a single file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    description: str = ""
    grid: dict[str, Any] | None = None
    mixture: Mixture | None = None
    algorithm: dict[str, Any] = {"name": "rtn"}
    transforms: list[dict[str, Any]] = []
    rotations: list[Literal["residual", "heads"]] = []
    activations: ActivationScheme | None = None
    rules: list[Rule] = []
    ignore: list[str] | None = None
    fallback: Literal["error", "substitute", "keep"] = "error"
    calibration: Calibration | None = None
    imatrix: Path | None = None
    true_sequential: bool = True
    mismatch_correction: bool = False
    learned_rounding: LearnedRounding | None = None
    training: Training | None = None
    bias_correction: bool = False
    tied_embeddings: Literal["keep", "untie"] = "keep"
    formats: list[str] = Field(default=["compressed_tensors"], min_length=1)
    budget: str | None = None
    selection: TextSource | None = None
    max_shard_size: str | None = Field(default=None, coerce_numbers_to_str=True)

    @property
    def shard_bytes(self) -> int | None:
        """``max_shard_size`` in bytes, 0 for "none"; None where the recipe leaves it to the format."""
        if self.max_shard_size is None or self.max_shard_size.lower() == "none":
            return None if self.max_shard_size is None else 0
        size = re.fullmatch(r"([1-9][0-9]*) *([kmgt]?)b?", self.max_shard_size.lower())
        if size is None:
            raise RecipeError(f"max_shard_size: {self.max_shard_size!r} is not a size such as 5GB, 500MB or none")
        return int(size[1]) * {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}[size[2]]

    def model_post_init(self, context: Any) -> None:
        if (self.grid is None) == (self.mixture is None):
            raise RecipeError(
                "grid: a recipe needs a grid, or else a mixture; this one has " + ("both" if self.grid else "neither")
            )
        if (
            Path(self.name).name != self.name
            or self.name in ("", "..")
            or not self.name.isprintable()
            or len(self.name) > 100
        ):
            raise RecipeError(f"name: {self.name!r:.200} is not a name that a folder can have")
        self.shard_bytes  # noqa: B018  (checked when the recipe is read)
        self.choices  # noqa: B018  (every grid and algorithm is checked when the recipe is read)
        self.rewrites  # noqa: B018  (and every transform)
        if self.tunes_layers and any(choice and choice.activations for choice in self.choices):
            key = "learned_rounding" if self.learned_rounding else "training.scope=layers"
            raise RecipeError(f"{key}: only where activations stay float. Leave out `activations`")
        if self.learned_rounding and self.training and self.training.scope == "layers":
            raise RecipeError("training.scope=layers: changes what learned_rounding does. Leave out one of them")
        for i, rule in enumerate(self.rules):
            for pattern in rule.patterns:
                _check_pattern(pattern, f"rules.{i}.match")
        for pattern in self.ignore or []:
            _check_pattern(pattern, "ignore")
        for i, name in enumerate(self.formats):
            plugins.load("exporters", name, f"formats.{i}")

    @property
    def texts(self) -> list[TextSource]:
        """Every text that it reads."""
        training = self.training and self.training.text
        return [text for text in (self.calibration, self.selection, training) if text]

    @property
    def tunes_layers(self) -> bool:
        """Whether each layer is tuned on its own output, before the next one is begun."""
        return self.learned_rounding is not None or (self.training is not None and self.training.scope == "layers")

    @property
    def trains_model(self) -> bool:
        """Whether all layers are trained together, once they are quantized."""
        return self.training is not None and self.training.scope == "model"

    @cached_property
    def choices(self) -> list[Choice | None]:
        """What each rule does, in order, and last what holds where none matches. None keeps the linear float."""
        # what holds for all comes first, so that its faults are not put down to a rule
        own = None if self.grid is None else _choice(self.grid, self.algorithm, self.activations, "")
        found: list[Choice | None] = []
        for i, rule in enumerate(self.rules):
            if self.grid is None and not rule.grid and not rule.keep:
                raise RecipeError(f"rules.{i}: a rule beside a mixture needs a `grid`, or `keep: true`")
            grid = _over(self.grid or {}, rule.grid)
            algorithm = _over(self.algorithm, rule.algorithm)
            activations = None if rule.activations == "float" else rule.activations or self.activations
            found.append(None if rule.keep else _choice(grid, algorithm, activations, f"rules.{i}."))
        return [*found, own]

    @cached_property
    def choices_of_types(self) -> dict[tuple[str, str], Choice | None]:
        """What ``of_type`` has found so far."""
        return {}

    @cached_property
    def rewrites(self) -> list[tuple[str, Any]]:
        """The transforms, by name and settings."""
        return [plugins.configure("transforms", values, f"transforms.{i}") for i, values in enumerate(self.transforms)]

    @cached_property
    def folds(self) -> list[tuple[str, Any]]:
        """Those of the transforms that scale columns."""
        return [r for r in self.rewrites if hasattr(plugins.load("transforms", r[0], "transforms"), "search")]

    def choose(self, linear: str, type_: str | None = None, head: bool = False) -> Choice | None:
        """Return the grid and the algorithm for a linear, or None if it stays float.

        type_: what a mixture gives it. head: it is the output matrix.
        """
        for rule, choice in zip(self.rules, self.choices, strict=False):
            if any(matches(p, linear) for p in rule.patterns):
                return choice
        if any(matches(p, linear) for p in self.ignore or []) or (head and self.ignore is None and not self.mixture):
            return None
        if type_ is not None:
            return self.of_type(type_)
        return self.choices[-1]

    def of_type(self, type_: str, algorithm: dict[str, Any] | None = None) -> Choice | None:
        """Return the choice for a GGUF type, by the recipe's algorithm unless one is given; None for a float type."""
        key = type_, str(algorithm)
        if key not in self.choices_of_types:  # thousands of experts ask for few types
            known = type_ in plugins.names("grids")
            choice = _choice({"name": type_}, algorithm or self.algorithm, self.activations, "") if known else None
            self.choices_of_types[key] = choice
        return self.choices_of_types[key]


def matches(pattern: str, name: str) -> bool:
    """Whether a glob, or a regular expression after "re:", matches the whole of a name.

    >>> matches("lm_head", "lm_head"), matches("*.q_proj", "model.layers.0.self_attn.q_proj")
    (True, True)
    >>> matches("re:.*layers\\\\.[01]\\\\..*", "model.layers.2.mlp.up_proj")
    False
    """
    if pattern.startswith("re:"):
        try:
            return patterns.matches(pattern[3:], name, "fullmatch")
        except ValueError as error:
            raise RecipeError(f"match: {pattern!r:.200} {error}") from None
    return fnmatch.fnmatchcase(name, pattern)


def load(recipe: str | Path, changes: list[str] | None = None) -> Recipe:
    """Return the recipe of a YAML file or a shipped name, with ``key.path=value`` changes applied.

    Raises RecipeError for whatever does not fit, with its place and the nearest thing that would.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        if str(recipe) not in shipped.recipes():
            raise RecipeError(
                f"no recipe is called {str(recipe)!r}.{plugins.hint(str(recipe), shipped.recipes())} "
                "A recipe of your own is a path that ends in .yaml."
            )
        path = shipped.recipes()[str(recipe)]
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"{path}: is not a file")
        with path.open("rb") as file:
            values = _plain(file.read(MOST_BYTES + 1).decode("utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RecipeError(f"{path}: is not YAML that a recipe can be: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path}: holds {type(values).__name__}, not a mapping of keys such as `grid` and `algorithm`"
        )
    values = {"name": path.stem} | values
    for change in changes or []:
        _apply(values, change)
    loaded: Recipe = plugins.validate(Recipe, values, "")
    return loaded


def _plain(text: str) -> Any:
    """Return the values of a YAML text; raise ValueError for what is not plain data.

    With aliases a few lines can stand for gigabytes, so there are none; tags, by which YAML makes objects, are unknown
    to the loader.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} characters")
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent):
                raise ValueError(f"*{event.anchor}: aliases are not read. Write the value out")
            if depth > MOST_DEPTH:
                raise ValueError(f"it has more than {MOST_DEPTH} levels")
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def dump(recipe: Recipe) -> str:
    """Return the recipe as YAML that ``load`` reads back to the same recipe."""
    text: str = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False)
    return text


def _apply(values: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals:
        raise RecipeError(f"--set {change}: has no `=`. Write --set key.path=value, e.g. --set grid.bits=3")
    *path, last = key.split(".")
    node: Any = values
    for depth, step in enumerate([*path, last]):
        place = ".".join([*path, last][: depth + 1])
        if isinstance(node, list):
            if not step.isdigit() or int(step) >= len(node):
                raise RecipeError(f"--set {change}: {place}: the list has {len(node)} entries, counted from 0")
        elif not isinstance(node, dict):
            raise RecipeError(f"--set {change}: {place}: its parent is {node!r} and has no keys")
        index: Any = int(step) if isinstance(node, list) else step
        if depth == len(path):
            try:
                node[index] = _plain(text)
            except ValueError:
                node[index] = text
        else:
            if isinstance(node, dict) and node.get(step) is None:
                node[step] = {}
            node = node[index]


def _check_pattern(pattern: str, where: str) -> None:
    try:
        matches(pattern, "")
    except RecipeError as error:
        raise RecipeError(f"{where}: {str(error).removeprefix('match: ')}") from None


def _over(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return change if "name" in change else base | change


def _choice(
    grid: dict[str, Any], algorithm: dict[str, Any], activations: ActivationScheme | None, where: str
) -> Choice:
    grid_name, grid_config = plugins.configure("grids", grid, f"{where}grid")
    algorithm_name, algorithm_config = plugins.configure("algorithms", algorithm, f"{where}algorithm")
    return Choice(
        grid=grid_name,
        grid_config=grid_config,
        algorithm=algorithm_name,
        algorithm_config=algorithm_config,
        activations=activations,
    )
