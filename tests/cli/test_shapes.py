"""The command on a thousand rows of each of the hub's shapes, on named columns, on ids and on BEIR folders."""

import csv
import json

import numpy as np
import pytest

from helpers import hub_rows
from helpers.commands import failing_command, failing_inspect, inspect_json, read_jsonl, write_jsonl
from helpers.language_models import needs_hf, tiny_model, tiny_tokenizer
from radix_ops import cli
from radix_ops.engine import Embedder, Reranker, Scorer

needs_hf()
TEXT = "Query: {query}\nDocument: {document}\nRelevant:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model with a tokenizer and a template whose answers are ids."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    (folder / "template.json").write_text(json.dumps({"text": TEXT, "yes": 5, "no": 6}))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Save the model without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_model().save_pretrained(folder)
    (folder / "template.json").write_text(json.dumps({"text": TEXT, "yes": 5, "no": 6}))
    return folder


def run(task, model, file, *options):
    """Run a command; return the lines of its output."""
    output = file.with_suffix(".out.jsonl") if file.is_file() else file.parent / "out.jsonl"
    template = ["--template", str(model / "template.json")] if task == "rerank" else []
    arguments = [
        task,
        "--device",
        "cpu",
        "--model",
        model,
        "--overwrite",
        "--output",
        output,
        *template,
        *options,
        file,
    ]
    assert cli.main(list(map(str, arguments))) == 0
    return read_jsonl(output)


def parquet(path, rows):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("name", hub_rows.QUESTIONS)
def test_a_thousand_questions_of_each_shape_are_scored(folder, tmp_path, name):
    rows, answers = hub_rows.rows_of(name)
    found = run("score", folder, parquet(tmp_path / "test.parquet", rows))
    assert [line["gold"] for line in found] == answers
    assert [line["row"] for line in found] == list(range(1, 1001))
    expected = Scorer(folder, device="cpu").score(rows[:5])
    for line, result in zip(found, expected, strict=False):
        assert line["logprobs"] == pytest.approx(result["logprobs"], abs=1e-4)
        assert {key: line[key] for key in result.keys() - {"logprobs"}} == {
            k: v for k, v in result.items() if k != "logprobs"
        }


@pytest.mark.parametrize("name", hub_rows.RANKINGS)
def test_a_thousand_queries_of_each_shape_are_ranked(folder, tmp_path, name):
    rows, answers = hub_rows.rows_of(name)
    found = run("rerank", folder, parquet(tmp_path / "test.parquet", rows))
    assert [line["relevance"] for line in found] == answers
    expected = Reranker(folder, template=folder / "template.json", device="cpu").score(rows[:5])
    for line, result in zip(found, expected, strict=False):
        assert line["scores"] == pytest.approx(result["scores"], abs=1e-5)
        assert sorted(line["order"]) == list(range(len(line["relevance"])))


@pytest.mark.parametrize("name", [*hub_rows.QUESTIONS, *hub_rows.RANKINGS])
def test_inspect_reads_each_shape(capsys, folder, tmp_path, name):
    rows, _ = hub_rows.rows_of(name, 20)
    template = ["--template", folder / "template.json"] if name in hub_rows.RANKINGS else []
    summary = inspect_json(capsys, write_jsonl(tmp_path / "rows.jsonl", rows), "--tokenizer", folder, *template)
    if template:
        encoder = Reranker(folder, template=folder / "template.json", device="cpu", lazy=True)
    else:
        encoder = Scorer(folder, device="cpu", lazy=True)
    items = encoder.encode(encoder._parsed(rows, "rows", ""))
    assert (summary["sequences"], summary["tokens"]) == (len(items.store), int(items.lengths.sum()))


def test_inspect_asks_by_letters(capsys, folder, tmp_path):
    rows, _ = hub_rows.rows_of("mmlu", 20)
    summary = inspect_json(capsys, write_jsonl(tmp_path / "rows.jsonl", rows), "--tokenizer", folder, "--letters")
    scorer = Scorer(folder, device="cpu", lazy=True, letters=True)
    assert summary["tokens"] == int(scorer.encode(scorer._parsed(rows, "rows", "")).lengths.sum())


def test_named_columns_are_read(folder, tmp_path):
    rows = [{"question": "the sea", "passages": [{"text": "a river"}, {"text": "the Seine"}], "n": n} for n in range(3)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    found = run("rerank", folder, file, "--column", "query=question,documents=passages.text")
    own = [{"query": "the sea", "documents": ["a river", "the Seine"]}]
    (expected,) = Reranker(folder, template=folder / "template.json", device="cpu").score(own)
    assert [(line["scores"], line["n"]) for line in found] == [
        (pytest.approx(expected["scores"], abs=1e-5), n) for n in range(3)
    ]
    assert "passages" not in found[0]


def test_errors_of_columns_and_shapes_name_the_row_and_the_option(capsys, folder, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"context": "c", "question": "q", "choices": ["a"]}])
    command = ["score", "--model", folder, file]
    message = failing_command(capsys, *command)
    assert "rows.jsonl, line 1 can be read by" in message
    assert "--shape context or --shape question says which" in message
    assert "can be read by" in failing_inspect(capsys, file, "--tokenizer", folder)
    assert len(run("score", folder, file, "--shape", "question")) == 1
    assert len(run("score", folder, file, "--column", "context=context")) == 1
    message = failing_command(capsys, *command, "--column", "choices=choises")
    assert "rows.jsonl, line 1 has no column 'choises'; it has 'choices', " in message
    message = failing_command(capsys, *command, "--column", "choices=a", "--column", "choices=b")
    assert "--column names a and b for choices; a key has one column" in message
    for options in (["--column", "choices"], ["--column", "a=b,a=c"], ["--column", "=a"], ["--shape", "mteb"]):
        with pytest.raises(SystemExit):
            cli.main(list(map(str, [*command, *options])))
    assert "must be KEY=COLUMN" in capsys.readouterr().err


def test_another_column_is_another_run(capsys, folder, tmp_path):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"context": "c", "choices": [" a", " b"], "right": 1, "wrong": 0}])
    run("score", folder, file, "--column", "gold=right")
    command = ["score", "--device", "cpu", "--model", folder, "--output", file.with_suffix(".out.jsonl"), file]
    assert "is no result of this input" in failing_command(capsys, *command, "--column", "gold=wrong")


def test_ids_need_no_tokenizer(bare, tmp_path):
    sequences = [[3, 17, 30], [3, 17, 41, 5], [3, 9]]
    rows = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": ids} for ids in sequences])
    packed = tmp_path / "ids.npz"
    np.savez(packed, input_ids=np.concatenate(sequences), cu_seqlens=np.cumsum([0, *map(len, sequences)]))
    expected = Embedder(bare, device="cpu").embed([{"input_ids": ids} for ids in sequences])
    for file in (rows, packed):
        found = run("embed", bare, file)
        np.testing.assert_allclose([line["embedding"] for line in found], expected, atol=1e-6)
        assert [line["tokens"] for line in run("score", bare, file)] == [2, 3, 1]
        ranked = run("rerank", bare, file)
        assert [len(line["scores"]) for line in ranked] == [1, 1, 1]
    whole = write_jsonl(tmp_path / "prompts.jsonl", [{"input_ids": sequences, "id": 7}])
    (line,) = run("rerank", bare, whole)
    assert line["scores"] == pytest.approx([line["scores"][0] for line in ranked], abs=1e-6)
    questions = write_jsonl(tmp_path / "q.jsonl", [{"context_ids": [3, 17], "choices_ids": [[30], [41, 5]], "gold": 1}])
    (line,) = run("score", bare, questions)
    assert (line["tokens"], line["gold"]) == ([1, 2], 1)


@pytest.mark.parametrize(
    ("row", "count", "tokens"),
    [
        ({"input_ids": [[3, 17], [3, 17, 30]]}, 2, 5),
        ({"context_ids": [3, 17], "choices_ids": [[30], [41, 5]]}, 2, 5),
        ({"input_ids": [1, 3, 17], "attention_mask": [0, 1, 1]}, 1, 2),
    ],
)
def test_inspect_reads_ids_of_each_shape(capsys, tmp_path, row, count, tokens):
    summary = inspect_json(capsys, write_jsonl(tmp_path / "ids.jsonl", [row]))
    assert (summary["sequences"], summary["tokens"]) == (count, tokens)


def test_ids_that_the_model_lacks_are_refused_by_name(capsys, bare, tmp_path):
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [1, 340]}])
    message = failing_command(capsys, "embed", "--device", "cpu", "--model", bare, file)
    assert 'ids.jsonl, line 1: "input_ids"[1] is 340; the model\'s token ids are from 0 to 339' in message


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "rivers"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{n}", "title": "the sea", "text": f"the river {n}", "metadata": {}} for n in range(6)]
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": f"which river {n}"} for n in range(4)])
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td2\t1\nq3\td4\t2\n")
    (folder / "run.trec").write_text("q1 Q0 d2 1 2 bm25\nq1 Q0 d5 2 1 bm25\nq3 Q0 d0 1 1 bm25\n")
    return folder


def test_a_beir_folder_is_ranked(folder, beir):
    found = run("rerank", folder, beir)
    assert [(line["line"], line["query_id"], len(line["scores"])) for line in found] == [(2, "q1", 6), (4, "q3", 6)]
    row = {"query": "which river 1", "documents": [f"the sea the river {n}" for n in range(6)]}
    (expected,) = Reranker(folder, template=folder / "template.json", device="cpu").score([row])
    assert found[0]["scores"] == pytest.approx(expected["scores"], abs=1e-5)
    few = run("rerank", folder, beir, "--candidates", beir / "run.trec")
    assert few[0]["scores"] == pytest.approx([expected["scores"][2], expected["scores"][5]], abs=1e-5)
    assert set(few[0]["ids"]) == {"d2", "d5"}


def test_a_beir_folder_is_inspected(capsys, folder, beir):
    options = ["--tokenizer", folder, "--template", folder / "template.json"]
    assert inspect_json(capsys, beir, *options)["sequences"] == 12
    assert inspect_json(capsys, beir, *options, "--candidates", beir / "run.trec")["sequences"] == 3


def test_files_of_a_beir_folder_are_texts(folder, beir):
    found = run("embed", folder, beir / "corpus.jsonl")
    expected = Embedder(folder, device="cpu").embed([f"the sea the river {n}" for n in range(6)])
    np.testing.assert_allclose([line["embedding"] for line in found], expected, atol=1e-6)
    assert [line["_id"] for line in found] == [f"d{n}" for n in range(6)]
    assert len(run("embed", folder, beir / "queries.jsonl")) == 4


def test_errors_of_beir_folders(capsys, folder, beir, tmp_path):
    message = failing_command(capsys, "embed", "--model", folder, beir)
    assert "is a BEIR folder, which rerank reads; name its corpus or its queries to read texts" in message
    rerank = ["rerank", "--model", folder, "--template", folder / "template.json"]
    message = failing_command(capsys, *rerank, "--split", "train", beir)
    assert "has no judgements qrels/train.tsv for --split; it has test" in message
    file = write_jsonl(tmp_path / "q.jsonl", [{"query": "q", "documents": ["a"]}])
    message = failing_command(capsys, *rerank, "--split", "test", file)
    assert "--split is for a BEIR folder, one with corpus.jsonl and queries.jsonl" in message


MMLU = [
    ['Which river, "they say", flows\nthrough Paris?', "the Seine", "the Rhine", "the sea", "A", "A"],
    ["Is the sea salty?", "yes", "no", "yes, and deep", "no, never", "C"],
    ["Which is a letter?", "B", "A", "D", "C", "D"],
]


def mmlu_csv(path, *before, rows=MMLU):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([*before, *rows])
    return path


@pytest.mark.parametrize("letters", [False, True])
def test_mmlus_own_tables_are_scored_as_its_rows_on_the_hub(folder, tmp_path, capsys, letters):
    rows = [
        {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5]), "subject": "rivers"} for row in MMLU
    ]
    options = ["--letters"] * letters
    expected = run("score", folder, write_jsonl(tmp_path / "hub.jsonl", rows), *options)
    folder_of_csv = tmp_path / "test"
    folder_of_csv.mkdir()
    for file in (
        mmlu_csv(tmp_path / "rivers_test.csv"),
        mmlu_csv(tmp_path / "headed.csv", ["question", "A", "B", "C", "D", "answer"]),
        mmlu_csv(
            tmp_path / "mmmlu.csv", ["", "Question", *"ABCD", "Answer"], rows=[[n, *r] for n, r in enumerate(MMLU)]
        ),
        mmlu_csv(
            tmp_path / "answer_first.csv", ["question", "answer", *"ABCD"], rows=[[r[0], r[5], *r[1:5]] for r in MMLU]
        ),
        mmlu_csv(folder_of_csv / "rivers_test.csv").parent,
    ):
        found = run("score", folder, file, *options)
        assert [line["row"] for line in found] == [1, 2, 3]
        assert [line["gold"] for line in found] == [0, 2, 3]
        for line, wanted in zip(found, expected, strict=True):
            assert line["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-5)
            assert {key: line[key] for key in ("tokens", "best", "greedy")} == {
                key: wanted[key] for key in ("tokens", "best", "greedy")
            }
    summary = inspect_json(capsys, tmp_path / "rivers_test.csv", "--tokenizer", folder, *options)
    hub = inspect_json(capsys, tmp_path / "hub.jsonl", "--tokenizer", folder, *options)
    assert (summary["sequences"], summary["tokens"]) == (hub["sequences"], hub["tokens"])


def test_tables_that_are_not_mmlus_are_read_by_their_header(capsys, folder, tmp_path):
    first = [["id", "question", *"ABCD"], [7, "Is the sea salty?", "yes", "no", "maybe", "never"]]
    (line,) = run("score", folder, mmlu_csv(tmp_path / "unanswered.csv", rows=first))
    assert (len(line["logprobs"]), line["id"], "gold" in line) == (4, "7", False)
    bad = mmlu_csv(tmp_path / "bad.csv", rows=[*MMLU, ["What?", "a", "b", "c", "d", "E"], ["What?", "a", "A"]])
    message = failing_command(capsys, "score", "--model", folder, bad)
    assert "bad.csv, row 4: \"answer\" is 'E', which must be one of the labels, 'A', 'B', 'C', 'D'" in message
    assert "bad.csv, row 5 has 3 cells and the header has 6" in message
    # Other commands have no such questions; a file that starts otherwise is told of by --header.
    message = failing_command(capsys, "embed", "--model", folder, mmlu_csv(tmp_path / "t.csv", rows=MMLU[1:]))
    assert 't.csv, row 1 has no "text"' in message
    found = run(
        "score",
        folder,
        mmlu_csv(tmp_path / "u.csv", rows=[["What?", *"wxyz", ""], *MMLU]),
        "--header",
        "question,A,B,C,D,answer",
    )
    assert [line.get("gold") for line in found] == [None, 0, 2, 3]
