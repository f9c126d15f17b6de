"""The version of this package, which setuptools reads from here."""

__version__ = "0.1.0"
