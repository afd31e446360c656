"""What radix-ops rerank says of its ranking, where it is known what is relevant: against pytrec_eval on its scores."""

import json
import random

import numpy as np
import pytest

from helpers.commands import QUERIES, failing_command, read_jsonl, write_jsonl
from helpers.language_models import reranking_tokenizer, tiny_model
from radix_ops import cli
from radix_ops.engine import UserError, _engine, relevance


def rerank(model, *arguments):
    return cli.main(["rerank", "--device", "cpu", "--model", str(model), *map(str, arguments)])


def failing(capsys, model, *arguments):
    return failing_command(capsys, "rerank", "--device", "cpu", "--model", model, *arguments)


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reranker")
    tiny_model("Qwen3", vocab_size=360, max_position_embeddings=512).save_pretrained(folder)
    reranking_tokenizer().save_pretrained(folder)
    return folder


def objects():
    """Return the queries with ids for them and their documents."""
    lines = [{**line, "query_id": f"q{n}"} for n, line in enumerate(QUERIES)]
    for line in lines:
        line["documents"] = [{"id": f"d{n}", "text": text} for n, text in enumerate(line["documents"])]
    return lines


QRELS = {"q0": {"d0": 2, "d1": 0, "d2": 1}, "q2": {"d1": 1, "gone": 1}, "q3": {"d0": 0}, "absent": {"d0": 1}}


def measured(results, qrels=QRELS):
    """Return what pytrec_eval says of results by line, of queries with names; those that aren't there count as 0."""
    pytrec_eval = pytest.importorskip("pytrec_eval")
    run = {
        f"q{n}": {f"d{index}": score for index, score in enumerate(found["scores"])} for n, found in enumerate(results)
    }
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.10"}).evaluate(run)
    means = {key: sum(found.get(q, {}).get(key, 0) for q in qrels) / len(qrels) for key in found["q0"]}
    return {"nDCG@10": means["ndcg_cut_10"], "RR": means["recip_rank"], "R@10": means["recall_10"]}


@pytest.mark.parametrize("kind", ["trec", "beir"])
@pytest.mark.parametrize(
    "options",
    [
        [], ["--compare"], ["--output", "r.jsonl"], ["--top-k", 1, "--output", "r.jsonl"], ["--output", "r.csv.gz"],
        ["--output", "r.trec"],
    ],
)  # fmt: skip
def test_measures_are_those_of_pytrec_eval_on_the_scores_of_the_output(
    reranker, tmp_path, capsys, monkeypatch, kind, options
):
    monkeypatch.chdir(tmp_path)
    path, qrels = write_jsonl(tmp_path / "q.jsonl", objects()), tmp_path / f"qrels.{kind}"
    judged = [(query, document, n) for query, of in QRELS.items() for document, n in of.items()]
    if kind == "trec":
        qrels.write_text("".join(f"{query} 0 {document} {n}\n" for query, document, n in judged))
    else:
        rows = "".join(f"{query}\t{document}\t{n}\n" for query, document, n in judged)
        qrels.write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    assert rerank(reranker, *options, "--qrels", qrels, "--metrics", "m.json", path) == 0
    out, err = capsys.readouterr()
    results = read_jsonl("r.jsonl") if "r.jsonl" in options else [json.loads(x) for x in out.splitlines() if "{" in x]
    if not results:
        assert rerank(reranker, path) == 0
        results = printed(capsys)
    expected = measured(results)
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics.pop("rows") == 4
    assert metrics.pop("judged_queries") == 4
    assert metrics == pytest.approx(expected, abs=1e-6)
    line = next(line for line in err.splitlines() if line.startswith("nDCG@10 "))
    assert line == (
        f"nDCG@10 {expected['nDCG@10']:.4f}, RR {expected['RR']:.4f}, R@10 {expected['R@10']:.4f}: means over 4 judged "
        "queries, of which 1 are not in the input and count as 0"
    )
    if "--output" in options:  # which a finished run says again
        assert rerank(reranker, *options, "--qrels", qrels, path) == 0
        assert line in capsys.readouterr().err.splitlines()


def test_relevance_in_the_rows_is_measured(reranker, tmp_path, capsys):
    lines = [{**line, "relevance": [int(n == 0) for n in range(len(line["documents"]))]} for line in QUERIES]
    del lines[1]["relevance"]
    path = write_jsonl(tmp_path / "q.jsonl", lines)
    assert rerank(reranker, path) == 0
    out, err = capsys.readouterr()
    ranks = [json.loads(line)["order"].index(0) + 1 for n, line in enumerate(out.splitlines()) if n != 1]
    assert f"RR {np.mean([1 / rank for rank in ranks]):.4f}, R@10 1.0000: means over 3 judged queries\n" in err


def test_without_ir_measures_a_run_goes_on_unless_measures_were_asked_for(reranker, tmp_path, capsys, monkeypatch):
    lacks = lambda package, extra, what: (_ for _ in ()).throw(UserError(f"{what} needs {package}, of [{extra}]"))  # noqa: E731
    monkeypatch.setattr(relevance, "needs", lacks)
    path = write_jsonl(tmp_path / "q.jsonl", [{"query": "a", "documents": ["b"], "relevance": [1]}])
    assert rerank(reranker, path) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["scores"]) == 1
    assert "nDCG@10 is not computed: measuring rankings needs ir_measures, of [rank]\n" in err
    assert "measuring rankings needs ir_measures" in failing(capsys, reranker, "--metrics", tmp_path / "m.json", path)


def test_measures_that_nothing_tells_of_are_refused_before_a_model_is_loaded(reranker, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))
    plain, named = write_jsonl(tmp_path / "p.jsonl", QUERIES), write_jsonl(tmp_path / "n.jsonl", objects())
    qrels, metrics = tmp_path / "qrels", tmp_path / "m.json"
    qrels.write_text("other 0 d0 1\n")
    (tmp_path / "wrong").write_text("q0 d0 1 1 1\n")
    (tmp_path / "own.json").write_text('{"a": 1}')
    for arguments, message in [
        (
            ["--metrics", metrics, plain],
            '--metrics needs to know what is relevant, by --qrels or a "relevance" in each',
        ),
        (["--qrels", qrels, plain], 'p.jsonl, line 1 has no "query_id", by which it is judged'),
        (["--qrels", qrels, named], "--qrels judges none of the queries: it has none of their query_id"),
        (["--qrels", tmp_path / "wrong", named], "wrong, line 1 has 5 columns"),
        (["--qrels", tmp_path / "none", named], "none can't be read: No such file"),
        (["--qrels", qrels, "--metrics", qrels, named], "the name must end in .json"),
        (["--qrels", qrels, "--metrics", tmp_path / "own.json", named], "exists and holds no metrics; --overwrite"),
    ]:
        assert message in failing(capsys, reranker, *arguments)


WORDS = ["the", "sea", "river", "Rhine", "Seine", "Thames", "Paris", "question", "answer", "yes", "no"]


def save_beir(folder, num_queries=6, num_documents=25):
    """Save a folder as BEIR has it; return the judgements, which are graded and of a part of the documents."""
    chosen = random.Random(3)
    text = lambda: " ".join(chosen.choices(WORDS, k=chosen.randint(2, 9)))  # noqa: E731
    corpus = [{"_id": f"d{n}", "title": chosen.choice(["", text()]), "text": text()} for n in range(num_documents)]
    queries = [{"_id": f"q{n}", "text": text(), "metadata": {}} for n in range(num_queries)]
    qrels = {q["_id"]: {d["_id"]: chosen.choice([0, 1, 2]) for d in chosen.sample(corpus, 9)} for q in queries[1:]}
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    rows = "".join(f"{query}\t{document}\t{n}\n" for query, of in qrels.items() for document, n in of.items())
    (folder / "qrels" / "test.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    return qrels


def test_a_beir_folder_is_ranked_and_measured(reranker, tmp_path, capsys):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    qrels = save_beir(tmp_path / "beir")
    assert rerank(reranker, "--metrics", tmp_path / "m.json", tmp_path / "beir") == 0
    run = {
        found["query_id"]: {
            name: found["scores"][index] for name, index in zip(found["ids"], found["order"], strict=True)
        }
        for found in printed(capsys)
    }
    assert {query: len(of) for query, of in run.items()} == dict.fromkeys(qrels, 25)
    found = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.10"}).evaluate(run)
    metrics = json.loads((tmp_path / "m.json").read_text())
    for name, key in {"nDCG@10": "ndcg_cut_10", "RR": "recip_rank", "R@10": "recall_10"}.items():
        assert metrics[name] == pytest.approx(np.mean([of[key] for of in found.values()]), abs=1e-9)
    assert 0.1 < metrics["nDCG@10"] < 0.9
    assert metrics["judged_queries"] == metrics["rows"] == 5


def test_queries_that_can_not_be_judged_are_left_out_where_asked_for(reranker, tmp_path, capsys):
    pytest.importorskip("pytrec_eval")
    lines = objects()
    rows = [*lines, {**lines[0], "query": "the sea"}, {key: lines[2][key] for key in ("query", "documents")}]
    qrels = tmp_path / "qrels"
    qrels.write_text(
        "".join(f"{query} 0 {document} {n}\n" for query, of in QRELS.items() for document, n in of.items())
    )
    path = write_jsonl(tmp_path / "q.jsonl", rows)
    assert "2 of 6 rows can't be used; --on-error skip" in failing(capsys, reranker, "--qrels", qrels, path)
    for output in ("r.jsonl", "r.trec"):
        arguments = ["--on-error", "skip", "--metrics", tmp_path / "m.json", "--output", tmp_path / output]
        assert rerank(reranker, *arguments, "--qrels", qrels, path) == 0
        err = capsys.readouterr().err
        assert "2 of 6 rows can't be used and were left out" in err
        assert 'has the "query_id" of' in err or "has the query_id 'q0' of" in err
        found = json.loads((tmp_path / "m.json").read_text())
        assert (found.pop("rows"), found.pop("judged_queries")) == (4, 4)
        assert found == pytest.approx(measured(read_jsonl(tmp_path / "r.jsonl")), abs=1e-6)
