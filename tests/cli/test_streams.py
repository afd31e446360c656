"""The radix-ops command on closed, full and ASCII streams, and with input that holds control characters."""

import json
import shlex
import subprocess
import sys

import pytest

from helpers import processes
from helpers.commands import QUESTIONS, score, write_jsonl

pytest.importorskip("transformers")

from radix_ops import cli
from radix_ops.engine import items, scoring

IDS = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, 2, 4]}]


def in_a_shell(command, **environment):
    """Run `radix-ops command`, with its redirections, in a shell; return status, output and errors."""
    command = f"{shlex.quote(sys.executable)} -m radix_ops.cli {command}"
    environment = processes.python_environment(**environment)
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, timeout=processes.LONGEST)
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">&-", "radix-ops: standard output is closed, and results would go there\n"),
        (">&- <&-", "radix-ops: standard output is closed, and results would go there\n"),
        (">/dev/full", "radix-ops: [Errno 28] No space left on device\n"),
    ],
)
def test_reports_that_cannot_be_printed_end_in_a_sentence(tmp_path, redirection, message):
    path = write_jsonl(tmp_path / "ids.jsonl", IDS)
    assert in_a_shell(f"inspect {path} {redirection}") == (1, b"", message)


@pytest.mark.parametrize("options", ["", "--json"])
def test_reports_are_printed_in_ascii_where_that_is_all_there_is(tmp_path, options):
    path = write_jsonl(tmp_path / "é\x1b[31m.jsonl", IDS)
    status, out, err = in_a_shell(f"inspect {options} '{path}'", PYTHONIOENCODING="ascii")
    assert (status, err) == (0, "")
    assert out.isascii()
    assert b"\x1b" not in out
    if options:
        assert json.loads(out)["file"] == str(path).replace("\x1b", r"\x1b")


def test_nothing_but_results_goes_to_standard_output_where_errors_are_closed(
    model_folder,
    tmp_path,
    monkeypatch,
    capsys,
):
    questions = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)
        assert score(model_folder, "--plain", questions) == 0
    assert [json.loads(line)["line"] for line in capsys.readouterr().out.splitlines()] == [1, 2, 3, 4]


CONTROLS = "\x1b[2J\r\x07\x9b\u202e\n"


@pytest.mark.parametrize(
    "line",
    [
        {CONTROLS: 1},
        {"text": "a", CONTROLS: 1},
        {"input_ids": CONTROLS},
        {"text": ["a" * 10_000]},
        {"key" * 10_000: 1},
    ],
    ids=range(5),
)
def test_messages_escape_what_input_holds(tmp_path, capsys, line):
    path = write_jsonl(tmp_path / "a\x1b[2Jb.jsonl", [line])
    assert cli.main(["inspect", "--text-key", "no" + CONTROLS, str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("radix-ops: ")
    assert r"a\x1b[2Jb.jsonl" in err
    assert err[:-1].isprintable()
    assert err[-1] == "\n"
    assert len(err) < 2200


def test_messages_of_usage_escape_arguments(capsys):
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["inspect", "file", "--token-budget", CONTROLS, CONTROLS])
    assert "".join(capsys.readouterr().err.splitlines()).isprintable()


def test_results_of_many_choices_take_linear_time_and_equal_ones_are_equal():
    texts = ["b", "a", "b", "c", "a", "b"]
    assert items.first_equals(texts) == [texts.index(text) for text in texts]
    many = [str(i) for i in range(200_000)]  # a quadratic search takes minutes
    assert items.first_equals(many) == list(range(200_000))


def test_a_context_that_is_too_long_is_refused_before_all_of_its_choices_are_tokenised():
    class Tokenizer:
        bos_token_id, tokens = 0, 0

        def decode(self, token):
            return "<s>"

        def __call__(self, texts, **options):
            self.tokens += sum(map(len, texts))
            return {"input_ids": [list(text.encode()) for text in texts]}

    tokenizer = Tokenizer()
    item = scoring.Item("line 1", "x" * 100_000, ["a"] * 100_000, {})
    with pytest.raises(
        ValueError, match=r"line 1: choices\[0\] needs 100000 tokens of input and the model reads at mo"
    ):
        scoring.encode([item], tokenizer, max_length=1000)
    assert tokenizer.tokens < 10_000_000  # of 10,000,000,000
