"""`radix-ops embed`: embeddings of texts with shared prefixes computed once."""

from __future__ import annotations

import argparse

import numpy as np

from radix_ops_command.errors import printable

from ..data.output import companion
from ..data.result_formats import MATRIX, format_of
from ..engine import Embedder
from ..engine.errors import UserError
from .compare import Closeness
from .job import Job, prepared
from .nearest import Nearest
from .progress import say
from .reading import read_records


def run(args: argparse.Namespace) -> None:
    ranges, calibrates = _ranges_of(args), _calibrates(args)
    if args.pairs and (args.compare or args.output_dtype == "int8"):
        other = "--compare" if args.compare else "--output-dtype int8"
        raise UserError(f"--pairs and {other} can't both be given: pairs are of one run's floats")
    with prepared(args, MATRIX) as options:
        engine = Embedder(
            args.model,
            pooling=args.pooling,
            prompt=args.prompt,
            prompt_name=args.prompt_name,
            dim=args.dim,
            normalize=False if args.no_normalize else None,
            max_length=args.max_length,
            truncate_right=args.truncate_right,
            output_dtype="float32" if calibrates else args.output_dtype,
            ranges=ranges,
            **options,
        )
        engine.text_key = args.text_key
        records = read_records(args, engine.parse, f'one object {{"{args.text_key}": ...}} a line', task="embed")
        nearest = Nearest(args, engine, records) if args.pairs else None
        on_result = nearest.add if nearest else None
        Job(args, engine, records, "embed", "embedded {count:,} texts:", Closeness(), on_result).run()
        if calibrates:
            name = printable(str(companion(args.output, ".ranges.npy")))
            say(f"{name} holds the ranges of the int8 numbers, those of these texts, for --ranges")
        if nearest:
            nearest.finish(options["device"])


def _calibrates(args: argparse.Namespace) -> bool:
    """Return whether the ranges of int8 numbers are those of this run's own embeddings."""
    if args.output_dtype != "int8" or args.ranges:
        return False
    if args.output is None or not format_of(args.output, MATRIX).is_matrix:
        raise UserError(
            "--output-dtype int8 needs --ranges; without them they are those of all texts, which --output PATH.npy "
            "can wait for"
        )
    return True


def _ranges_of(args: argparse.Namespace) -> np.ndarray | None:
    if not args.ranges:
        return None
    if args.output_dtype != "int8":
        raise UserError("--ranges are for --output-dtype int8 alone")
    try:
        found = np.load(args.ranges, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--ranges {args.ranges} can't be read as a .npy file: {reason}") from error
    if not isinstance(found, np.ndarray):
        raise UserError(f"--ranges {args.ranges} is an archive of arrays; it must be one array, a .npy file")
    return found
