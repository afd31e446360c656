"""Progress is a bar on a terminal, a line now and then in a pipe, and nothing where the command is quiet."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from helpers import processes
from helpers.commands import QUESTIONS, write_jsonl
from radix_ops.cli import progress

pytest.importorskip("transformers")
tqdm = pytest.importorskip("tqdm")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(progress, "_SECONDS", 0.05)
    with progress.progress_bar(2000, "folded", " tokens") as bar:
        for _ in range(8):
            time.sleep(0.05)
            bar.update(250)
    lines = sys.stderr.getvalue().splitlines()
    assert 2 <= len(lines) <= 9
    for line in lines:
        assert re.fullmatch(r"folded: \d+%, [\d.]+k? of 2\.00k tokens, \d\d:\d\d so far, (\d\d:\d\d|\?) left", line)
    assert lines[-1].startswith("folded: 100%, 2.00k of 2.00k tokens")


def test_a_log_gets_nothing_of_what_is_done_soon(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.progress_bar(10, "folded", " tokens") as bar:
        bar.update(10)
    assert sys.stderr.getvalue() == ""


@pytest.mark.parametrize(("stream", "quiet", "shown"), [(Terminal, False, True), (Terminal, True, False)])
def test_bars_are_for_terminals_unless_quiet(monkeypatch, stream, quiet, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    with progress.hushed(quiet), progress.progress_bar(10, "folded", " tokens") as bar:
        bar.update(10)
    assert ("\rfolded: 100%" in sys.stderr.getvalue()) == shown


@pytest.mark.parametrize(
    ("stream", "quiet", "shown"), [(io.StringIO, False, False), (Terminal, False, True), (Terminal, True, False)]
)
def test_bars_of_libraries_are_for_terminals_unless_quiet(monkeypatch, stream, quiet, shown):
    from huggingface_hub.utils import tqdm as of_hub
    from transformers.utils import logging

    monkeypatch.setattr(sys, "stderr", stream())
    with progress.hushed(quiet):
        for make in (tqdm.tqdm, of_hub, logging.tqdm):
            list(make(range(3), desc="loading"))
    assert sys.stderr.getvalue().count("loading: 100%") == 3 * shown
    list(tqdm.tqdm(range(3), desc="later"))
    assert "later" in sys.stderr.getvalue()


def test_nothing_moves_the_cursor_in_a_pipe_and_loading_reports_nothing(model_folder, tmp_path):
    """A folder with a weight too many is what transformers reports about."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"too.many": weights["model.norm.weight"].clone()}, folder / "model.safetensors", {"format": "pt"}
    )
    # With the right choice known, the accuracies would be told, too.
    lines = [{"context": line["context"], "choices": line["choices"]} for line in QUESTIONS]
    questions = write_jsonl(tmp_path / "q.jsonl", lines)
    command = ["-m", "radix_ops", "score", "--device", "cpu", "-m", folder, questions]
    loud, quiet = (processes.run_python(*command, *options) for options in ([], ["-q"]))
    for done in (loud, quiet):
        assert (done.returncode, len(done.stdout.splitlines())) == (0, len(QUESTIONS))
    assert re.fullmatch(r"scored [\d,]+ tokens as [\d,]+ rows in .*\n", loud.stderr)
    assert quiet.stderr == ""


def test_a_terminal_gets_bars(model_folder, tmp_path):
    questions = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    command = [sys.executable, "-m", "radix_ops", "score", "--device", "cpu", "-m", model_folder, questions]

    done = subprocess.run(
        command, env=processes.python_environment(), stdout=subprocess.PIPE, stderr=terminal, timeout=processes.LONGEST
    )
    os.close(terminal)
    assert done.returncode == 0
    assert b"\rfolded: 100%" in os.read(main, 2**20)
    os.close(main)
