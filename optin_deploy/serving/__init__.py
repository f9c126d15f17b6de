"""Inference servers that a pruned model can be published to: one file each, named in one table."""

from __future__ import annotations

from importlib import import_module

from optin_deploy.common.plugins import with_added
from optin_deploy.errors import BadInput
from optin_deploy.serving.base import Server

OWN = {
    "triton": "optin_deploy.serving.triton:Triton",
    "ovms": "optin_deploy.serving.ovms:OpenVinoModelServer",
    "mlserver": "optin_deploy.serving.mlserver:MLServer",
    "kserve": "optin_deploy.serving.kserve:KServe",
}
SERVERS = with_added("servers", OWN)
"""Name on the command line -> module:class, imported when asked for; other packages may add theirs."""


def server(name: str) -> Server:
    """What writes a server's files.

    Raises: BadInput: unknown; lists the known ones.
    """
    if name not in SERVERS:
        raise BadInput(f"unknown --server {name!r}; possible: {', '.join(SERVERS)}.")
    module, _, kind = SERVERS[name].partition(":")
    found: Server = getattr(import_module(module), kind)()
    return found
