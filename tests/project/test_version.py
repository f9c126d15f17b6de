"""The version is written in one place, read without loading anything, and repeated only where a test holds it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib

import yaml

from optin_deploy import __version__
from support.project import ROOT

CHECKOUT = """
import sys
sys.path.insert(0, sys.argv[1])
import optin_deploy
packages = {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names - {"__main__"}
print(optin_deploy.__version__, *sorted(packages))
"""


def test_the_version_is_one_that_packages_may_have() -> None:
    # Semantic versions alone, with a suffix of PEP 440 for those before a release.
    assert re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+|\.dev\d+)?", __version__)


def test_the_package_takes_its_version_from_the_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "optin_deploy.common.version.__version__"}


def test_a_checkout_that_is_not_installed_knows_it_and_loads_nothing_else() -> None:
    # -I and -S: neither PYTHONPATH nor installed packages are seen.
    command = [sys.executable, "-I", "-S", "-c", CHECKOUT, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [__version__, "optin_deploy"]


def test_the_citation_names_this_version_and_the_changelog_knows_it_or_what_comes_next() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] in ("Unreleased", __version__)


def test_nothing_asks_an_installation_for_our_version() -> None:
    asking = re.compile(r"""version\(["']optin-deploy["']\)""")
    paths = [path for folder in ("optin_deploy", "exporters", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in paths if asking.search(path.read_text(encoding="utf-8"))]
