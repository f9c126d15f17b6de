"""Packages that only some commands need: they come by an extra, and where one is absent the error says which."""

from __future__ import annotations

from importlib import import_module

from optin_deploy.errors import MissingDependency

EXTRAS = {
    "PIL": ("pillow", "images"),
    "jinja2": ("jinja2", "report"),
    "matplotlib": ("matplotlib", "report"),
    "soundfile": ("soundfile", "audio"),
    "soxr": ("soxr", "audio"),
    "sentence_transformers": ("sentence-transformers", "sentence-transformers"),
    "yaml": ("pyyaml", "serve"),
}
"""Module -> the package that holds it, and the extra of optin-deploy that brings it."""


def require(module: str) -> None:
    """Import an optional module of `EXTRAS`, so that the `import` statement behind this line succeeds.

    Raises: MissingDependency: it is not installed; names the command that installs it.
    """
    package, extra = EXTRAS[module]
    try:
        import_module(module)
    except ModuleNotFoundError as err:
        raise MissingDependency(f"{package} is not installed. Run: pip install 'optin-deploy[{extra}]'") from err
