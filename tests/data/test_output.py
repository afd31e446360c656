"""Outputs outlive kills at any point, damage, and files that are removed or take their place."""

import itertools
import json
import os
import random
import sys

import numpy as np
import pytest

from helpers.outputs import (
    ALL,
    COUNT,
    KINDS,
    ORDER,
    ROWS,
    SHAPE,
    check_lines,
    check_matrix,
    companions,
    converted,
    each,
    fields_of,
    key_of,
    ranking_of,
    write_lines,
    write_matrix,
)
from helpers.outputs import (
    matrix as opened_matrix,
)
from radix_ops.data import (
    compressed,
    csv_results,
    log,
    matrix,
    output,
    packed_lines,
    parquet_results,
    quantised,
    results,
    trec,
)
from radix_ops.data import (
    converted as converting,
)
from radix_ops.data.matrix import MatrixFile
from radix_ops.data.records import UserError
from radix_ops.data.results import ResultFile

WRITING = (compressed, converting, csv_results, log, matrix, output, packed_lines, parquet_results, quantised, results)
FILES = {module.__file__ for module in (*WRITING, trec)}


def killed_after(num_lines, work, *arguments) -> bool:
    """Run work in a process that is killed, with all that it buffers, before it runs this line of our files."""
    if (child := os.fork()) == 0:
        count = 0

        def trace(frame, event, _):
            nonlocal count
            if frame.f_code.co_filename not in FILES:
                return None
            if event == "line":
                count += 1
                if count > num_lines:
                    os._exit(9)
            return trace

        sys.settrace(trace)
        try:
            work(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@each
def test_the_same_run_continues_after_a_kill_at_any_line(tmp_path, name):
    """Every fifth time a second kill follows. No later kill loses what an earlier one kept. Kinds whose steps are much
    the same are killed at some lines alone."""
    (run, check), rng, counts = ALL[name], random.Random(0), []
    for first in itertools.count(step=1 if name in KINDS else 11):
        folder = tmp_path / str(first)
        folder.mkdir()
        path = folder / name
        if not killed_after(first, run, path):
            break
        if first % 5 == 4:
            killed_after(rng.randrange(100), run, path)
            run(path)
        else:
            counts.append(run(path))
        check(path)
        assert {p.name for p in folder.iterdir()} == companions(name)
        assert run(path) == COUNT
    assert first > 80
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, COUNT)


@each
def test_an_old_output_stands_or_the_new_one_when_replacing_is_killed(tmp_path, name):
    run, check = ALL[name]
    for first in itertools.count(step=3 if name in KINDS else 19):
        (tmp_path / str(first)).mkdir()
        path = tmp_path / str(first) / name
        if name == "o.jsonl":
            path.write_text('{"line": 1, "key": "old"}\n')
        else:
            run(path, key="old")
        old = path.read_bytes()
        if not killed_after(first, run, path, True):
            break
        if name != "o.jsonl" and path.read_bytes() != old:
            check(path)
        run(path, True)
        check(path)


@each
def test_a_finished_output_of_another_run_is_refused(tmp_path, name):
    path = tmp_path / name
    if name == "o.jsonl":
        path.write_text('{"line": 1, "key": "another"}\n')
    else:
        ALL[name][0](path, key="another")
    held = path.read_bytes()
    with pytest.raises(UserError, match="--overwrite replaces it"):
        ALL[name][0](path)
    assert path.read_bytes() == held
    assert {p.name for p in tmp_path.iterdir()} == companions(name)


@each
def test_an_unfinished_output_of_another_run_is_refused(tmp_path, name):
    path = tmp_path / name
    if name.endswith(".npy"):
        opened_matrix(path, key="another").write(np.array(ORDER[:2]), ROWS[:2])
    else:
        file = ResultFile(str(path), COUNT, lambda item: "another", False) if path.suffix == ".jsonl" else None
        file = file or converted(path, key="another")
        file.add(3, ranking_of(3))
        file.flush()
    held = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"--overwrite (replaces it|starts anew)"):
        ALL[name][0](path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == held
    ALL[name][0](path, True)
    ALL[name][1](path)


def unfinished_matrix(path, done=ORDER):
    file = MatrixFile(str(path), SHAPE, "key", False)
    file.write(np.array(done), ROWS[done])
    return path.with_name(path.name + ".part")


def spoil(part, how):
    content = part.read_bytes()
    header, rows = content[: -ROWS.nbytes], content[-ROWS.nbytes :]
    if how == "more rows":
        np.lib.format.open_memmap(part, "w+", np.float32, shape=(COUNT + 1, 5))[:COUNT] = ROWS
    elif how == "fewer rows":
        np.lib.format.open_memmap(part, "w+", np.float32, shape=(COUNT - 1, 5))[:] = ROWS[:-1]
    elif how == "another dtype":
        np.lib.format.open_memmap(part, "w+", np.int32, shape=SHAPE)[:] = 1
    elif how == "Fortran order":
        np.lib.format.open_memmap(part, "w+", np.float32, shape=SHAPE, fortran_order=True)[:] = ROWS
    elif how == "cut":
        part.write_bytes(content[:-1])
    elif how == "longer":
        part.write_bytes(content + b"\0")
    elif how == "zeroed header":
        part.write_bytes(bytes(len(header)) + rows)
    elif how == "saved by NumPy":
        with open(part, "wb") as file:
            np.save(file, ROWS)


@pytest.mark.parametrize(
    "how",
    ["more rows", "fewer rows", "another dtype", "Fortran order", "cut", "longer", "zeroed header", "saved by NumPy"],
)
def test_a_matrix_of_another_shape_is_refused(tmp_path, how):
    path = tmp_path / "o.npy"
    part = unfinished_matrix(path, ORDER[:4])
    spoil(part, how)
    with pytest.raises(UserError, match=r"o.npy.part is not what the interrupted run left beside .*--overwrite starts"):
        write_matrix(path)
    write_matrix(path, True)
    check_matrix(path)


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_a_crash_lost_are_found_again(tmp_path, seed):
    path, rng = tmp_path / "o.npy", random.Random(seed)
    part = unfinished_matrix(path, ORDER[: rng.randint(1, COUNT)])
    content = bytearray(part.read_bytes())
    start = len(content) - ROWS.nbytes
    for _ in range(rng.randint(1, 3)):
        at = start + rng.randrange(ROWS.nbytes)
        end = min(at + rng.choice([1, 4, 20, 60]), len(content))
        content[at:end] = bytes(end - at) if rng.random() < 0.7 else rng.randbytes(end - at)
    part.write_bytes(content)
    assert write_matrix(path) < COUNT
    check_matrix(path)


def test_rows_of_zeros_are_done_and_rows_that_were_zeroed_are_not(tmp_path):
    zeros = np.zeros((COUNT, 5), np.float32)
    file = MatrixFile(str(tmp_path / "z.npy"), SHAPE, "key", False)
    file.write(np.arange(3), zeros[:3])
    assert MatrixFile(str(tmp_path / "z.npy"), SHAPE, "key", False).done.tolist() == [True] * 3 + [False] * 3
    path = tmp_path / "o.npy"
    part = unfinished_matrix(path)
    part.write_bytes(part.read_bytes()[: -ROWS.nbytes] + bytes(ROWS.nbytes))
    assert write_matrix(path) == 0
    check_matrix(path)


@pytest.mark.parametrize("spoiled", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: bytes(len(b)), lambda b: b""])
def test_side_files_that_are_damaged_are_refused(tmp_path, spoiled):
    path = tmp_path / "o.npy"
    unfinished_matrix(path)
    side = tmp_path / "o.npy.rows"
    side.write_bytes(spoiled(side.read_bytes()))
    with pytest.raises(UserError, match=r"o.npy.rows is .*--overwrite starts anew"):
        write_matrix(path)


def test_a_full_disk_at_the_start_leaves_nothing(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match="No space"):
            write_matrix(tmp_path / "o.npy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 700, 5000])
@pytest.mark.parametrize("cut", [0, 5, 30])
def test_zeros_at_the_end_of_lines_are_dropped(tmp_path, size, cut):
    path = tmp_path / "o.jsonl"
    write_lines(path)
    lines = path.read_bytes()
    for kept in (0, 40, len(lines) - cut):
        path.write_bytes(lines[:kept] + bytes(size))
        log.check_first_line(str(path))
        assert write_lines(path) == lines[:kept].count(b"\n")
        check_lines(path)


def test_every_header_reads_as_numpys_and_keys_differ(tmp_path):
    for shape in ((1, 1), (123_456_789, 4096), (7, 1)):
        headers = [matrix.header_of(shape, key) for key in ("a", "b")]
        assert headers[0] != headers[1]
        for header in headers:
            path = tmp_path / "h"
            path.write_bytes(header)
            with open(path, "rb") as file:
                assert np.lib.format.read_magic(file) == (1, 0)
                assert np.lib.format.read_array_header_1_0(file) == (shape, False, np.dtype(np.float32))
                assert file.tell() == len(header)
            assert len(header) % 64 == 0


def opened(path):
    """Open an output; return it and the file that the run writes to."""
    if path.suffix == ".npy":
        work = ".float32.part" if "int8" in path.name else ".part"
        return opened_matrix(path), path.with_name(path.name + work)
    if path.suffix == ".jsonl":
        return ResultFile(str(path), COUNT, key_of, False), path
    return converted(path), path.with_name(path.name + ".lines")


@each
def test_an_output_that_is_removed_while_it_is_made_is_there_in_the_end(tmp_path, name):
    path = tmp_path / name
    file, _ = opened(path)
    if name.endswith(".npy"):
        file.write(np.arange(COUNT), ROWS)
    else:
        for item in range(COUNT):
            file.add(item, fields_of(item) if name == "o.jsonl" else ranking_of(item))
        file.flush()
    for made in tmp_path.iterdir():
        made.unlink()
    file.finish()
    ALL[name][1](path)
    assert {p.name for p in tmp_path.iterdir()} == companions(name)


@each
def test_a_file_that_took_an_outputs_place_stays(tmp_path, name):
    file, made = opened(tmp_path / name)
    if not name.endswith(".npy"):
        file.add(0, ranking_of(0))
    made.unlink()
    made.write_text("mine")
    with pytest.raises(UserError, match=rf"{made} was replaced"):
        file.finish()
    assert made.read_text() == "mine"


def test_finished_matrix_leaves_nothing_of_a_start_that_would_have_replaced_it(tmp_path, monkeypatch):
    path = tmp_path / "m.npy"
    write_matrix(path)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(matrix, "put_in_place", stop)
        with pytest.raises(KeyboardInterrupt):
            write_matrix(path, overwrite=True)
    assert write_matrix(path) == COUNT
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def unfinished(path):
    """Write some results of floats, as a run that is stopped leaves them; return the bytes."""
    file = ResultFile(str(path), COUNT, key_of, False)
    for item in ORDER[:3]:
        file.add(item, {"line": item + 1, "logprobs": [-1.25 * item, 3e-05], "best": 1, "greedy": [True]})
    file.flush()
    return path.read_bytes()


def results_in(path):
    """Return the items whose results are found, None where the file is refused."""
    try:
        return np.flatnonzero(ResultFile(str(path), COUNT, key_of, False).done).tolist()
    except UserError:
        return None


def test_no_changed_byte_of_an_unfinished_line_is_taken_for_a_result(tmp_path):
    """Each byte is left out, and replaced by others, among them digits for digits."""
    path = tmp_path / "o.jsonl"
    content = unfinished(path)
    assert results_in(path) == sorted(ORDER[:3])
    ends, refused = np.flatnonzero(np.frombuffer(content, np.uint8) == ord("\n")), 0
    for at in range(len(content)):
        of_line, old = ORDER[int(np.searchsorted(ends, at))], content[at : at + 1]
        for new in {b"", b"7", b"0", b" ", b":", b"-", bytes([old[0] ^ 1])} - {old}:
            path.write_bytes(content[:at] + new + content[at + 1 :])
            found = results_in(path)
            refused += found is None
            assert of_line not in (found or []), (at, old, new)  # one whose end was torn off is computed again
    assert refused > 4 * len(content)


def test_a_changed_number_names_its_line_and_the_remedy_which_works(tmp_path):
    path = tmp_path / "o.jsonl"
    content = unfinished(path)
    changed = content.replace(b"-3.75", b"-3.74")
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(
        UserError, match=r"o.jsonl, line 1 was changed since the run wrote it: without that line the same"
    ):
        ResultFile(str(path), COUNT, key_of, False)
    path.write_bytes(changed.split(b"\n", 1)[1])
    assert results_in(path) == sorted(ORDER[1:3])


def test_a_finished_file_says_nothing_of_checksums(tmp_path):
    path = tmp_path / "o.jsonl"
    unfinished(path)
    assert write_lines(path) == 3
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["key"] for line in lines] == [key_of(item) for item in range(COUNT)]
    assert write_lines(path) == COUNT
