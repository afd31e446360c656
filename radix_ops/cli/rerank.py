"""`radix-ops rerank`: documents ordered by relevance to their query, with shared prefixes computed once."""

from __future__ import annotations

import argparse

from ..data.result_formats import TREC
from ..engine import Reranker, reranking
from .compare import Agreement
from .job import Job, check_keys, prepared
from .reading import read_records


def run(args: argparse.Namespace) -> None:
    with prepared(args, TREC) as options:
        engine = Reranker(
            args.model,
            template=args.template,
            max_length=args.max_length,
            truncate_right=args.truncate_right,
            **options,
        )
        records = read_records(args.file, lambda record: engine.parse(check_keys(record)), reranking.SHAPE)
        Job(args, engine, records, "rerank", "reranked", Agreement("order", "orders", "score", "scores")).run()
