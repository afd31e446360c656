"""The run of a command whose arguments are parsed."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
from collections.abc import Iterator

import torch

from radix_ops_command.errors import Failure

from ..data.bad_rows import BadRowsError
from ..engine.errors import UserError, needs
from .finished import answers
from .progress import hushed


def run(args: argparse.Namespace) -> None:
    """Run the command that `args.run` names. Failure for a UserError, and for lack of memory."""
    try:
        with _warnings_shown(), hushed(args.quiet):
            for library in getattr(args, "libraries", ()):
                needs(library, args.command, f"radix-ops {args.command}")
            if not answers(args):
                importlib.import_module(args.run).run(args)
    except BadRowsError as error:
        raise Failure(error.summary, error.rows) from error
    except UserError as error:
        raise Failure(error.as_option) from error
    except torch.OutOfMemoryError as error:
        raise Failure("out of memory") from error


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Print what the package warns of to standard error, a line each."""
    logger, handler = logging.getLogger("radix_ops"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    propagates, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
