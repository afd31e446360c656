"""Inputs and calls of the radix-ops command, and readers of its outputs, for its tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.language_models import TEXT
from radix_ops import cli
from radix_ops_command._main import parse

QUESTIONS = [
    {"id": "long", "context": " ".join(TEXT), "choices": [" the Seine", " the river Rhine", " the sea"], "gold": 0},
    {"id": "short", "context": "the ", "choices": ["river", "sea or the Thames"]},
    {"id": "none", "context": "", "choices": ["the", " sea", "Answer: yes"], "note": {"of": [1, None]}},
    {"id": "same", "context": " ".join(TEXT), "choices": [" Paris"]},
]
TEXTS = [
    "Question: Which river flows through Paris?",
    "",
    "the sea",
    "Question: Which river flows through Paris? The Seine.",
    "été \U0001f30a",
    "the sea",
    " the sea is saltier than the river ",
    "x",
]
QUERIES = [
    {"query": "Which river flows through Paris?", "documents": [TEXT[1], "the Thames", "", "the Thames"], "id": 7},
    {"query": "été", "documents": ["the sea"], "instruction": "Find the season"},
    {"query": "", "documents": ["yes\n\nno", " yes", "\U0001f30a"]},
    {"query": "Which river flows through Paris?", "documents": [TEXT[0], TEXT[2]]},
]


def write_jsonl(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def score(model, *arguments):
    return cli.main(["score", "--device", "cpu", "--model", str(model), *map(str, arguments)])


def failing_command(capsys, *arguments) -> str:
    """Run a command that must fail; return its one-sentence message, with the rows that it lists below."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 1
    return _message_of(*capsys.readouterr())


def _message_of(out: str, err: str) -> str:
    assert out == ""
    assert "Traceback" not in err
    sentence, *rows = err[err.rindex("radix-ops: ") :].splitlines()
    assert all(row.startswith("  ") for row in rows)
    return "\n".join([sentence, *rows])


def inspect_json(capsys, *arguments) -> dict:
    capsys.readouterr()
    assert cli.main(["inspect", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def failing_inspect(capsys, *arguments) -> str:
    """Run `radix-ops inspect` where it must fail; return its message likewise."""
    return failing_command(capsys, "inspect", *arguments)


def report(capsys, tmp_path, sequences, *arguments) -> str:
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": ids} for ids in sequences])
    capsys.readouterr()
    assert cli.main(["inspect", str(file), *map(str, arguments)]) == 0
    return capsys.readouterr().out.replace(f"{tmp_path}/", "")


def parsed(*arguments):
    """Return the arguments of a command, but for the name of a file of options."""
    args = parse(list(map(str, arguments)))
    args.config = None
    return args


def refused_usage(capsys, *arguments) -> str:
    """Call the command in a way that must be refused; return the last line that it prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="^2$"):
        parse(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()[-1]
