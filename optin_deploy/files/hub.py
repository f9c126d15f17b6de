"""Models of the Hugging Face Hub: fetched into its cache at one revision, with errors that name the next step."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optin_deploy.errors import BadInput
from optin_deploy.files.opening import short

ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")


def revision_of(name: str) -> tuple[str, str | None]:
    """The id and the revision of `org/name@REVISION`: a branch, a tag or a commit; None is the default branch."""
    hub_id, at, revision = name.partition("@")
    return hub_id, revision if at else None


def hub_id_of(name: str) -> str | None:
    """The id of the Hub in the name of a model; None: it is a folder, or a name without its owner."""
    hub_id, _ = revision_of(name)
    return hub_id if "/" in hub_id and ID.fullmatch(hub_id) and not Path(name).exists() else None


def snapshot(name: str, patterns: Sequence[str]) -> Path:
    """The folder of a model's files in the Hub's cache; those that are missing there are fetched.

    Args: name: id with an optional revision. patterns: names of the files, with wildcards.
    Raises: BadInput: no such model or revision, no right to read it, or no way to the Hub and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    hub_id, revision = revision_of(name)
    if not ID.fullmatch(hub_id) or revision == "":
        raise BadInput(
            f"{short(name)} is no folder, and no id of the Hub: give a folder, org/name or org/name@REVISION."
        )
    with hub_errors(hub_id, revision):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def hub_errors(hub_id: str, revision: str | None = None) -> Iterator[None]:
    """Say what to do about whatever the Hub refuses.

    Raises: BadInput.
    """
    from huggingface_hub import errors

    network: Any = errors.HfHubHTTPError.__mro__[1]  # of httpx, or of the copy that huggingface_hub brings
    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as err:
        where = f"https://huggingface.co/{hub_id}"
        raise BadInput(f"{hub_id} is gated: accept its terms at {where} and {login}.") from err
    except errors.RepositoryNotFoundError as err:
        raise BadInput(
            f"{hub_id} is not on the Hub, or it is private. Check the name; for a private model {login}."
        ) from err
    except errors.RevisionNotFoundError as err:
        raise BadInput(
            f"{hub_id} has no revision {short(revision)}. Give a branch, a tag or a commit, as in {hub_id}@main."
        ) from err
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as err:
        at = "" if revision is None else f" --revision {revision}"
        raise BadInput(
            f"{hub_id} is neither a folder nor in the Hub's cache, and the Hub is not asked or cannot be reached. "
            f"Fetch it where there is a connection with `hf download {hub_id}{at}`, or give a folder that exists."
        ) from err
    except (OSError, ValueError, network) as err:
        raise BadInput(f"{hub_id} cannot be had from the Hub: {err} Give a folder, or try again.") from err
