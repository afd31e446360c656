"""Embedder and Reranker against the numbers of sentence-transformers on folders that it saved itself, in a process of
its own: `make test` has the newest version do so, `make test-oldest-sentences` the oldest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers import saved_folders
from helpers.saved_folders import CASES, PAIRS, TEXTS
from radix_ops.engine import Embedder, Reranker, UserError

pytest.importorskip("sentence_transformers")
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return the folder of all cases and their numbers by name."""
    folder = tmp_path_factory.mktemp("saved")
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    subprocess.run(
        [sys.executable, saved_folders.__file__, folder],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, check=True, timeout=900,
    )  # fmt: skip
    return folder, json.loads((folder / "expected.json").read_text())["numbers"]


def numbers(case, folder, plain):
    """Return what radix_ops computes of a folder: an embedding of each text, or a score of each pair."""
    options = {"device": "cpu", "plain": plain, "truncate_right": True}
    if case.kind == "encoder":
        return Embedder(folder, **options).embed(TEXTS)
    lines = [{"query": query, "documents": [document]} for query, document in PAIRS]
    return np.array([found["scores"][0] for found in Reranker(folder, **options).score(lines)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_numbers_are_those_of_the_version_that_saved_the_folder(saved, case):
    folder, expected = saved
    if expected[case.name] is None:
        pytest.skip("this version of sentence-transformers has no such folders")
    if case.refusal:
        with pytest.raises(UserError, match=case.refusal):
            numbers(case, folder / case.name, False)
        return
    wanted = np.array(expected[case.name])
    assert np.ptp(wanted) > 1e-3
    for plain in (False, True):
        found = numbers(case, folder / case.name, plain)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6 * max(1, np.abs(wanted).max()))
