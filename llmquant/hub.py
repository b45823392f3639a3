"""Upload a written folder to the Hugging Face hub, model card included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError

from llmquant.checkpoint import Digest, read_json
from llmquant.errors import LlmquantError, OutputError
from llmquant.progress import Progress, silent
from llmquant.run import REPORT

CARD = "README.md"


def push(folder: Path, repo: str, private: bool = False, progress: Progress = silent) -> str:
    """Upload a folder that ``quantize`` has finished to a model repository, made if there is none; return its address.

    The token is that of the environment (HF_TOKEN, or what `hf auth login` has kept).

    Raises OutputError for another folder, or one that is not as it was written; LlmquantError for what the hub refuses,
    and for a public repository where it should be private.
    """
    files = check(folder, progress)
    if get_token() is None:
        raise LlmquantError("push: there is no token for the hub. Set HF_TOKEN, or run `hf auth login`.")
    api = HfApi(library_name="llmquant")
    with _by_hub(repo):
        place = api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(place.repo_id).private:
            raise LlmquantError(f"{repo}: is there already, and public. Give another name, or leave out --private.")
        progress("uploading", 0, 1)
        api.upload_folder(
            repo_id=place.repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload by llmquant"
        )
        progress("uploading", 1, 1)
    return str(place)


def check(folder: Path, progress: Progress = silent) -> list[str]:
    """Return the names of the files of a finished folder; raise OutputError for one that is not, or was changed.

    The card may have been: who publishes a model has more to say.
    """
    if not (folder / REPORT).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{REPORT}")) if folder.is_dir() else []
        hint = "Give one that `llmquant quantize` or `compare` has finished"
        if inner:
            hint = f"Give one of the folders in it, e.g. {folder / inner[0]}"
        raise OutputError(f"{folder}: has no {REPORT}, so it is not a folder that llmquant has finished. {hint}")
    hashes = read_json(folder / REPORT, "llmquant wrote it").get("hashes")
    if not isinstance(hashes, dict) or not hashes or not all(isinstance(one, dict) for one in hashes.values()):
        raise OutputError(f"{folder / REPORT}: does not tell the files of the folder")
    names = sorted({name for one in hashes.values() for name in one if (folder / name).is_file()} - {CARD})
    found = {}
    for i, name in enumerate(names):
        progress("checking files", i, len(names))
        found[name] = Digest(folder / name).hexdigest()
    progress("checking files", len(names), len(names))
    # a report on several formats tells the files of each
    wanted = max(hashes.values(), key=lambda one: sum(one.get(name) == digest for name, digest in found.items()))
    for name, digest in wanted.items():
        if name == CARD and (folder / name).is_file():
            continue
        if found.get(name) != digest:
            what = "is not as llmquant wrote it" if name in found else "is missing"
            raise OutputError(f"{folder / name}: {what}, by the SHA-256 in {REPORT}. Quantize again, into a new folder")
    return [*wanted, REPORT]


@contextmanager
def _by_hub(repo: str) -> Iterator[None]:
    """While active, what the hub or the way to it refuses becomes one LlmquantError."""
    try:
        yield
    except (OSError, HFValidationError) as error:
        response = getattr(error, "response", None)
        refused = response is not None and response.status_code in (401, 403)
        hint = ". The token is wrong, or may not write there" if refused else ""
        raise LlmquantError(f"{repo}: cannot be uploaded: {_first_line(error)}{hint}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "hf_xet"):
            raise
        raise LlmquantError(
            f"{repo}: the hub cannot be reached: {_first_line(error)}. What was uploaded is kept there; give the same "
            "command again."
        ) from None


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
