"""The exit status says how the command ended, as its help and the documents list."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import processes
from radix_ops_command._main import EPILOG

ROOT = Path(__file__).parents[2]


def test_every_status_is_documented():
    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs/command.md").read_text(), re.MULTILINE)
    assert table == ["0", "1", "2", "130"]
    assert re.findall(r"\b\d+\b", EPILOG) == table


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("schema score", 0, ""),
        ("inspect no-such-file", 1, r"radix-ops: no-such-file.*\n"),
        ("inspect", 2, r"usage: (.*\n)*radix-ops inspect: error: .*\n"),
    ],
)
def test_the_status_tells_success_errors_and_wrong_usage(tmp_path, arguments, status, message):
    done = processes.run_python("-m", "radix_ops", *arguments.split(), cwd=tmp_path)
    assert done.returncode == status
    assert re.fullmatch(message, done.stderr)


def test_an_error_of_several_rows_lists_them_below_its_sentence(tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"input_ids": [1]}\n{"input_ids": "\\u001b"}\n{"input_ids": [-1]}\n')
    done = processes.run_python("-m", "radix_ops", "inspect", "ids.jsonl", cwd=tmp_path)
    head, *rows = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert head.startswith("radix-ops: 2 of 3 rows can't be used")
    assert [row.split(":")[0] for row in rows] == ["  ids.jsonl, line 2", "  ids.jsonl, line 3"]


def test_ctrl_c_while_torch_is_imported_ends_in_a_sentence(tmp_path):
    """Torch takes seconds; here a package of its name takes minutes."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import radix_ops_command; "
    program += "sys.exit(radix_ops_command.main(['inspect', 'file']))"
    environment = processes.python_environment()
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "radix-ops: stopped\n")


def test_a_torch_that_is_missing_is_an_error_in_one_sentence(tmp_path):
    program = "import sys; sys.modules['torch'] = None; import radix_ops_command; "
    program += "sys.exit(radix_ops_command.main(['inspect', 'file']))"
    done = processes.run_python("-c", program)
    assert done.returncode == 1
    assert re.fullmatch(r"radix-ops: .*torch.*\n", done.stderr)
