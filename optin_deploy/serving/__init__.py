"""Inference servers that a pruned model can be published to: one file each, named in one table."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from optin_deploy.common.plugins import with_added
from optin_deploy.errors import BadInput

if TYPE_CHECKING:
    from optin_deploy.serving.base import Server

OWN = {
    "triton": "optin_deploy.serving.triton:Triton",
    "ovms": "optin_deploy.serving.ovms:OpenVinoModelServer",
    "mlserver": "optin_deploy.serving.mlserver:MLServer",
    "kserve": "optin_deploy.serving.kserve:KServe",
}


@cache
def servers() -> dict[str, str]:
    """Name on the command line -> module:class, imported when asked for; other packages may add theirs."""
    return with_added("servers", OWN)


def server(name: str) -> Server:
    """What writes a server's files.

    Raises: BadInput: unknown; lists the known ones.
    """
    if name not in servers():
        raise BadInput(f"unknown --server {name!r}; possible: {', '.join(servers())}.")
    module, _, kind = servers()[name].partition(":")
    found: Server = getattr(import_module(module), kind)()
    return found
