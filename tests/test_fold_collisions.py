"""Folds whose hashes have a few bits, so that nearly every look-up meets a collision."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import pack, random_positions, random_sequences, rounds

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


def batches():
    rng = np.random.default_rng(2)
    for _ in rounds(500):
        sequences = random_sequences(rng)
        yield pack(sequences), random_positions(rng, sequences)
    for sequences in (
        [[i, i % 3, 7] for i in rng.permutation(400)],
        [[7] * i for i in range(1, 70)],  # stretches of equal tokens, of each length around powers of two
        [[*range(100), i, *range(50)] for i in range(20)],
        [[i % 7, i % 5, i % 11] for i in range(5000)],  # more sequences than one block of threads sums up
        [[*range(10_000)], [*range(7000), 3], [*range(7000), 4]],
    ):
        yield pack(sequences), random_positions(rng, sequences)


def test_fold_is_exact_under_hash_collisions(colliding_fold):
    for (ids, _, cu_seqlens), positions in batches():
        num_rows, unfold_index = colliding_fold(ids, positions, cu_seqlens)
        compact_ids, _, want, _ = reference.fold(ids, positions, cu_seqlens)
        assert num_rows == len(compact_ids)
        assert torch.equal(unfold_index, want)


@pytest.mark.cuda
@pytest.mark.parametrize("hash_bits", [0, 4, 12])
def test_fold_on_cuda_is_exact_under_hash_collisions(hash_bits):
    collisions = total = 0
    for (ids, _, cu_seqlens), positions in batches():
        arguments = (ids.cuda(), positions.cuda(), cu_seqlens.cuda())
        *got, collided = torch.ops.radix._fold_by_short_hashes(*arguments, hash_bits)
        for g, want in zip(got, torch.ops.radix.fold_plan(ids, positions, cu_seqlens), strict=True):
            assert torch.equal(g.cpu(), want)
        for g, want in zip(got[:4], reference.fold(ids, positions, cu_seqlens), strict=True):
            assert torch.equal(g.cpu(), want)
        collisions += collided
        total += 1
    assert collisions > {0: 0.8, 4: 0.6, 12: 0.04}[hash_bits] * total


@pytest.mark.cuda
def test_fold_on_cuda_meets_no_collision_by_whole_hashes():
    for (ids, _, cu_seqlens), positions in batches():
        arguments = (ids.cuda(), positions.cuda(), cu_seqlens.cuda())
        assert not torch.ops.radix._fold_by_short_hashes(*arguments, 63)[-1]
