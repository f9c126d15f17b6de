"""Files that are published as they are, because they run inside of a server."""

from __future__ import annotations

from importlib.resources import files


def payload(name: str) -> bytes:
    """The bytes of one of them."""
    return files("optin_deploy.serving.payload").joinpath(name).read_bytes()
