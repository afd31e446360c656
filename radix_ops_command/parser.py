"""A parser that leaves out what was not given, so that other sources may fill it in, and names the nearest option."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

from .errors import printable


class UsageError(Exception):
    """Arguments that can't be used. `parser` is that of the command, whose usage is printed."""

    def __init__(self, parser: Parser, message: str):
        super().__init__(message)
        self.parser = parser

    def exit(self) -> NoReturn:
        """Print usage and message, and end the process with status 2."""
        argparse.ArgumentParser.error(self.parser, printable(str(self)))


class Parser(argparse.ArgumentParser):
    """A parser of what is given alone: `parse_known_args` sets no defaults and misses nothing. `complete` does both."""

    _held: tuple[tuple[argparse.Action, Any, bool], ...] = ()

    def parse_known_args(self, args=None, namespace=None):
        self._held = tuple((action, action.default, action.required) for action in self._actions)
        for action in self._actions:
            action.default, action.required = argparse.SUPPRESS, False
        try:
            return super().parse_known_args(args, namespace)
        finally:
            self._restore()

    def _restore(self) -> None:
        for action, default, required in self._held:
            action.default, action.required = default, required
        self._held = ()

    def format_help(self) -> str:
        self._restore()  # --help ends the process while it parses
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(self, message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += meant(str(value), map(str, action.choices or ()))
            raise

    @property
    def arguments(self) -> Iterator[argparse.Action]:
        """Yield the arguments that set something, but for those that help leaves out."""
        apart = ("help", "version", argparse.SUPPRESS)
        return (action for action in self._actions if action.dest not in apart and action.help != argparse.SUPPRESS)

    def take_rest(self, given: argparse.Namespace, unknown: list[str]) -> None:
        """Give what stands behind options to the place that takes several values, as FILE does. UsageError for
        arguments that no option and no place takes: options first, each with the nearest name."""
        options = [text.partition("=")[0] for text in unknown if text.startswith("-") and text not in ("-", "--")]
        if options:
            known = [name for action in self._actions for name in action.option_strings]
            self.error("there is no option " + ", nor ".join(name + meant(name, known) for name in options))
        several = [action.dest for action in self.arguments if not action.option_strings and action.nargs == "+"]
        if unknown and not several:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        for name in several:
            if unknown:
                setattr(given, name, [*getattr(given, name, []), *unknown])

    def rivals(self, action: argparse.Action) -> set[str]:
        """Return the names in the result of what can't be given together with the argument."""
        groups = (group._group_actions for group in self._mutually_exclusive_groups)
        return {other.dest for group in groups if action in group for other in group} - {action.dest}

    def complete(self, given: argparse.Namespace) -> None:
        """Give defaults to what was not given. UsageError where something that is required was not."""
        missing = [action for action in self.arguments if action.required and not hasattr(given, action.dest)]
        if missing:
            names = ("/".join(action.option_strings) or str(action.metavar or action.dest) for action in missing)
            self.error(f"the following arguments are required: {', '.join(names)}")
        for action in self.arguments:
            if not hasattr(given, action.dest):
                setattr(given, action.dest, action.default)


def meant(name: str, known: Iterable[str]) -> str:
    """Return a question for the nearest of the known names, or nothing."""
    bare = {each.lstrip("-"): each for each in known}  # dashes are alike
    nearest = difflib.get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.7)
    return f" (did you mean {bare[nearest[0]]}?)" if nearest else ""
