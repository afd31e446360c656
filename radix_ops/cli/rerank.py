"""`radix-ops rerank`: documents ordered by relevance to their query, with shared prefixes computed once."""

from __future__ import annotations

import argparse

from ..data.beir import is_beir, judgements_of
from ..data.judgements import read_qrels
from ..data.measured import check_metrics
from ..data.result_formats import TREC
from ..engine import Reranker, reranking
from .job import Job, prepared
from .judged import Judged, Orders
from .reading import files_read, read_records


def run(args: argparse.Namespace) -> None:
    if args.metrics:
        check_metrics(args.metrics, args.overwrite, *files_read(args), *([args.output] if args.output else []))
    judgements = read_qrels(args.qrels) if args.qrels else None
    if judgements is None and len(args.files) == 1 and is_beir(args.files[0]):
        judgements = judgements_of(args.files[0], args.split) or None
    with prepared(args, TREC) as options:
        engine = Reranker(
            args.model,
            template=args.template,
            max_length=args.max_length,
            truncate_right=args.truncate_right,
            top_k=args.top_k,
            return_documents=args.texts,
            **options,
        )
        judged = Judged(args, judgements)
        records = read_records(args, judged.parser(engine.parse), reranking.SHAPE, task="rerank")
        job = Job(args, engine, records, "rerank", "reranked", Orders(judged), judged.add)
        judged.start(records)  # those that the job can write
        job.run()
        judged.finish()
