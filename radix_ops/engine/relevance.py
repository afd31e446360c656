"""Measures of rankings against what is known to be relevant, computed by ir-measures as trec_eval computes them.

relevance = Relevance({"q1": {"d7": 1}})
relevance.check(query)  # before the model runs
relevance.add(query, scores)
relevance.measures()  # {"nDCG@10": ..., "RR": ..., "R@10": ...}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral

from .errors import UserError, needs
from .reranking import MOST_RELEVANT, Query

MEASURES = ("nDCG@10", "RR", "R@10")
Judgements = Mapping[str, Mapping[str, int]]  # a document's relevance, by the ids of query and document


class Relevance:
    """The scores of queries' documents beside their relevance: that of given judgements, by the ids of query and
    document, or else that of each query's own "relevance".

    A judged query without scores counts as 0; one that nobody judged doesn't count. Documents of equal scores come in
    the order of trec_eval. Memory holds each score.
    """

    def __init__(self, judgements: Judgements | None = None):
        needs("ir_measures", "rank", "measuring rankings")
        self._is_given = judgements is not None
        self._judged: dict[str, dict[str, int]] = {} if judgements is None else _checked(judgements)
        self._wheres: dict[str, str] = {}  # of queries by their ids
        self._scores: dict[str, dict[str, float]] = {}

    def check(self, query: Query) -> None:
        """Take note of a query. UserError for one that lacks the ids by which it is judged, or has those of another."""
        relevance = query.extra.get("relevance")
        if not self._is_given and relevance:
            self._judged[query.where] = {str(index): int(number) for index, number in enumerate(relevance)}
        if not self._is_given:
            return
        if query.extra.get("query_id") is None:
            raise UserError(f'{query.where} has no "query_id", by which it is judged')
        if query.ids is None and query.documents:
            raise UserError(f'{query.where}: its documents have no "id", by which they are judged')
        name = str(query.extra["query_id"])
        if self._wheres.setdefault(name, query.where) != query.where:
            raise UserError(f'{query.where} has the "query_id" of {self._wheres[name]}, {name!r}')

    @property
    def num_judged(self) -> int:
        """How many queries are judged."""
        return len(self._judged)

    @property
    def num_absent(self) -> int:
        """How many queries of the judgements were not checked."""
        return len(self._judged.keys() - self._wheres.keys()) if self._is_given else 0

    def add(self, query: Query, scores: Iterable[float | None]) -> None:
        """Add the scores of the documents of a query that was checked, None for one that isn't ranked."""
        name = str(query.extra["query_id"]) if self._is_given else query.where
        ids = (query.ids or ()) if self._is_given else range(len(query.documents))
        if query.documents and name in self._judged:
            found = zip(map(str, ids), scores, strict=True)
            self._scores[name] = {document: float(score) for document, score in found if score is not None}

    def measures(self) -> dict[str, float]:
        """Return the mean over all judged queries of each measure, by its name."""
        import ir_measures

        wanted = [ir_measures.parse_measure(name) for name in MEASURES]
        found = ir_measures.calc_aggregate(wanted, self._judged, self._scores)
        return {name: float(found[measure]) for name, measure in zip(MEASURES, wanted, strict=True)}


def _checked(judgements: Judgements) -> dict[str, dict[str, int]]:
    """Return a copy with strings for ids. UserError for anything else than numbers by the ids of query and document."""
    if not isinstance(judgements, Mapping) or not all(isinstance(of, Mapping) for of in judgements.values()):
        raise UserError("judgements must be a dict of {query id: {document id: relevance}}")
    for query, of in judgements.items():
        for document, number in of.items():
            is_whole = isinstance(number, Integral) and not isinstance(number, bool)
            if not is_whole or abs(number) > MOST_RELEVANT:
                raise UserError(
                    f"judgements[{query!r}][{document!r}] must be a whole number, {MOST_RELEVANT:,} at most, got "
                    f"{number!r}"
                )
    return {
        str(query): {str(document): int(number) for document, number in of.items()}
        for query, of in judgements.items()
        if of
    }
