"""A cut model of a sentence-transformers folder as a `SentenceTransformer`: the smaller model in its own modules."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

from optin_deploy.checkpoint import reloading, smaller
from optin_deploy.common.extras import require
from optin_deploy.errors import BadInput
from optin_deploy.feeds.sentence_modules import ABOUT, embeds, modules_in, read_sentence_modules
from optin_deploy.files.storage import read_json

require("sentence_transformers")

from sentence_transformers import SentenceTransformer  # noqa: E402  # behind the line that says how to get it
from sentence_transformers.sentence_transformer import modules as known  # noqa: E402

KEPT = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
"""What sentence-transformers keeps beside the modules of a folder."""


class SmallerTransformer(known.Transformer):
    """The module Transformer around a cut model: transformers' `from_pretrained` knows one width for all layers."""

    def _load_model(self, model_name_or_path: str, *_: Any, **__: Any) -> Any:
        return reloading.load(Path(model_name_or_path))

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Raises: BadInput: transformers would write a folder that nothing loads."""
        raise BadInput(f"{output_path}: a cut model is not saved from here. Copy the folder that it was loaded from.")


def load_sentence_transformer(folder: str | PathLike[str], **options: Any) -> SentenceTransformer:
    """Load a cut model with all that its sentence-transformers folder does behind it.

    Args: folder: what `PrunedModel.save` wrote, or the output folder of `optin-export`. options: of
        `SentenceTransformer`, such as `device`; they win over what the folder says.
    Raises: BadInput, PlanMismatch: no such folder, or what `optin_deploy.load` refuses. MissingDependency:
        sentence-transformers is not installed.
    """
    place = smaller.folder_of(folder)
    home = smaller.home_in(place) or place
    smaller.read_saved(home)
    if not embeds(home):
        raise BadInput(f"{home} has no modules.json: it was no folder of sentence-transformers. Use optin_deploy.load.")
    first = SmallerTransformer.load(str(home))
    read_sentence_modules(home, first.config.hidden_size)  # anything else than a known kind of module is refused
    behind = [
        getattr(known, kind.rsplit(".", 1)[-1]).load(str(home), subfolder=path) for path, kind in modules_in(home)[1:]
    ]
    about = read_json(home / ABOUT, "") if (home / ABOUT).is_file() else {}
    kept = {name: about[name] for name in KEPT if about.get(name) is not None}
    return SentenceTransformer(modules=[first, *behind], **{**kept, **options})
