"""`radix-ops embed`: embeddings of texts with shared prefixes computed once."""

from __future__ import annotations

import argparse

from ..data.result_formats import MATRIX
from ..engine import Embedder, embedding
from .compare import Closeness
from .job import Job, check_keys, prepared
from .reading import read_records


def run(args: argparse.Namespace) -> None:
    parse, shape = embedding.parse_text(args.text_key), f'one object {{"{args.text_key}": ...}} a line'
    with prepared(args, MATRIX) as options:
        records = read_records(args.file, lambda record: parse(check_keys(record)), shape, args.format)
        engine = Embedder(
            args.model,
            pooling=args.pooling,
            prompt=args.prompt,
            dim=args.dim,
            normalize=False if args.no_normalize else None,
            max_length=args.max_length,
            truncate_right=args.truncate_right,
            **options,
        )
        Job(args, engine, records, "embed", "embedded {count:,} texts:", Closeness()).run()
