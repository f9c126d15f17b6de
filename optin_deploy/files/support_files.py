"""The small files beside a model's weights: found, bounded, and never read behind a link that leaves their folder."""

from __future__ import annotations

from pathlib import Path

from optin_deploy.errors import BadInput
from optin_deploy.files.hub import snapshot
from optin_deploy.files.storage import read_json

TEXT_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEXT_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "merges.txt")
IMAGE_SETTINGS = ("preprocessor_config.json", "processor_config.json")
SENTENCE_FILES = (
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
    "*/config.json",
    "*_Dense/model.safetensors",
)
LIMIT_BYTES = 512 * 2**20
"""The largest published vocabularies are a tenth of it."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
SAVE_AGAIN = "Save it again with save_pretrained, beside the weights."


def support_folder(name: str) -> Path:
    """The folder of a model; of a hub id, the folder of its snapshot with these files in it.

    Raises: BadInput: they cannot be had.
    """
    if Path(name).exists():
        return Path(name)
    return snapshot(name, [*TEXT_SETTINGS, *TEXT_VOCABULARIES, "*.model", *IMAGE_SETTINGS, *SENTENCE_FILES])


def support_file(folder: Path, name: str) -> Path | None:
    """A file that may be read; None: there is none of this name.

    Args: name: of our own choice, or checked by the caller: it must not lead out of the folder.
    Raises: BadInput: a link that leaves the folder, no regular file, too large, or a Git LFS pointer.
    """
    path = folder / name
    if not path.exists() and not path.is_symlink():
        return None
    if not _stays_inside(path, folder):
        raise BadInput(
            f"{path} is a link that leaves {folder} or leads nowhere. Only files inside the model's folder are read: "
            "copy the file there."
        )
    if not path.is_file():
        raise BadInput(f"{path} is not a regular file. {SAVE_AGAIN}")
    size_bytes = path.stat().st_size
    if size_bytes > LIMIT_BYTES:
        raise BadInput(f"{path} is {size_bytes} bytes; at most {LIMIT_BYTES} are read. {SAVE_AGAIN}")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise BadInput(
                f"{path} is a Git LFS pointer, not the file itself: the repository was cloned without it. Run "
                "`git lfs pull` in it."
            )
    return path


def check_settings(folder: Path, names: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """The JSON objects among these files, by file name.

    Raises: BadInput: as `support_file`, or one holds something else than a JSON object.
    """
    found = {name: support_file(folder, name) for name in names}
    return {name: read_json(path, SAVE_AGAIN) for name, path in found.items() if path is not None}


def _stays_inside(path: Path, folder: Path) -> bool:
    """Does a path end in the folder, or in the hub's cache, whose snapshots are links to ../../blobs?"""
    try:
        real, home = path.resolve(strict=True), folder.resolve()
    except (OSError, RuntimeError):  # leads nowhere, or in a circle
        return False
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    return in_cache or real.is_relative_to(home)
