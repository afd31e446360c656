"""radix-ops score: against transformers one sequence at a time, outputs, resuming, refusals."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from expecttest import assert_expected_inline

from helpers import processes
from helpers.commands import QUESTIONS, failing_command, read_jsonl, score, write_jsonl
from helpers.language_models import checked_scores, needs_hf, tiny_classifier, tiny_model, tiny_tokenizer

pytest.importorskip("transformers")

from radix_ops.cli import compare, job
from radix_ops.data.fingerprint import fingerprint
from radix_ops.data.records import Records
from radix_ops.engine import _engine, loading, scoring
from radix_ops.engine.batches import RunStats
from radix_ops.engine.runners import TransformersRunner


@pytest.fixture
def questions(tmp_path):
    return write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)


def scoring_records(path):
    return Records(path, scoring.parse_item)


def failing(capsys, *arguments) -> str:
    return failing_command(capsys, "score", "--device", "cpu", "--model", *arguments)


def check_results(results, questions=QUESTIONS, model=None):
    model, tokenizer = model or tiny_model(max_position_embeddings=256), tiny_tokenizer(True)
    assert [r["line"] for r in results] == list(range(1, len(questions) + 1))
    for found, extra in checked_scores(results, questions, model, tokenizer):
        assert {k: found[k] for k in extra} == extra
        assert set(found) == {"line", *extra, *scoring.RESERVED_KEYS, "key"}


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_score_writes_results_to_standard_output_in_input_order(model_folder, questions, capsys, budget):
    assert score(model_folder, "--plain", "--token-budget", budget, questions) == 0
    out, err = capsys.readouterr()
    check_results([json.loads(line) for line in out.splitlines()])
    assert re.search(r"scored [\d,]+ tokens as [\d,]+ rows in [\d.]+ s", err)
    assert "\r" not in err  # a bar's, which has no place in a pipe


def test_score_folds_by_default(model_folder, questions, capsys):
    needs_hf()
    assert score(model_folder, questions) == 0
    out, err = capsys.readouterr()
    check_results([json.loads(line) for line in out.splitlines()])
    tokens, rows = (
        int(n.replace(",", "")) for n in re.search(r"scored ([\d,]+) tokens as ([\d,]+) rows", err).groups()
    )
    assert rows < tokens / 2


def test_score_runs_a_qwen3_on_our_model(questions, tmp_path, capsys, monkeypatch):
    model = tiny_model("Qwen3", max_position_embeddings=256)
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(True).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "TransformersRunner", lambda *arguments: pytest.fail("ran on transformers"))
    for options in ([], ["--plain"], ["--token-budget", 50]):
        assert score(tmp_path / "model", *options, questions) == 0
        check_results([json.loads(line) for line in capsys.readouterr().out.splitlines()], model=model)


def test_score_puts_the_finished_file_into_input_order(model_folder, questions, tmp_path):
    output = tmp_path / "scores.jsonl"
    assert score(model_folder, "--plain", "--token-budget", 60, "--output", output, questions) == 0
    check_results(read_jsonl(output))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["questions.jsonl", "scores.jsonl"]


def interrupted_run(monkeypatch, model, output, questions, batches):
    """Stop a plain run after some batches; return the lines that a kill at that moment would have left."""
    inner, on_disk = TransformersRunner.states, []

    def stopping(*arguments):
        on_disk.append(output.read_bytes())
        if len(on_disk) > batches:
            raise KeyboardInterrupt
        return inner(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersRunner, "states", stopping)
        assert score(model, "--plain", "--token-budget", 1, "--output", output, questions) == 130
    return on_disk[-1]


def test_score_continues_an_interrupted_run(model_folder, questions, tmp_path, monkeypatch, capsys):
    output = tmp_path / "scores.jsonl"
    left = interrupted_run(monkeypatch, model_folder, output, questions, batches=4)
    assert [json.loads(line)["line"] for line in left.splitlines()] == [1, 4]
    assert "the same command continues" in capsys.readouterr().err

    output.write_bytes(left + b'{"line": 2, "id": "sho')
    scored = []
    inner = TransformersRunner.states
    monkeypatch.setattr(TransformersRunner, "states", lambda self, s, *t: scored.extend(s) or inner(self, s, *t))
    assert score(model_folder, "--plain", "--output", output, questions) == 0
    assert len(scored) == len(QUESTIONS[1]["choices"]) + len(QUESTIONS[2]["choices"])
    check_results(read_jsonl(output))
    left = re.sub(rb':[0-9a-f]{8}"}\n', b'"}\n', left)  # checksums go when the file is finished
    assert set(left.splitlines()) <= set(output.read_bytes().splitlines())
    assert "holds 2 of 4 results already" in capsys.readouterr().err

    scored.clear()
    finished = output.read_bytes()
    assert score(model_folder, "--plain", "--output", output, questions) == 0
    assert (scored, output.read_bytes()) == ([], finished)


def test_score_continues_when_lines_were_added_to_the_input(model_folder, questions, tmp_path):
    output = tmp_path / "scores.jsonl"
    assert score(model_folder, "--plain", "--output", output, questions) == 0
    before = output.read_text()
    more = [*QUESTIONS, {"context": "the sea", "choices": [" yes", " no"]}]
    write_jsonl(questions, more)
    assert score(model_folder, "--plain", "--output", output, questions) == 0
    assert output.read_text().startswith(before)
    check_results(read_jsonl(output), more)


def test_results_of_a_file_with_blank_lines_name_its_lines_and_continue(model_folder, tmp_path, capsys):
    lines, output = [json.dumps(question) for question in QUESTIONS], tmp_path / "scores.jsonl"
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join([lines[0], "", "  ", *lines[1:], "", ""]))
    assert score(model_folder, "--plain", "--output", output, questions) == 0
    found = read_jsonl(output)
    assert [result["line"] for result in found] == [1, 4, 5, 6]
    output.write_text("".join(json.dumps(found[i]) + "\n" for i in (3, 1)))
    assert score(model_folder, "--plain", "--output", output, questions) == 0
    assert read_jsonl(output) == found
    check_results([{**result, "line": i} for i, result in enumerate(found, 1)])
    output.write_text(json.dumps({**found[0], "line": 2}) + "\n")
    assert "line 1 is no result of this input" in failing(
        capsys, model_folder, "--plain", "--output", output, questions
    )


def test_score_refuses_to_continue_what_is_not_its_own(model_folder, questions, tmp_path, capsys):
    needs_hf()
    output = tmp_path / "scores.jsonl"
    assert score(model_folder, "--plain", "--output", output, questions) == 0
    finished = output.read_bytes()
    lines = finished.splitlines(keepends=True)
    other = tmp_path / "other"
    tiny_model("Qwen3", max_position_embeddings=256).save_pretrained(other)
    tiny_tokenizer(True).save_pretrained(other)
    changed = write_jsonl(tmp_path / "changed.jsonl", [QUESTIONS[0], {**QUESTIONS[1], "id": "new"}, *QUESTIONS[2:]])
    refusal = r"scores.jsonl, line (\d) is no result of this input, model, dtype and mode; --overwrite"

    def refused_line(*arguments):
        return int(re.search(refusal, failing(capsys, *arguments, "--output", output)).group(1))

    assert refused_line(model_folder, questions) == 1
    assert refused_line(other, "--plain", questions) == 1
    assert refused_line(model_folder, "--plain", "--dtype", "bfloat16", questions) == 1
    assert refused_line(model_folder, "--plain", changed) == 2
    assert output.read_bytes() == finished
    before_the_first = json.dumps({**json.loads(lines[-1]), "line": 0}).encode() + b"\n"
    for spoiled in (b"hello\n", b"[]\n", b'{"line": 99, "key": ""}\n', b'{"line": "1"}\n', before_the_first):
        output.write_bytes(lines[0] + spoiled)
        assert refused_line(model_folder, "--plain", questions) == 2
    output.write_bytes(lines[0] * 2)
    assert "holds a result twice" in failing(capsys, model_folder, "--plain", questions, "--output", output)
    for held, message in ((b"", "exists and holds no results"), (lines[0], "ends in a line that is no result")):
        held += b"my only notes, without a newline"
        output.write_bytes(held)
        assert message in failing(capsys, model_folder, "--plain", questions, "--output", output)
        assert output.read_bytes() == held

    assert score(model_folder, "--plain", "--overwrite", "--output", output, questions) == 0
    check_results(read_jsonl(output))


def test_keys_know_changed_weights_configs_modes_and_tokens(tmp_path):
    model = tiny_model()
    records = scoring_records(write_jsonl(tmp_path / "q.jsonl", [{"context": "the sea ", "choices": ["yes"]}]))

    def key(model=model, adds_bos=True, mode="plain"):
        choices = scoring.encode(records, tiny_tokenizer(adds_bos))
        return job.key_of(fingerprint(TransformersRunner(model), mode), records, choices, 0)

    assert key() == key(tiny_model())
    keys = [key(), key(mode="folded"), key(adds_bos=False)]
    keys.append(key(tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5.0})))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.001)
    assert len({*keys, key()}) == 5


def test_score_refuses_bad_input_before_it_loads_a_model(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_engine, "load_runner", lambda *arguments: pytest.fail("loaded the weights"))
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "a", "choices": ["b"]}\n{"context": "a"}\n')
    assert 'bad.jsonl, line 2 has no "choices"' in failing(capsys, model_folder, bad)
    write_jsonl(bad, [QUESTIONS[1], {"context": "the sea " * 300, "choices": [" yes"]}])
    message = failing(capsys, model_folder, bad)
    assert re.search(
        r"line 2: choices\[0\] needs \d+ tokens of input and the model reads at most 256; --trunc", message
    )
    assert "is the input file itself" in failing(capsys, model_folder, bad, "--output", bad, "--overwrite")
    message = failing(capsys, model_folder, bad, "--output", tmp_path / "absent/scores.jsonl")
    assert "absent/scores.jsonl: its folder does not exist" in message


def test_score_truncates_left_on_request(model_folder, tmp_path, capsys):
    path = write_jsonl(tmp_path / "q.jsonl", [{"context": "the sea " * 300, "choices": [" yes", " no"]}])
    assert score(model_folder, "--plain", "--truncate-left", path) == 0
    (result,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert all(math.isfinite(value) for value in result["logprobs"])


def test_score_names_a_model_that_cannot_be_loaded(questions, tmp_path, capsys, monkeypatch):
    assert "--model /no/such does not exist" in failing(capsys, "/no/such", questions)
    assert "--model x.gguf does not exist" in failing(capsys, "x.gguf", questions)
    assert "is a file; it must be a model's folder" in failing(capsys, questions, questions)
    assert f"the config of {tmp_path} could not be loaded: " in failing(capsys, tmp_path, questions)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("gguf", "accelerate") else find(n))
    assert "a .gguf file needs gguf, which is not installed; in a checkout of radix_ops: " in (
        failing(capsys, tmp_path / "m.gguf", questions)
    )


def test_a_model_of_another_task_is_named(questions, tmp_path, capsys):
    tiny_classifier("Qwen3").save_pretrained(tmp_path / "head")
    tiny_model("Qwen3").model.save_pretrained(tmp_path / "base")
    for name, kind in (("head", "Qwen3ForSequenceClassification"), ("base", "Qwen3Model")):
        tiny_tokenizer(adds_bos=True).save_pretrained(tmp_path / name)
        assert failing(capsys, tmp_path / name, questions).endswith(f"; its config is of a {kind}")
    # Where the embedding serves as the head nothing is missing, and yet it was not trained for this.
    for kind, tied in (("Llama", True), ("Llama", False), ("Qwen3", True)):
        folder = tmp_path / f"{kind}-{tied}"
        tiny_classifier(kind, tie_word_embeddings=tied).save_pretrained(folder)
        tiny_tokenizer(adds_bos=True).save_pretrained(folder)
        assert f"{kind}ForSequenceClassification" in failing(capsys, folder, questions) or not tied


@pytest.mark.parametrize("options", [["--plain", "--compare"], ["--token-budget", "0"], ["--dtype", "int8"]])
def test_score_refuses_wrong_usage(options, capsys):
    with pytest.raises(SystemExit) as stop:
        score("m", "f", *options)
    assert stop.value.code == 2
    assert "radix-ops score: error:" in capsys.readouterr().err


def test_compare_reports_both_runs(model_folder, questions, tmp_path, capsys):
    needs_hf()
    output = tmp_path / "scores.jsonl"
    assert score(model_folder, "--compare", "--output", output, questions) == 0
    out = capsys.readouterr().out
    check_results(read_jsonl(output))
    tokens, rows = (re.search(rf"{name} +([\d,]+) +([\d,]+)\n", out).groups() for name in ("tokens", "rows computed"))
    assert tokens[0] == tokens[1]
    assert int(rows[1]) < int(tokens[1]) / 2
    assert "answers that agree: 4 of 4\n" in out
    assert float(re.search(r"largest difference of a choice's log-probability: (\S+)\n", out).group(1)) < 1e-4

    finished = output.read_bytes()
    assert "--compare times whole runs" in failing(capsys, model_folder, "--compare", "--output", output, questions)
    assert output.read_bytes() == finished
    assert score(model_folder, "--compare", questions) == 0
    assert not capsys.readouterr().out.startswith("{")


def test_comparison_table_is_computed_from_the_runs():
    plain = RunStats(tokens=40_000, rows=41_000, head_rows=300, batches=9, seconds=80.0, cpu_seconds=151.5)
    folded = RunStats(tokens=40_000, rows=5_000, head_rows=280, batches=3, seconds=10.5, cpu_seconds=20.0)
    assert_expected_inline(
        compare.comparison_table(plain, folded, [8.0, 7.6, 7.9]),
        """\
                           plain    folded
tokens                    40,000    40,000
rows computed             41,000     5,000
rows through the head        300       280
batches                        9         3
seconds                    80.00     10.50
CPU seconds               151.50     20.00
tokens a second              500     3,810

padding of the plain run: 2.5% of its tokens
speed-up: 7.62 times (7.33 to 7.72 in 3 rounds), 0.95 of tokens / rows (8.00)""",
    )


def test_score_survives_a_closed_pipe(model_folder, questions):
    command = [sys.executable, "-m", "radix_ops.cli", "score", "--device", "cpu", "--plain"]
    process = subprocess.Popen(
        [*command, "--model", str(model_folder), str(questions)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=processes.python_environment(),
    )
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=processes.LONGEST) == 1
    assert "Traceback" not in error


def test_compare_refuses_what_is_not_finite(model_folder, questions, tmp_path, capsys):
    needs_hf()
    model = tiny_model(max_position_embeddings=256)
    model.get_output_embeddings().weight.data[5] = float("nan")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer(True).save_pretrained(tmp_path / "model")
    assert score(tmp_path / "model", "--compare", questions) == 1
    assert "line 1: choices[0] got the log-probability nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "foo"), "--device 'foo' can't be used: it must be cpu or cuda"),
        (("--device", "meta"), "--device 'meta' can't be used: it must be cpu or cuda"),
        (
            ("--device", "cuda:99"),
            f"--device 'cuda:99' can't be used: torch finds {torch.cuda.device_count()} CUDA devices",
        ),
        (("--plain", "--device", "foo"), "--device 'foo' can't be used: it must be cpu or cuda"),
        (("--plain", "--device", "meta"), "--device 'meta' can't be used: it must be cpu or cuda"),
        (("--output", "."), "--output '.' is not a regular file"),
        (("--output", os.devnull), f"--output {os.devnull!r} is not a regular file"),
        (("--output", ""), "--output '' is not a regular file"),
    ],
)
def test_score_refuses_devices_and_outputs(options, message, model_folder, questions, capsys):
    assert score(model_folder, *options, questions) == 1
    assert capsys.readouterr().err == f"radix-ops: {message}\n"


def test_a_key_that_stands_twice_is_refused(model_folder, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"context": "a", "context": "b", "choices": ["c"]}\n')
    assert "bad.jsonl, line 1 is not JSON: the key 'context' stands twice" in failing(capsys, model_folder, bad)
