"""The fold's trie, compiled with hashes of a few bits, so that nearly every look-up meets a collision."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import pack, random_positions, random_sequences

from radix_ops import reference

CSRC = Path(__file__).parent.parent / "csrc"
PROGRAM = """
#include "cpu/trie.h"
extern "C" long fold(const long* ids, const long* positions, const long* ends, long num_sequences, int* unfold_index) {
  radix::Trie<long, long> trie(ids, positions, num_sequences);
  for (long s = 0; s < num_sequences; ++s) trie.insert(s, ends[s], ends[s + 1], unfold_index);
  return trie.num_rows();
}
"""


@pytest.fixture(scope="module", params=[0, 4])
def colliding_fold(request, tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (a wheel is under test)")
    folder = tmp_path_factory.mktemp("collisions")
    (folder / "fold.cpp").write_text(PROGRAM)
    command = [compiler, "-O1", "-std=c++20", "-fPIC", "-shared", f"-DRADIX_TEST_HASH_BITS={request.param}"]
    subprocess.run([*command, f"-I{CSRC}", "fold.cpp", "-o", "fold.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "fold.so"))

    def fold(ids, positions, cu_seqlens):
        unfold_index = torch.full((len(ids),), -1, dtype=torch.int32)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (ids, positions, cu_seqlens)]
        count = len(cu_seqlens) - 1
        num_rows = library.fold(*pointers, ctypes.c_long(count), ctypes.c_void_p(unfold_index.data_ptr()))
        return num_rows, unfold_index

    return fold


def test_fold_is_exact_under_hash_collisions(colliding_fold):
    rng = np.random.default_rng(2)
    batches = [random_sequences(rng) for _ in range(500)]
    batches.append([[i, i % 3, 7] for i in rng.permutation(400)])
    for sequences in batches:
        ids, _, cu_seqlens = pack(sequences)
        positions = random_positions(rng, sequences)
        num_rows, unfold_index = colliding_fold(ids, positions, cu_seqlens)
        compact_ids, _, want, _ = reference.fold(ids, positions, cu_seqlens)
        assert num_rows == len(compact_ids)
        assert torch.equal(unfold_index, want)
