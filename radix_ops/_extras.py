"""Says which extra of this package brings a library that is missing or too old, and how to install it."""

from __future__ import annotations

import importlib.util
import re
from importlib import metadata


def require(package: str, extra: str, what: str = "radix_ops", least: str | None = None) -> None:
    """Raise ImportError with the command that installs it where a package is missing or older than `least`."""
    lack = lack_of(package, extra, what, least)
    if lack is not None:
        raise ImportError(lack, name=package)


def lack_of(package: str, extra: str, what: str = "radix_ops", least: str | None = None) -> str | None:
    """Return what is wrong with a package that `what` needs, and the command that mends it, or None.

    package: as it is imported. extra: the one of this package that brings it. least: its oldest version that will do.
    """
    if importlib.util.find_spec(package) is None:
        found = "which is not installed"
    elif least is not None and _is_older(version := _version_of(package), least):
        found = f"and {version} is installed"
    else:
        return None
    wanted = package if least is None else f"{package} >= {least}"
    return f"{what} needs {wanted}, {found}; in a checkout of radix_ops: pip install --no-build-isolation '.[{extra}]'"


def _version_of(package: str) -> str | None:
    """Return the version of the distribution of that name; None for a package that none brought."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_older(version: str | None, least: str) -> bool:
    return version is not None and _numbers(version) < _numbers(least)


def _numbers(version: str) -> list[int]:
    """Return the numbers that a version opens with: [5, 2] of "5.2rc1"."""
    opening = re.match(r"\d+(?:\.\d+)*", version)
    return [int(part) for part in opening[0].split(".")] if opening else []
