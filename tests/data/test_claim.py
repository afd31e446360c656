"""One run at a time writes to an output, and files of others beside it stay as they are."""

import os
import signal
import time

import pytest

from helpers import processes
from helpers.outputs import ALL, CONVERTED, check_lines, each, write_lines
from radix_ops import cli
from radix_ops.data import claim, output
from radix_ops.data.output import claimed
from radix_ops.data.records import UserError


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *(("o.jsonl", suffix) for suffix in (".part", ".lock")),
        *(("o.npy", suffix) for suffix in (".part", ".rows", ".rows.tmp", ".lock")),
        *(("o-int8.npy", f".float32{suffix}") for suffix in (".part", ".rows", ".rows.tmp")),
        *(("o.csv", suffix) for suffix in (".part", ".lines", ".lock")),
    ],
)
def test_links_beside_an_output_are_not_followed(tmp_path, name, suffix):
    victim, path = tmp_path / "victim", tmp_path / name
    victim.write_text("precious")
    (tmp_path / (name + suffix)).symlink_to(victim)
    with pytest.raises(UserError, match="is a symbolic link; remove it"):
        ALL[name][0](path)
    if suffix.endswith(".rows"):  # the link is replaced
        ALL[name][0](path, True)
    else:
        with pytest.raises(UserError, match="is a symbolic link; remove it"):
            ALL[name][0](path, True)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        *((name, suffix) for name in ALL for suffix in (".part", ".lock")),
        *((name, ".lines") for name in CONVERTED),
        ("o-int8.npy", ".float32.part"),
    ],
)
def test_files_of_others_beside_an_output_stay(tmp_path, name, suffix):
    other = tmp_path / (name + suffix)
    other.write_text("mine")
    with pytest.raises(UserError, match=rf"{other} exists and (is of no run|holds no results); "):
        ALL[name][0](tmp_path / name)
    assert other.read_text() == "mine"


@each
@pytest.mark.parametrize("suffix", [".part", ".lock"])
def test_pipes_beside_an_output_are_refused(tmp_path, name, suffix):
    os.mkfifo(tmp_path / (name + suffix))
    with pytest.raises(UserError, match=rf"{name}{suffix} (is no regular file; remove it|exists and is of no run)"):
        ALL[name][0](tmp_path / name)


def test_a_link_to_itself_is_no_output(tmp_path):
    for name in ("o.jsonl", "o.npy"):
        (tmp_path / name).symlink_to(tmp_path / "other")
        (tmp_path / "other").unlink(missing_ok=True)
        claim.check_path(str(tmp_path / name))  # one that leads to nothing yet is
        (tmp_path / "other").symlink_to(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name} is a symbolic link that leads back to itself"):
            claim.check_path(str(tmp_path / name))
    (tmp_path / "far.jsonl").symlink_to(tmp_path / "absent" / "o.jsonl")
    with pytest.raises(UserError, match=r"far.jsonl: its folder does not exist"):
        claim.check_path(str(tmp_path / "far.jsonl"))


@pytest.fixture
def held():
    """Return two functions: one has another process hold an output and returns its id, the other kills it."""
    holders = []

    def hold(path):
        reads, writes = os.pipe()

        def work():
            with claimed(str(path)):
                os.write(writes, b"x")
                time.sleep(600)

        holders.append(processes.in_a_fork(work))
        assert os.read(reads, 1) == b"x"
        return holders[-1]

    def let_go():
        while holders:
            os.kill(holders[-1], signal.SIGKILL)
            os.waitpid(holders.pop(), 0)

    yield hold, let_go
    let_go()


@each
def test_one_process_holds_an_output_until_it_ends(tmp_path, name, held):
    (hold, let_go), path, link = held, tmp_path / name, tmp_path / f"link.{name}"
    link.symlink_to(path)
    holder = hold(path)
    for way in (path, link):
        with pytest.raises(UserError, match=rf"{way.name} is being written by another run, process {holder} on "):
            ALL[name][0](way)
    assert not path.exists()
    ALL[name][0](tmp_path / f"other-{name}")
    let_go()
    # The kill left the lock's file, and the system let go of it.
    assert (tmp_path / f"{name}.lock").exists()
    ALL[name][0](path)
    ALL[name][1](path)
    assert not (tmp_path / f"{name}.lock").exists()


@pytest.mark.parametrize("command", ["score", "embed", "rerank"])
def test_commands_refuse_an_output_that_is_held_before_anything_is_read(tmp_path, held, command, capsys):
    path = tmp_path / "o.jsonl"
    holder = held[0](path)
    for options in ([], ["--overwrite"], ["--compare"]):
        arguments = [command, "--model", "no/model", "--output", str(path), *options, str(tmp_path / "absent.jsonl")]
        assert cli.main(arguments) == 1
        assert f"o.jsonl is being written by another run, process {holder} on " in capsys.readouterr().err
    assert not path.exists()


def test_no_two_processes_hold_an_output_at_once(tmp_path):
    path, counter = tmp_path / "o.jsonl", tmp_path / "count"
    counter.write_text("0")

    def race():
        held, end = 0, time.monotonic() + processes.LONGEST
        while held < 100 and time.monotonic() < end:
            try:
                with claimed(str(path)):
                    before = int(counter.read_text())
                    time.sleep(0.0002)
                    counter.write_text(str(before + 1))
                    held += 1
            except UserError:
                pass
        assert held == 100

    racers = [processes.in_a_fork(race) for _ in range(3)]
    assert [os.waitpid(racer, 0)[1] for racer in racers] == [0, 0, 0]
    assert int(counter.read_text()) == 300
    assert not (tmp_path / "o.jsonl.lock").exists()


def test_a_folder_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, capsys):
    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(output.fcntl, "flock", no_locks)
    write_lines(tmp_path / "o.jsonl")
    check_lines(tmp_path / "o.jsonl")
    assert "o.jsonl can't be locked (Operation not supported)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["o.jsonl"]
