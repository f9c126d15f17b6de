"""Inference servers that a pruned model can be published to: one file each, named in one table."""

from __future__ import annotations

from importlib import import_module

from exporters.serving.base import Server
from optin_deploy.errors import BadInput

SERVERS = {
    "triton": "exporters.serving.triton:Triton",
    "ovms": "exporters.serving.ovms:OpenVinoModelServer",
    "mlserver": "exporters.serving.mlserver:MLServer",
    "kserve": "exporters.serving.kserve:KServe",
}
"""Name on the command line -> module:class, imported when asked for."""


def server(name: str) -> Server:
    """What writes a server's files.

    Raises: BadInput: unknown; lists the known ones.
    """
    if name not in SERVERS:
        raise BadInput(f"unknown --server {name!r}; possible: {', '.join(SERVERS)}.")
    module, _, kind = SERVERS[name].partition(":")
    found: Server = getattr(import_module(module), kind)()
    return found
