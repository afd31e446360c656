"""Scripts for shells complete commands, options, choices and files."""

import shutil
import subprocess

import pytest

from helpers.commands import refused_usage
from radix_ops_command import main
from radix_ops_command._main import COMMANDS
from radix_ops_command.completion import SHELLS

COMPLETE = """
source ./script
complete -p radix-ops | sed 's/.*-F \\([^ ]*\\) .*/\\1/' > function
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
$(cat function)
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash completes")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["sco"], {"score"}),
        (["score", "--pla"], {"--plain"}),
        (["score", "-"], {"-m", "--model", "-o", "--output", "-q", "--quiet", "--config", "--compare"}),
        (["embed", "--pooling", ""], {"last", "mean"}),
        (["embed", "--dtype", "b"], {"bfloat16"}),
        (["score", "quest"], {"questions.jsonl"}),
        (["score", "-m", "m", "--config", "r"], {"run.toml"}),
        (["score", "-m", "run"], {"run.toml"}),
        (["embed", "-o", "quest"], {"questions.jsonl"}),
        (["schema", "re"], {"rerank"}),
    ],
)
def test_bash_completes(tmp_path, capsys, words, completed):
    for name in ("questions.jsonl", "run.toml"):
        (tmp_path / name).touch()
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    command = ["bash", "-c", COMPLETE, "bash", "radix-ops", *words]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert set(found) >= completed
    assert all(word.startswith(words[-1]) for word in found)


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_hold_every_command(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)


def test_other_shells_are_refused(capsys):
    assert "invalid choice: 'cmd' (choose from" in refused_usage(capsys, "completion", "cmd")
