"""How a run of `radix-ops rerank` ranks what is known to be relevant: told on standard error, written where asked."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ..data.measured import write_metrics
from ..data.records import Records
from ..data.result_formats import TREC, format_of
from ..data.trec import query_id, read_scores
from ..engine.errors import UserError
from ..engine.inputs import Record
from ..engine.relevance import Judgements, Relevance
from ..engine.reranking import Query
from .compare import Agreement
from .field_of_results import FieldOfResults
from .job import Job, Numbers
from .progress import say


class Judged:
    """The measures of a run, where relevance is known."""

    def __init__(self, args: argparse.Namespace, judgements: Judgements | None):
        self._output, self._path, self._judgements = args.output, args.metrics, judgements
        self._is_asked = bool(args.metrics or args.qrels)
        self._relevance: Relevance | None = None
        self._has_relevance = False

    def parser(self, parse: Callable[[Record], Query]) -> Callable[[Record], Query]:
        """Return `parse`, which lets this see whether records say what is relevant."""

        def parse_and_look(record: Record) -> Query:
            query = parse(record)
            self._has_relevance = self._has_relevance or bool(query.extra.get("relevance"))
            return query

        return parse_and_look

    def start(self, records: Records[Query]) -> None:
        """Check all queries, and refuse those that can't be judged, as --on-error says. UserError where measures were
        asked for, and nothing says what is relevant."""
        self._records, self._scores = records, FieldOfResults("scores", self._output, records, self.count)
        if self._judgements is None and not self._has_relevance:
            if self._path:
                raise UserError('--metrics needs to know what is relevant, by --qrels or a "relevance" in each row')
            return
        try:
            relevance = Relevance(self._judgements)
        except UserError as error:
            if self._is_asked:
                raise
            say(f"nDCG@10 is not computed: {error}")
            return
        reasons = {}
        for item in self._usable:
            try:
                relevance.check(records[item])
            except UserError as error:
                reasons[item] = error
        records.refuse(reasons)
        if relevance.num_judged == relevance.num_absent:
            raise UserError("--qrels judges none of the queries: it has none of their query_id")
        self._relevance = relevance

    @property
    def _usable(self) -> Iterator[int]:
        return (item for item in range(len(self._records)) if item not in self._records.refused)

    def add(self, result: dict[str, Any]) -> None:
        """Count a result where no --output holds it."""
        if self._relevance is not None:
            self._scores.add(result)

    def count(self, item: int, scores: Iterable[float | None]) -> None:
        """Count the scores of a record's documents; those that come last are the ones that are measured."""
        if self._relevance is not None:
            self._relevance.add(self._records[item], scores)

    def finish(self) -> None:
        """Tell and write what all results say."""
        relevance = self._relevance
        if relevance is None:
            return
        form = None if self._output is None else format_of(self._output, TREC)
        if form is not None and form.kind == TREC:
            self._count_run(read_scores(self._output, form.compression))
        else:
            self._scores.finish()
        found = relevance.measures()
        measures = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        absent = f", of which {relevance.num_absent:,} are not in the input and count as 0"
        say(f"{measures}: means over {relevance.num_judged:,} judged queries{absent if relevance.num_absent else ''}")
        if self._path:
            write_metrics(self._path, {"rows": len(self._records), "judged_queries": relevance.num_judged, **found})

    def _count_run(self, run: Mapping[str, Mapping[str, float]]) -> None:
        """Count the scores of a TREC run, which has the best documents alone where so many were asked for."""
        for item in self._usable:
            query = self._records[item]
            ranked = run.get(query_id(query.extra.get("query_id"), self._records.origin(item)), {})
            self.count(item, [ranked.get(str(name)) for name in query.ids or range(len(query.documents))])


class Orders(Agreement):
    """Counts how often orders agree, and how far scores are apart; those of the folded run are measured."""

    def __init__(self, judged: Judged):
        super().__init__("order", "orders", "score", "scores")
        self._judged = judged

    def add(self, job: Job, item: int, plain: Numbers, folded: Numbers) -> None:
        super().add(job, item, plain, folded)
        self._judged.count(item, job.fields_of(item, folded)["scores"])
