"""What a file says of its model: its name, who made it of what, under which licence, how to sample from it.

The gguf package derives all that as llama.cpp's converter does: from the model's
card, else from the name in config.json, else from the folder's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, Keys, Metadata
from gguf.utility import naming_convention, size_label

from llmquant.checkpoint import read_json
from llmquant.report import front_matter

LISTS = {"license", "tags", "language", "languages", "base_model", "base_models", "dataset", "datasets"}
"""Keys of a card's front matter that may hold several texts."""
SAMPLING = {
    "temperature": Keys.General.SAMPLING_TEMP,
    "top_k": Keys.General.SAMPLING_TOP_K,
    "top_p": Keys.General.SAMPLING_TOP_P,
    "min_p": Keys.General.SAMPLING_MIN_P,
}
"""Name in generation_config.json -> key."""


def metadata(folder: Path, config: Mapping[str, Any], architecture: str, weights: int) -> dict[str, Any]:
    """Return the keys under ``general.`` for a model folder.

    config: its config.json. weights: number of them.
    """
    card = folder / "README.md"
    about = front_matter(card.read_text("utf-8", errors="replace")) if card.is_file() else {}
    about = {key: value for key, value in about.items() if _texts(value, key in LISTS)}
    hub_id = _hub_id(folder)
    named = hub_id or config.get("_name_or_path")
    known_as = {"_name_or_path": named} if isinstance(named, str) else {}
    path = Path(hub_id or folder.resolve().name)
    found = Metadata.apply_metadata_heuristic(Metadata(), about, known_as, path, weights)
    found.size_label = found.size_label or size_label(weights, 0, 0, 0)
    if hub_id:
        found.source_repo_url = f"https://huggingface.co/{hub_id}"
    collector = GGUFWriter(None, architecture)
    found.set_gguf_meta_model(collector)
    return {key: entry.value for key, entry in collector.kv_data[0].items()} | _sampling(folder)


def file_name(metadata: Mapping[str, Any], folder: Path, type_: str) -> str:
    """Return the file's name without its ending, by GGUF's naming convention.

    metadata: as above. folder: of the model, which names a file whose base name is not known.
    """
    known = (Keys.General.BASENAME, Keys.General.FINETUNE, Keys.General.VERSION, Keys.General.SIZE_LABEL)
    model = Path(_hub_id(folder) or folder.resolve().name).name
    name = naming_convention(model, *map(metadata.get, known), type_)
    return re.sub(r"[^\w.+=-]", "-", name)


def _texts(value: Any, many: bool) -> bool:
    if not value:
        return False
    return isinstance(value, str) or (many and isinstance(value, list) and all(isinstance(x, str) for x in value))


def _hub_id(folder: Path) -> str | None:
    """Return the id of a model in the hub's cache (models--ORG--NAME/snapshots/COMMIT)."""
    path = folder.resolve()
    repository = path.parent.parent.name
    if path.parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    return repository.removeprefix("models--").replace("--", "/")


def _sampling(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    settings = read_json(path, "it gives settings to sample with") if path.is_file() else {}
    found = {key: settings.get(name) for name, key in SAMPLING.items()}
    return {
        key: int(value) if key == Keys.General.SAMPLING_TOP_K else float(value)
        for key, value in found.items()
        if isinstance(value, int | float) and 0 <= value < 2**31
    }
