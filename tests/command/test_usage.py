"""Errors of usage name what is wrong first, and the nearest name that would be right."""

import pytest

from helpers.commands import parsed, refused_usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Missing are FILE and --model too.
        ("score --modle m", "radix-ops score: error: there is no option --modle (did you mean --model?)"),
        ("score --modle=m q.jsonl", "radix-ops score: error: there is no option --modle (did you mean --model?)"),
        ("score q.jsonl --tmeplate t -x", "radix-ops score: error: there is no option --tmeplate, nor -x"),
        ("embed -m m t.txt --poolin", "radix-ops embed: error: argument --pooling: expected one argument"),
        ("embed -m m t.txt --polling last", "there is no option --polling (did you mean --pooling?)"),
        ("--verison", "radix-ops: error: there is no option --verison (did you mean --version?)"),
        ("scor q.jsonl", "(did you mean score?)"),
        ("embed -m m t.txt --pooling lst", "(did you mean last?)"),
        ("embed", "radix-ops embed: error: the following arguments are required: FILE, -m/--model"),
        ("schema score embed", "radix-ops schema: error: unrecognized arguments: embed"),
        ("", "radix-ops: error: the following arguments are required: COMMAND"),
    ],
)
def test_usage_errors_name_the_wrong_before_the_missing(capsys, arguments, message):
    assert message in refused_usage(capsys, *arguments.split())


def test_usage_is_that_of_the_command(capsys):
    refused_usage(capsys, "score", "--modle", "m")
    with pytest.raises(SystemExit):
        parsed("score", "--modle", "m")
    assert capsys.readouterr().err.startswith("usage: radix-ops score [-h]")


def test_short_options_are_the_long_ones():
    short = parsed("score", "-m", "model", "-o", "out.jsonl", "-q", "q.jsonl")
    assert short == parsed("score", "--model", "model", "--output", "out.jsonl", "--quiet", "q.jsonl")
    assert (short.model, short.output, short.quiet, short.plain, short.token_budget) == (
        "model", "out.jsonl", True, False, None
    )  # fmt: skip
    assert parsed("inspect", "-m", "model", "f").model == "model"


def test_files_may_stand_before_and_behind_options():
    assert parsed("score", "a", "b", "-m", "m", "c", "-q", "-").files == ["a", "b", "c", "-"]


def test_help_shows_defaults_and_what_is_required(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        parsed("inspect", "--help")
    assert "(default: 16384; the other" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="^0$"):
        parsed("score", "--help")
    assert capsys.readouterr().out.count("[-m") == 0  # as for what may be left out
