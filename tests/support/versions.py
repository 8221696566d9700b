"""The versions of libraries that constraints files name, and those that are installed."""

import re
from importlib.metadata import version

from packaging.utils import canonicalize_name

from tests.support import ROOT


def pins(name: str) -> dict[str, str]:
    """The version of each package that a constraints file names."""
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE)
    return {str(canonicalize_name(package)): pinned for package, pinned in lines}


def installed_as_pinned(*packages: str) -> bool:
    """Whether these packages are installed in the versions of constraints.txt."""
    pinned = pins("constraints.txt")
    return all(version(package) == pinned[package] for package in packages)
