"""The places of the command's results, and the sizes of its batches."""

import json
import os
import random
import tracemalloc

import numpy as np
import pytest
import torch

import radix_ops
from helpers.commands import failing_command, write_jsonl
from helpers.language_models import tiny_model, tiny_tokenizer
from radix_ops import cli
from radix_ops.data import claim
from radix_ops.data.matrix import MatrixFile
from radix_ops.data.records import UserError
from radix_ops.data.results import ResultFile, ResultStream
from radix_ops.plan import budget
from radix_ops.plan.budget import find_budget
from radix_ops_command._main import COMMANDS

transformers = pytest.importorskip("transformers")
CPU, NUM_ITEMS = torch.device("cpu"), 300


def key_of(item):
    return f"key{item}"


def fields_of(item):
    return {"line": item + 1, "text": "é" * (item % 7)}


def added_in_random_order(results, flush_every):
    order = random.Random(0).sample(range(NUM_ITEMS), NUM_ITEMS)
    for count, item in enumerate(order, 1):
        results.add(item, fields_of(item))
        if count % flush_every == 0:
            results.flush()
        yield item
    results.finish()


def check_lines(lines):
    assert [json.loads(line) for line in lines] == [{**fields_of(i), "key": key_of(i)} for i in range(NUM_ITEMS)]


@pytest.mark.parametrize("flush_every", [1, 7, NUM_ITEMS])
def test_a_stream_prints_in_order_and_as_soon_as_it_can(capsys, flush_every):
    out, done = "", set()
    for count, item in enumerate(added_in_random_order(ResultStream(NUM_ITEMS, key_of), flush_every), 1):
        done.add(item)
        out += capsys.readouterr().out
        if count % flush_every == 0:
            assert len(out.splitlines()) == next(i for i in range(NUM_ITEMS + 1) if i not in done)
    check_lines((out + capsys.readouterr().out).splitlines())


def test_a_file_is_put_in_order_and_continues_from_any_cut(tmp_path):
    path = tmp_path / "r.jsonl"
    for item in added_in_random_order(ResultFile(str(path), NUM_ITEMS, key_of, False), 1):
        if item == 17:
            content = path.read_bytes()
    check_lines(path.read_text().splitlines())
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]
    whole = content.count(b"\n")
    for cut in (0, 1, 5, 30, 200):
        path.write_bytes(content[: len(content) - cut])
        results = ResultFile(str(path), NUM_ITEMS, key_of, False)
        assert results.done.sum() == content[: len(content) - cut].count(b"\n") <= whole
        for item in range(NUM_ITEMS):
            if not results.done[item]:
                results.add(item, fields_of(item))
        results.finish()
        check_lines(path.read_text().splitlines())


def test_a_file_that_is_refused_stays_as_it_was(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"line": 1, "key": "key0"}\n{"line": 1, "key": "key0"}\n')
    with pytest.raises(UserError, match="r.jsonl holds a result twice"):
        ResultFile(str(path), NUM_ITEMS, key_of, False)
    path.write_text('{"line": 1, "key": "key0"}\n{"line": 3, "key": "key0"}\n')
    with pytest.raises(UserError, match="r.jsonl, line 2 is no result of this input"):
        ResultFile(str(path), NUM_ITEMS, key_of, False)
    assert path.read_text().count("\n") == 2


@pytest.mark.parametrize("kind", ["file", "stream"])
def test_results_that_wait_take_no_memory(tmp_path, capsys, kind):
    num_items, text = 4000, "x" * 5000
    tracemalloc.start()
    try:
        if kind == "file":
            results = ResultFile(str(tmp_path / "r.jsonl"), num_items, key_of, False)
        else:
            results = ResultStream(num_items, key_of)
        for item in reversed(range(1, num_items)):
            results.add(item, {"line": item + 1, "text": text})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 * num_items + 2**18


def test_a_budget_is_what_half_of_the_free_memory_holds(monkeypatch):
    config = tiny_model("Qwen3", num_key_value_heads=2).config
    # A row takes 4 hidden, 2 (heads + kv_heads) head_dim and 3 intermediate elements, each of its 8 tokens
    # 2 kv_heads head_dim and 2 hidden, and each token of the longest sequence 8 bytes.
    elements = 4 * 32 + 2 * (4 + 2) * 8 + 3 * 64 + 8 * (2 * 2 * 8 + 2 * 32)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        a_row = size * elements + 8 * 100
        for rows in (1500, 3999):
            monkeypatch.setattr(budget, "free_memory", lambda device, rows=rows, a_row=a_row: 2 * rows * a_row)
            assert find_budget(config, dtype, CPU, 100, False).max_rows == rows
    for free, rows in ((0, 1024), (2**50, 4096)):
        monkeypatch.setattr(budget, "free_memory", lambda device, free=free: free)
        assert find_budget(config, torch.float32, CPU, 100, False).max_rows == rows
    assert find_budget(config, torch.float32, torch.device("cuda"), 100, False).max_rows == 65_536
    # The longest fits with what it shares nearly all with.
    assert find_budget(config, torch.float32, CPU, 40_000, False).max_rows == 50_000


def test_a_budget_can_be_found_for_every_kind_of_config(monkeypatch):
    configs = [transformers.GPT2Config(), transformers.MixtralConfig(), transformers.Gemma2Config()]
    configs += [transformers.Gemma3Config(), transformers.Gemma3nTextConfig(), transformers.DeepseekV3Config()]
    monkeypatch.setattr(budget, "free_memory", lambda device: 2**31)
    for config in configs:
        assert 1024 <= find_budget(config, torch.float32, CPU, 1000, False).max_rows <= 4096
    config = transformers.Gemma2Config()
    rows = [find_budget(config, torch.float32, CPU, 1024, own_attention).max_rows for own_attention in (True, False)]
    assert rows[0] < rows[1]


def test_free_memory_is_some_of_the_machines():
    size = budget.free_memory(CPU)
    assert 2**20 < size < 2**50


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches_by_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"\n  radix-ops {command} " in out
    assert "does not pay" in out or command in ("inspect", "schema", "completion")


def test_a_checkpoint_without_all_weights_is_refused(tmp_path, capsys):
    """transformers would draw what is missing at random."""
    folder = tmp_path / "base"
    tiny_model(max_position_embeddings=256).model.save_pretrained(folder)
    tiny_tokenizer(adds_bos=True).save_pretrained(folder)
    (tmp_path / "questions.jsonl").write_text('{"context": "the", "choices": [" sea"]}\n')
    assert cli.main(["score", "--device", "cpu", "--model", str(folder), str(tmp_path / "questions.jsonl")]) == 1
    assert "lack lm_head.weight for LlamaForCausalLM" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("suffix", [".part", ".rows", ".rows.tmp"])
def test_an_input_that_stands_where_the_output_is_made_is_refused(tmp_path, suffix):
    inputs = tmp_path / f"out.npy{suffix}"
    inputs.write_text("the sea\n")
    with pytest.raises(UserError, match=r"is made by way of .*out\.npy\S+, which is the input file"):
        claim.check_path(str(tmp_path / "out.npy"), str(inputs))


@pytest.mark.parametrize(
    "line",
    [
        '{"line": 1.0, "key": "x"}',
        '{"line": 1.5, "key": "x"}',
        '{"line": "1", "key": "x"}',
        '{"line": %s, "key": "x"}' % ("1" * 5000),
        '{"line": 1, "key": "x", "n": [%s]}' % ("1" * 5000),
    ],
    ids=range(5),
)
def test_lines_of_other_programs_are_no_results(tmp_path, line):
    path = tmp_path / "out.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match="line 1 is no result of this input"):
        ResultFile(str(path), 3, lambda index: "x", False)


def test_a_matrix_whose_rows_were_lost_says_how_to_start_anew(tmp_path):
    path = tmp_path / "out.npy"
    MatrixFile(str(path), (3, 2), "key", False)
    part = tmp_path / "out.npy.part"
    for spoil in (lambda: part.write_bytes(part.read_bytes()[:50]), part.unlink):
        spoil()
        with pytest.raises(UserError, match="is not what the interrupted run left beside .*--overwrite starts anew"):
            MatrixFile(str(path), (3, 2), "key", False)


@pytest.mark.parametrize("command", ["embed", "score", "rerank"])
def test_outputs_are_refused_before_the_model_is_looked_for(tmp_path, capsys, monkeypatch, command):
    def refusal(output):
        return failing_command(capsys, command, "--model", "no/model", "--output", output, tmp_path / "in.jsonl")

    write_jsonl(
        tmp_path / "in.jsonl", [{"text": "a", "context": "a", "choices": ["b"], "query": "a", "documents": ["b"]}]
    )
    for line in (b"[1]\n", b'{"id": 1}\n', b"\xff\n", b"text"):
        (tmp_path / "mine.jsonl").write_bytes(line)
        assert "mine.jsonl exists and holds no results; --overwrite replaces it" in refusal(tmp_path / "mine.jsonl")
        assert (tmp_path / "mine.jsonl").read_bytes() == line
    if command == "embed":
        np.save(tmp_path / "mine.npy", np.zeros(3))
        assert "mine.npy exists and is complete; --overwrite replaces it" in refusal(tmp_path / "mine.npy")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    assert "new.jsonl can't be written" in refusal(tmp_path / "new.jsonl")


def test_a_link_stays_and_files_beside_an_output_do_too(tmp_path):
    target, link, notes = (tmp_path / name for name in ("target.jsonl", "link.jsonl", "target.jsonl.tmp"))
    notes.write_text("mine")
    link.symlink_to(target)
    for _ in added_in_random_order(ResultFile(str(link), NUM_ITEMS, key_of, False), 7):
        pass
    assert link.is_symlink()
    check_lines(target.read_text().splitlines())
    matrix, matrix_link = tmp_path / "target.npy", tmp_path / "link.npy"
    matrix_link.symlink_to(matrix)
    for part in (range(2), range(2, 4)):  # the second run continues the first
        results = MatrixFile(str(matrix_link), (4, 3), "key", False)
        results.write(np.array(part), np.ones((2, 3)))
    results.finish()
    assert matrix_link.is_symlink()
    assert (np.load(matrix) == 1).all()
    assert notes.read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "link.jsonl", "link.npy", "target.jsonl", "target.jsonl.tmp", "target.npy"
    ]  # fmt: skip

    (tmp_path / "other.npy.part").write_text("mine")
    with pytest.raises(UserError, match=r"other.npy.part exists and is of no run; --overwrite replaces it$"):
        MatrixFile(str(tmp_path / "other.npy"), (4, 3), "key", False)
    assert (tmp_path / "other.npy.part").read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "name", "whose"),
    [
        *((command, "o.npy", "a matrix of embeddings, which embed") for command in ("score", "rerank", "classify")),
        *((command, "o.trec", "ranked documents, which rerank") for command in ("score", "embed", "classify")),
    ],
)
def test_a_format_of_another_command_is_refused_and_the_own_ones_are_named(tmp_path, capsys, command, name, whose):
    message = failing_command(capsys, command, "--model", "m", "--output", tmp_path / name, tmp_path / "in.jsonl")
    assert f"{whose} alone writes; here the ending decides the format, and it must be .jsonl, .ndjson, .csv," in message
    own = {"embed": " or .npy;", "rerank": ".trec, .run, .parquet;"}.get(command, "or .parquet;")
    assert own.replace(".run, .parquet", ".run or .parquet") in message


def test_comparing_names_the_file_that_is_there(tmp_path, capsys):
    (tmp_path / "o.npy.rows").touch()
    arguments = "--model", "m", "--compare", "--output", tmp_path / "o.npy", tmp_path / "in.jsonl"
    assert "o.npy.rows exists and --compare times whole runs" in failing_command(capsys, "embed", *arguments)


def test_version(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"radix-ops {radix_ops.__version__}\n"
