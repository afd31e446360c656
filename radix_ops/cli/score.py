"""`radix-ops score`: multiple-choice questions scored with shared prefixes computed once."""

from __future__ import annotations

import argparse

from ..engine import Scorer, scoring
from .compare import Agreement
from .job import Job, check_keys, prepared
from .reading import read_records


def run(args: argparse.Namespace) -> None:
    with prepared(args) as options:
        records = read_records(args.file, lambda record: scoring.parse_item(check_keys(record)), scoring.SHAPE)
        engine = Scorer(args.model, truncate_left=args.truncate_left, **options)
        differences = Agreement("best", "answers", "choice's log-probability", "logprobs")
        Job(args, engine, records, "score", "scored", differences).run()
