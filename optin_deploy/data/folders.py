"""Folders with a file a row: which of them are read, and the class that a subfolder names."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from optin_deploy.data.images import IMAGE_EXTENSIONS
from optin_deploy.data.sounds import SOUND_EXTENSIONS
from optin_deploy.errors import BadInput
from optin_deploy.files.opening import check_name, short, special_kind

log = logging.getLogger(__name__)

ROW_EXTENSIONS = (*IMAGE_EXTENSIONS, *SOUND_EXTENSIONS)
"""Files that are a row each."""


def class_files(root: Path) -> Iterator[tuple[Path, str | None]]:
    """Images and recordings of a folder by name, each with the name of its class: of the subfolder it lies in.

    Hidden files are left out without a word, all others with one warning.
    Raises: BadInput: a link that leaves the folder, a folder two levels below, a name that is not UTF-8. OSError.
    """
    unused: Counter[str] = Counter()
    for entry in entries(root, root):
        if not entry.is_dir():
            if _is_read(entry, unused):
                yield entry, None
            continue
        for leaf in entries(entry, root):
            if leaf.is_dir():
                raise BadInput(
                    f"{leaf}: a folder two levels below {root}. Files lie in the folder itself or in one subfolder a"
                    f" class; give {entry} if its subfolders are the classes, or move {leaf.name} away."
                )
            if _is_read(leaf, unused):
                yield leaf, entry.name
    if unused:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in unused.most_common(8))
        log.warning(
            "%s: %d files are not used (%s); what is read: %s",
            *(root, unused.total(), kinds, ", ".join(ending[1:] for ending in ROW_EXTENSIONS)),
        )


def _is_read(path: Path, unused: Counter[str]) -> bool:
    kind = special_kind(path)
    if kind is None and path.suffix.lower() in ROW_EXTENSIONS:
        return True
    unused[kind or path.suffix.lower() or "no extension"] += 1
    return False


def entries(folder: Path, root: Path) -> Iterator[Path]:
    """What lies in a folder below `root`, in the order of the names, without hidden files.

    Raises: BadInput: a link that leaves `root`, or a name that is not UTF-8. OSError.
    """
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        check_name(entry)
        if entry.is_symlink():
            try:
                inside = entry.resolve(strict=True).is_relative_to(root.resolve())
            except (OSError, RuntimeError):  # broken, or a loop
                inside = False
            if not inside:
                raise BadInput(
                    f"{entry}: a link that leaves {root} or leads nowhere ({short(str(entry.readlink()))}). Only files"
                    " inside the folder are read; copy the file there, or delete the link."
                )
        yield entry
