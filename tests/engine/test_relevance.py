"""Reranker.evaluate against pytrec_eval on the same scores, and against nDCG@10 by hand."""

import math
import random

import pytest

from helpers.language_models import reranking_tokenizer, tiny_model, transformers
from radix_ops.engine import Reranker, UserError

pytrec_eval = pytest.importorskip("pytrec_eval")
WORDS = ["the", "sea", "river", "Rhine", "Seine", "Thames", "Paris", "question", "answer", "yes", "no"]


@pytest.fixture(scope="module")
def reranker():
    config = tiny_model("Qwen3").config
    config.num_labels, config.pad_token_id = 1, 1
    return Reranker(transformers.Qwen3ForSequenceClassification(config).eval(), reranking_tokenizer())


def beir(num_queries=12, seed=0):
    """Return queries, a corpus and judgements as BEIR has them: graded, negative ones too, and of unseen documents."""
    chosen = random.Random(seed)
    text = lambda: " ".join(chosen.choices(WORDS, k=chosen.randint(2, 9)))  # noqa: E731
    corpus = {f"d{n}": {"title": chosen.choice(["", text()]), "text": text()} for n in range(60)}
    queries = {f"q{n}": text() for n in range(num_queries)}
    qrels = {q: {d: chosen.choice([-1, 0, 0, 1, 2, 3]) for d in chosen.sample(sorted(corpus), 25)} for q in queries}
    return queries, corpus, qrels


def records(queries, corpus, seed=1, most=30):
    """Return a record of each query with candidates of its own, some of which nobody judged."""
    chosen = random.Random(seed)
    found = []
    for query, text in queries.items():
        names = chosen.sample(sorted(corpus), chosen.randint(1, most))
        found.append({"query": text, "query_id": query, "documents": [{"id": d, **corpus[d]} for d in names]})
    return found


def by_pytrec_eval(lines, results, qrels):
    """Return the means over all queries of the judgements; one that isn't ranked counts as 0."""
    run = {
        line["query_id"]: {d["id"]: score for d, score in zip(line["documents"], found["scores"], strict=True)}
        for line, found in zip(lines, results, strict=True)
        if line["documents"]
    }
    measures = {"nDCG@10": "ndcg_cut_10", "RR": "recip_rank", "R@10": "recall_10"}
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.10"}).evaluate(run)
    return {
        name: sum(found.get(query, {}).get(key, 0.0) for query in qrels) / len(qrels) for name, key in measures.items()
    }


def test_measures_are_those_of_pytrec_eval_on_the_same_scores(reranker):
    queries, corpus, qrels = beir()
    lines = records(queries, corpus)
    expected = by_pytrec_eval(lines, reranker.score(lines), qrels)
    found = reranker.evaluate(lines, qrels)
    assert found == pytest.approx(expected, abs=1e-9)
    assert all(0.05 < value < 0.95 for value in found.values())
    # Queries that aren't ranked, or have no documents, count as 0; those that nobody judged don't count.
    part = [*lines[:5], {**lines[5], "documents": []}, {**lines[6], "query_id": "unknown"}]
    expected = by_pytrec_eval(part, reranker.score(part), qrels)
    assert reranker.evaluate(part, qrels) == pytest.approx(expected, abs=1e-9)


def test_relevance_of_the_records_counts_without_judgements(reranker):
    queries, corpus, qrels = beir()
    lines = records(queries, corpus)
    for line in lines:
        line["relevance"] = [qrels[line["query_id"]].get(document["id"], 0) for document in line["documents"]]
    ranks = {line["query_id"]: dict(zip(map(str, range(99)), line["relevance"], strict=False)) for line in lines}
    with_places = [
        {**line, "documents": [{**d, "id": str(n)} for n, d in enumerate(line["documents"])]} for line in lines
    ]
    expected = by_pytrec_eval(with_places, reranker.score(lines), ranks)
    unjudged = {"query": "the sea", "documents": ["a", "b"]}
    texts_alone = [{**line, "documents": [d["title"] + " " + d["text"] for d in line["documents"]]} for line in lines]
    assert reranker.evaluate([*lines, unjudged]) == pytest.approx(expected, abs=1e-9)
    assert reranker.evaluate([{**x, "documents": [t.strip() for t in x["documents"]]} for x in texts_alone]) == (
        pytest.approx(expected, abs=1e-9)
    )


def test_ndcg_is_what_its_formula_gives(reranker):
    line = {"query": "the sea", "documents": ["the river", "yes", "no Paris"], "relevance": [1, 3, 0]}
    (found,) = reranker.score([line])
    gains = [line["relevance"][index] for index in found["order"]]
    dcg, ideal = (sum(g / math.log2(n + 2) for n, g in enumerate(of)) for of in (gains, [3, 1, 0]))
    assert reranker.evaluate([line])["nDCG@10"] == pytest.approx(dcg / ideal, abs=1e-9)


@pytest.mark.parametrize(
    ("line", "judgements", "message"),
    [
        ({}, None, 'no query has a "relevance", a number for each document'),
        ({}, {"q": {"d": 1}}, 'queries\\[0\\] has no "query_id", by which it is judged'),
        ({"query_id": "q"}, {"q": {"d": 1}}, 'queries\\[0\\]: its documents have no "id", by which they are judged'),
        ({"query_id": 7, "documents": []}, {"q": {"d": 1}}, "no query is judged: none of the judgements' ids is a"),
        ({}, {"q": {"d": 0.5}}, "judgements\\['q'\\]\\['d'\\] must be a whole number, 1,000,000 at most, got 0.5"),
        ({}, {"q": {"d": 10**9}}, "must be a whole number, 1,000,000 at most, got 1000000000"),
        ({}, [1], "judgements must be a dict of {query id: {document id: relevance}}"),
    ],
)
def test_what_cannot_be_judged_is_named_before_the_model_runs(reranker, monkeypatch, line, judgements, message):
    monkeypatch.setattr(reranker.runner, "logits", lambda sequences: pytest.fail("the model ran"))
    with pytest.raises(UserError, match=message):
        reranker.evaluate([{"query": "a", "documents": ["b"], **line}], judgements)
    twice = {"query": "a", "query_id": "q", "documents": []}
    with pytest.raises(UserError, match="queries\\[1\\] has the \"query_id\" of queries\\[0\\], 'q'"):
        reranker.evaluate([twice, twice], {"q": {"d": 1}})
