"""The versions of libraries that llmtune allows, and those that its tests run with."""

import tomllib

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import ROOT
from tests.support.versions import pins

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ALLOWED = {canonicalize_name(one.name): one.specifier for one in map(Requirement, PROJECT["dependencies"])}


def test_oldest_environment_has_the_lower_bound_of_every_dependency() -> None:
    lowest = {name: [one.version for one in allowed if one.operator == ">="] for name, allowed in ALLOWED.items()}
    assert {name: [version] for name, version in pins("constraints-oldest.txt").items()} == lowest


def test_pinned_environment_is_allowed() -> None:
    pinned = pins("constraints.txt")
    assert {name for name, allowed in ALLOWED.items() if not allowed.contains(pinned[name])} == set()
