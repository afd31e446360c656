"""Options that come from the environment, or from a TOML file, as if they had been given on the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from .parser import Parser, UsageError, meant

PREFIX = "RADIX_OPS_"
# The variables of that prefix that the library reads.
LIBRARY = ("RADIX_OPS_FLASH_ATTENTION",)
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class Source(NamedTuple):
    """Values by the options' names without dashes; `where` names the place in messages."""

    where: str
    values: dict[str, Any]


def fill(command: Parser, given: argparse.Namespace, source: Source) -> None:
    """Set what the command line, or a source before this one, has not given."""
    options: list[str] = []
    others: list[str] = []
    for name, value in source.values.items():
        action = names_of(command)[name]
        if hasattr(given, action.dest) or any(getattr(given, rival, None) for rival in command.rivals(action)):
            continue
        if value is False and action.nargs == 0:  # a source behind this one can't set it
            setattr(given, action.dest, action.default)
        try:
            if action.option_strings:
                options.extend(_as_option(action, name, value))
            else:
                others.extend(_as_texts(value))
        except ValueError as error:
            command.error(f"{source.where}: {name} {error}")
    try:
        found, _ = command.parse_known_args([*options, "--", *others])
    except UsageError as error:
        command.error(f"{source.where}: {error}")
    for name, value in vars(found).items():
        setattr(given, name, value)


def names_of(command: Parser) -> dict[str, argparse.Action]:
    """Return the command's arguments by their names in a file."""
    return {
        next((name[2:] for name in action.option_strings if name.startswith("--")), action.dest): action
        for action in command.arguments
    }


def _as_option(action: argparse.Action, name: str, value: Any) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"is {value!r}; it must be true or false")
        return [f"--{name}"] if value else []
    if isinstance(value, list) and action.nargs in ("+", "*"):
        return [f"--{name}", *_as_texts(value)]
    texts = _as_texts(value)
    repeats = isinstance(action, argparse._AppendAction)
    return [f"--{name}={text}" for text in (texts if repeats else [",".join(texts)])]


def _as_texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if wrong := [x for x in values if isinstance(x, bool) or not isinstance(x, (str, int, float))]:
        raise ValueError(f"is {wrong[0]!r}; it must be a string or a number")
    return [str(x) for x in values]


def of_environment(command: Parser, commands: Mapping[str, Parser], environment: Mapping[str, str]) -> Source:
    """Return the command's options among variables like RADIX_OPS_MODEL. UsageError for one of no command."""
    own = names_of(command)
    every = {name for each in commands.values() for name, action in names_of(each).items() if action.option_strings}
    values: dict[str, Any] = {}
    for variable in sorted(environment):
        if not variable.startswith(PREFIX) or variable in LIBRARY:
            continue
        name, value = variable.removeprefix(PREFIX).lower().replace("_", "-"), environment[variable]
        if name not in every:
            known = [*LIBRARY, *(PREFIX + each.upper().replace("-", "_") for each in every)]
            command.error(f"the environment has {variable}, and no option has that name{meant(variable, known)}")
        if name in own:
            is_flag = own[name].nargs == 0
            values[name] = _FLAGS.get(value.lower(), value) if is_flag else value
    return Source("the environment", values)


def of_mapping(command: Parser, name: str, values: Mapping[str, Any], where: str) -> Source:
    """Return the command's options among values by their names, where _ stands for - and a flag may be a text as in
    the environment. UsageError for a name that the command doesn't have."""
    own, found = names_of(command), dict[str, Any]()
    for key, value in values.items():
        option = key.replace("_", "-")
        if option not in own or option == "config":
            command.error(f"{where}: {name} has no option {key}{meant(option, own)}")
        is_flag = own[option].nargs == 0 and isinstance(value, str)
        found[option] = _FLAGS.get(value.lower(), value) if is_flag else value
    return Source(where, found)


def of_file(command: Parser, name: str, commands: Mapping[str, Parser], path: str) -> Source:
    """Return the command's options in a TOML file: keys of its own table, [name], go before those at the top.

    UsageError for a file that can't be read and for a key that the command doesn't have.
    """
    content = _read(command, path)
    tables = {key: content.pop(key) for key in list(content) if key in commands and isinstance(content[key], dict)}
    values: dict[str, Any] = {}
    for table in (content, tables.get(name, {})):
        values |= {key.replace("_", "-"): value for key, value in table.items()}
    own = names_of(command)
    for key in values:
        if key not in own or key == "config":
            others = [other for other, parser in commands.items() if key in names_of(parser) and key != "config"]
            hint = f"; {others[0]} has: it may stand under [{others[0]}]" if others else meant(key, own)
            command.error(f"{path}: {name} has no option {key}{hint}")
    return Source(path, values)


def _read(command: Parser, path: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        command.error(f"--config {path} can't be read: {error.strerror or error}")
    except ValueError as error:
        command.error(f"--config {path} is no TOML: {error}")
