"""Runs that write a small output of each kind, and checks of the files that they leave."""

import json

import numpy as np
import pytest

from radix_ops.data.matrix import MatrixFile
from radix_ops.data.output import claimed
from radix_ops.data.results import ResultFile

COUNT, SHAPE = 6, (6, 5)
ROWS = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
ORDER = [3, 0, 5, 1, 4, 2]


def key_of(item):
    return f"key{item}"


def write_lines(path, overwrite=False):
    """Write an output; return how many results were there."""
    with claimed(str(path)):
        file = ResultFile(str(path), COUNT, key_of, overwrite)
        found = int(file.done.sum())
        for item in ORDER:
            if not file.done[item]:
                file.add(item, {"line": item + 1, "text": "x" * item})
                file.flush()
        file.finish()
    return found


def write_matrix(path, overwrite=False, key="key"):
    with claimed(str(path)):
        file = MatrixFile(str(path), SHAPE, key, overwrite)
        found = int(file.done.sum())
        for part in (ORDER[:2], ORDER[2:4], ORDER[4:]):
            remaining = np.array([item for item in part if not file.done[item]], int)
            if len(remaining):
                file.write(remaining, ROWS[remaining])
        file.finish()
    return found


def check_lines(path):
    expected = [{"line": i + 1, "text": "x" * i, "key": key_of(i)} for i in range(COUNT)]
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


def check_matrix(path):
    found = np.load(path)
    assert found.dtype == np.float32
    assert np.array_equal(found, ROWS)


KINDS = {"o.jsonl": (write_lines, check_lines), "o.npy": (write_matrix, check_matrix)}


either = pytest.mark.parametrize("name", KINDS)
