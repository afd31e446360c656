"""Results in each format: the same as JSON lines, continued where a run was stopped, refused where they don't fit."""

import csv
import gzip
import json
import re
import sys

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from helpers.commands import QUERIES, QUESTIONS, failing_command, read_jsonl, write_jsonl
from helpers.language_models import embedding_tokenizer, reranking_tokenizer, tiny_model
from radix_ops import cli
from radix_ops.engine import _engine
from radix_ops.engine.runners import Qwen3Runner

pytest.importorskip("transformers")
TEXTS = [
    {"text": text, "id": f"d{index}", "of": {"n": index}} for index, text in enumerate(["the sea", "", "été", "x"])
]
INPUTS = {
    "score": [{**question, "id": index} for index, question in enumerate(QUESTIONS)],
    "embed": TEXTS,
    "rerank": [{**query, "query_id": f"q{index}"} for index, query in enumerate(QUERIES)],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folder of a model for each command."""
    folders = {command: tmp_path_factory.mktemp(command) for command in INPUTS}
    for command, folder in folders.items():
        model = tiny_model("Qwen3", vocab_size=360, max_position_embeddings=512)
        (model.model if command == "embed" else model).save_pretrained(folder)
        (embedding_tokenizer() if command == "embed" else reranking_tokenizer(False)).save_pretrained(folder)
    return folders


@pytest.fixture
def run(models, tmp_path):
    """Return a function that runs a command to the end on its input."""
    files = {command: write_jsonl(tmp_path / f"{command}.jsonl", lines) for command, lines in INPUTS.items()}

    def run(command, output, *options, file=None, status=0):
        arguments = [command, "--device", "cpu", "--model", models[command], "--output", output, *options]
        assert cli.main([*map(str, arguments), str(file or files[command])]) == status
        return output

    return run


def decoded(text):
    return json.loads(text) if text else None


def read(path):
    """Return the results of a file by other readers than ours, without keys that are empty."""
    name = path.name
    if name.endswith(".parquet"):
        lines = parquet.read_table(path).to_pylist()
    elif name.endswith(".jsonl.zst"):
        lines = [json.loads(line) for line in pyarrow.input_stream(str(path)).read().splitlines()]
    else:
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if ".tsv" in name else ","))
        texts = ("key", "context", "query", "query_id", "instruction")
        lines = [{name: cell if name in texts else decoded(cell) for name, cell in row.items()} for row in rows]
    return [{name: value for name, value in line.items() if value not in (None, "")} for line in lines]


@pytest.mark.parametrize("ending", ["csv", "tsv.gz", "parquet", "jsonl.zst"])
@pytest.mark.parametrize("command", ["score", "rerank"])
def test_a_table_holds_what_json_lines_hold(tmp_path, run, command, ending, capsys):
    expected = read_jsonl(run(command, tmp_path / "o.jsonl"))
    capsys.readouterr()
    output = run(command, tmp_path / f"o.{ending}")
    assert f"wrote {len(expected)} results to {output}\n" in capsys.readouterr().err
    found = read(output)
    assert found == [{name: value for name, value in line.items() if value not in (None, "")} for line in expected]
    held = output.read_bytes()
    run(command, output)
    assert f"{output} holds {len(expected)} of {len(expected)} results already" in capsys.readouterr().err
    assert output.read_bytes() == held


def test_embeddings_in_a_table_are_the_matrixs(tmp_path, run):
    rows = np.load(run("embed", tmp_path / "o.npy"))
    table = parquet.read_table(run("embed", tmp_path / "o.parquet"))
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), rows)
    assert table["of"].to_pylist() == [{"n": index} for index in range(len(TEXTS))]


def test_a_trec_run_ranks_the_documents(tmp_path, run):
    results = read_jsonl(run("rerank", tmp_path / "o.jsonl"))
    lines = [line.split(" ") for line in run("rerank", tmp_path / "o.trec").read_text().splitlines()]
    expected = [
        [f"q{number}", "Q0", str(index), str(rank), str(result["scores"][index])]
        for number, result in enumerate(results)
        for rank, index in enumerate(result["order"], 1)
    ]
    assert [line[:5] for line in lines] == expected


def stop_after(batches, run, monkeypatch, command, output):
    """Run the command with a batch for each row, and interrupt it behind so many."""
    count, inner = 0, Qwen3Runner.states

    def stopping(self, *given):
        nonlocal count
        count += 1
        if count > batches:
            raise KeyboardInterrupt
        return inner(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Qwen3Runner, "states", stopping)
        run(command, output, "--token-budget", 1, status=130)


@pytest.mark.parametrize(
    ("command", "name", "batches"),
    [("score", "o.csv", 4), ("rerank", "o.run", 6), ("embed", "o.parquet", 2), ("embed", "o.jsonl.gz", 2)],
)
def test_a_stopped_run_continues(tmp_path, run, monkeypatch, capsys, command, name, batches):
    whole = run(command, tmp_path / f"whole-{name}", "--token-budget", 1).read_bytes()
    output = tmp_path / name
    stop_after(batches, run, monkeypatch, command, output)
    assert not output.exists()
    assert "the same command continues" in capsys.readouterr().err
    run(command, output, "--dtype", "bfloat16", status=1)
    assert "is no result of this input, model, dtype and mode" in capsys.readouterr().err
    run(command, output, "--token-budget", 1)
    assert output.read_bytes() == whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(f"{name}.")]


@pytest.mark.parametrize("command", INPUTS)
def test_an_unknown_ending_is_refused_before_anything_is_read(tmp_path, capsys, command):
    for name in ("o.xlsx", "o", "o.json", "o.parquet.gz"):
        arguments = command, "--model", "no/model", "--output", tmp_path / name, tmp_path / "absent.jsonl"
        message = failing_command(capsys, *arguments)
        assert f"{name}: the name's ending decides the format, and it must be .jsonl, .ndjson, .csv, .tsv" in message
        assert (".npy" in message) == (command == "embed")
        assert (".trec, .run" in message) == (command == "rerank")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["o.csv", "o.parquet", "o.jsonl.gz", "o.trec"])
def test_files_of_others_are_refused_before_the_model_is_looked_for(tmp_path, capsys, name):
    for content in (b"a,b\n1,2\n", b"PAR1", gzip.compress(b"text"), b"q Q0 d 1 0.5 other\n"):
        (tmp_path / name).write_bytes(content)
        arguments = "rerank", "--model", "no/model", "--output", tmp_path / name, tmp_path / "absent.jsonl"
        assert f"{name} exists and holds no results; --overwrite replaces it" in failing_command(capsys, *arguments)
        assert (tmp_path / name).read_bytes() == content


def test_ids_that_a_run_can_not_hold_are_refused_before_the_model_is_loaded(tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded"))
    file = write_jsonl(tmp_path / "q.jsonl", [{"query": "a", "documents": ["b"], "query_id": "a b"}])
    run("rerank", tmp_path / "o.trec", file=file, status=1)
    assert "q.jsonl, line 1: \"query_id\" is 'a b'; an id of a TREC run has no white space" in capsys.readouterr().err


def test_ids_stand_beside_a_matrix_and_go_with_it(tmp_path, run, capsys):
    output, ids = tmp_path / "o.npy", tmp_path / "o.ids.jsonl"
    run("embed", output)
    assert read_jsonl(ids) == [{"line": index + 1, "id": f"d{index}"} for index in range(len(TEXTS))]
    ids.unlink()
    run("embed", output)
    assert len(read_jsonl(ids)) == len(TEXTS)
    (tmp_path / "plain.txt").write_text("the sea\n")
    run("embed", output, "--overwrite", file=tmp_path / "plain.txt")
    assert not ids.exists()
    ids.write_text('{"title": "mine"}\n')
    run("embed", tmp_path / "o.npy", "--overwrite", file=tmp_path / "plain.txt")
    assert ids.read_text() == '{"title": "mine"}\n'
    output.unlink()
    run("embed", output, file=tmp_path / "plain.txt", status=1)
    assert f"{ids} exists, and the ids of {output} go there; --overwrite replaces it" in capsys.readouterr().err


def test_rows_of_a_matrix_are_told_apart_where_lines_were_left_out(tmp_path, run):
    (tmp_path / "t.jsonl").write_text('{"text": "the sea"}\n{"body": 1}\n{"text": "the river"}\n')
    run("embed", tmp_path / "o.npy", "--on-error", "skip", file=tmp_path / "t.jsonl")
    assert read_jsonl(tmp_path / "o.ids.jsonl") == [{"line": 1}, {"line": 3}]
    (tmp_path / "t.txt").write_text("the sea\nthe river\n")
    run("embed", tmp_path / "p.npy", file=tmp_path / "t.txt")
    assert not (tmp_path / "p.ids.jsonl").exists()


@pytest.mark.parametrize("name", ["o.parquet", "o.csv.zst"])
def test_a_library_that_is_missing_is_named_before_anything_is_read(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    arguments = "score", "--model", "no/model", "--output", tmp_path / name, tmp_path / "absent.jsonl"
    message = failing_command(capsys, *arguments)
    assert f"{name} needs pyarrow" in message
    assert "[data]" in message


def test_ranges_of_one_text_alone_are_refused_before_the_model_is_loaded(tmp_path, run, capsys, monkeypatch):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded"))
    (tmp_path / "one.txt").write_text("the sea\n")
    run("embed", tmp_path / "o.npy", "--output-dtype", "int8", file=tmp_path / "one.txt", status=1)
    assert "int8 takes the range of each column from all texts, and there is one alone" in capsys.readouterr().err


def test_a_trec_run_names_documents_by_their_ids_and_holds_the_best(tmp_path, run):
    documents = [{"id": f"d{index}", "text": text} for index, text in enumerate(["the sea", "yes", "the Thames"])]
    file = write_jsonl(tmp_path / "q.jsonl", [{"query": "river", "query_id": 7, "documents": documents}])
    (result,) = read_jsonl(run("rerank", tmp_path / "o.jsonl", "--top-k", 2, file=file))
    found = run("rerank", tmp_path / "o.run.gz", "--top-k", 2, file=file)
    lines = [line.split(" ")[:5] for line in gzip.decompress(found.read_bytes()).decode().splitlines()]
    assert lines == [
        ["7", "Q0", name, str(rank), str(result["scores"][int(name[1])])] for rank, name in enumerate(result["ids"], 1)
    ]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("command", "name", "batches"), [("score", "o.jsonl", 4), ("rerank", "o.csv", 4), ("embed", "o.jsonl.gz", 2)]
)
def test_a_number_that_was_changed_in_a_stopped_run_is_named(
    tmp_path, run, monkeypatch, capsys, command, name, batches
):
    whole = run(command, tmp_path / f"whole-{name}", "--token-budget", 1).read_bytes()
    output = tmp_path / name
    stop_after(batches, run, monkeypatch, command, output)
    capsys.readouterr()
    under_way = output if name == "o.jsonl" else tmp_path / f"{name}.lines"
    lines = under_way.read_text().splitlines(keepends=True)
    place = len(lines) - 1
    changed = re.sub(r"(\d\.\d*)(\d)", lambda number: number[1] + str((int(number[2]) + 1) % 10), lines[place], count=1)
    assert changed != lines[place]
    assert json.loads(changed)
    under_way.write_text("".join([*lines[:place], changed, *lines[place + 1 :]]))
    run(command, output, "--token-budget", 1, status=1)
    assert (
        f"{under_way}, line {place + 1} was changed since the run wrote it: without that line"
        in capsys.readouterr().err
    )
    under_way.write_text("".join(lines[:place] + lines[place + 1 :]))
    run(command, output, "--token-budget", 1)
    assert output.read_bytes() == whole


TWICE = [
    {"query": "river", "query_id": "a", "documents": ["the sea", "the Rhine"]},
    {"query": "sea", "query_id": "b", "documents": ["the sea"]},
    {"query": "hill", "query_id": "a", "documents": ["the Rhine"]},
    {"query": "rain", "query_id": "c d", "documents": ["yes"]},
    {"query": "salt", "query_id": "e", "documents": [{"id": "x y", "text": "no"}]},
    {"query": "salt", "query_id": "e", "documents": ["no", "yes"]},
]


def test_queries_that_a_run_can_not_name_are_left_out_and_listed_where_asked_for(tmp_path, run, capsys):
    file = write_jsonl(tmp_path / "q.jsonl", TWICE)
    run("rerank", tmp_path / "o.trec", file=file, status=1)
    err = capsys.readouterr().err
    assert "3 of 6 rows can't be used; --on-error skip leaves them out" in err
    output = run("rerank", tmp_path / "o.trec", "--on-error", "skip", file=file)
    err = capsys.readouterr().err
    assert "3 of 6 rows can't be used and were left out:" in err
    assert f"q.jsonl, line 3 has the query_id 'a' of {file}, line 1; a TREC run has each query once" in err
    assert "line 4: \"query_id\" is 'c d'" in err
    assert 'line 5: documents[0]: "id" is' in err
    kept = write_jsonl(tmp_path / "kept.jsonl", [TWICE[index] for index in (0, 1, 5)])
    expected = run("rerank", tmp_path / "kept.trec", file=kept).read_text()
    assert [line.split()[:5] for line in output.read_text().splitlines()] == [
        line.split()[:5] for line in expected.splitlines()
    ]
    held = output.read_bytes()
    run("rerank", output, "--on-error", "skip", file=file)  # a finished run finds the same rows again
    assert output.read_bytes() == held
    assert len(read_jsonl(run("rerank", tmp_path / "o.jsonl", file=file))) == len(TWICE)
