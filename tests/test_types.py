"""The types of the installed package; `make lint` checks the calls in tests/typed."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from importlib.resources import files

import pytest

from helpers.doors import PUBLIC


def public_functions(door: str) -> Iterator[tuple[str, Callable]]:
    """Yield the functions of a door, and the public methods and __init__ that its classes define in this package."""
    module = importlib.import_module(door)
    for name in module.__all__:
        member = getattr(module, name)
        if inspect.isfunction(member):
            yield name, member
        if inspect.isclass(member):
            for owner in member.__mro__:
                if not owner.__module__.startswith("radix_ops"):
                    continue
                for method, value in vars(owner).items():
                    found = getattr(value, "fget", None) or getattr(value, "__func__", value)
                    if inspect.isfunction(found) and (method == "__init__" or not method.startswith("_")):
                        yield f"{name}.{method}", found


@pytest.mark.parametrize("door", PUBLIC)
def test_public_signatures_are_annotated(door):
    if door == "radix_ops.lm_eval":
        pytest.importorskip("lm_eval")
    missing = []
    for name, function in public_functions(door):
        signature = inspect.signature(inspect.unwrap(function))
        missing += [
            f"{name}({parameter.name})"
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty and parameter.name not in ("self", "cls")
        ]
        if signature.return_annotation is signature.empty and not name.endswith("__init__"):
            missing.append(f"{name} ->")
    assert missing == []


def test_the_package_says_that_it_is_typed():
    assert files("radix_ops").joinpath("py.typed").is_file()
