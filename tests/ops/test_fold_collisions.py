"""Folds whose hashes have a few bits, and tokens chosen by someone who knows the key of the hash."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.batches import pack, random_positions, random_sequences, rounds
from radix_ops import reference

CSRC = Path(__file__).parents[2] / "csrc"
PROGRAM = """
#include "cpu/fold_trie.h"
using radix::HashKey;
extern "C" long fold(
    const long* ids, const long* positions, const long* ends, long num_sequences, int* unfold_index, HashKey* key) {
  radix::Trie<long, long> trie(ids, positions, num_sequences, key ? *key : HashKey::draw());
  for (long s = 0; s < num_sequences; ++s) trie.insert(s, ends[s], ends[s + 1], unfold_index);
  return trie.num_rows();
}
extern "C" void draw(HashKey* key) { *key = HashKey::draw(); }
"""


def compiled(folder: Path, *flags: str) -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler (a wheel is under test)")
    (folder / "fold.cpp").write_text(PROGRAM)
    command = [compiler, "-O2", "-std=c++20", "-fPIC", "-shared", *flags, f"-I{CSRC}", "fold.cpp", "-o", "fold.so"]
    subprocess.run(command, cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "fold.so"))
    library.fold.restype = ctypes.c_long
    return library


def folded(library, ids, positions, cu_seqlens, key=None):
    unfold_index = torch.full((len(ids),), -1, dtype=torch.int32)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (ids, positions, cu_seqlens)]
    count = ctypes.c_long(len(cu_seqlens) - 1)
    num_rows = library.fold(*pointers, count, ctypes.c_void_p(unfold_index.data_ptr()), key)
    return num_rows, unfold_index


@pytest.fixture(scope="module", params=[0, 4])
def colliding(request, tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("collisions"), f"-DRADIX_TEST_HASH_BITS={request.param}")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("keyed"))


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


def test_fold_is_exact_under_hash_collisions(colliding):
    for (ids, _, cu_seqlens), positions in batches():
        num_rows, unfold_index = folded(colliding, ids, positions, cu_seqlens)
        compact_ids, _, want, _ = reference.fold(ids, positions, cu_seqlens)
        assert num_rows == len(compact_ids)
        assert torch.equal(unfold_index, want)


COUNT = 100_000  # sequences of one token each
# With this key the hash of a token at position 0 is the token, but for its place.
KNOWN_KEY = (ctypes.c_uint64 * 3)(0, 1, 1)
NUMBERS = torch.arange(COUNT)
NOUGHT = torch.zeros_like(NUMBERS)
CRAFTED = {  # ids, positions: under the known key all fall into a stretch of a table of 2^19 slots
    "ids of 31 bits, one stretch": ((NUMBERS % 4096 << 19) | NUMBERS // 4096, NOUGHT),
    "ids of 64 bits, one slot": (NUMBERS << 40, NOUGHT),
    "positions, one hash": (NOUGHT, NUMBERS << 20),
}


def seconds(library, ids, positions, key=None) -> float:
    """Return the least processor time of a few folds of `COUNT` sequences, no two of which are alike."""
    best = float("inf")
    for _ in range(4):
        start = time.thread_time()
        num_rows, unfold_index = folded(library, ids, positions, torch.arange(COUNT + 1), key)
        best = min(best, time.thread_time() - start)
        assert num_rows == COUNT
        assert torch.equal(unfold_index.long(), NUMBERS)
    return best


@pytest.mark.parametrize("name", CRAFTED)
def test_tokens_chosen_by_the_key_take_no_longer(library, name):
    # Without a second key they would take a hundred times as long.
    assert seconds(library, *CRAFTED[name], KNOWN_KEY) < 5 * seconds(library, torch.randperm(COUNT), NOUGHT)


def test_tokens_that_always_collide_are_sorted(library, colliding):
    # About 5 times is usual; a walk through all that collide would take thousands.
    assert seconds(colliding, torch.randperm(COUNT), NOUGHT) < 40 * seconds(library, torch.randperm(COUNT), NOUGHT)


def test_each_fold_draws_a_key_of_its_own(library):
    draw = "import ctypes, sys; key = (ctypes.c_uint64 * 3)(); ctypes.CDLL(sys.argv[1]).draw(key); print(*key)"
    command = [sys.executable, "-c", draw, library._name]
    keys = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    for _ in range(100):
        key = (ctypes.c_uint64 * 3)()
        library.draw(key)
        keys.append(list(map(str, key)))
    assert len({number for key in keys for number in key}) == 3 * len(keys)


def fold_by_key(ids, positions, cu_seqlens, key=(0, 1, 1), hash_bits=64):
    """Run fold_plan on CUDA under a key given; return how many ways it tried, too: two keys, then sorting."""
    arguments = (ids.cuda(), positions.cuda(), cu_seqlens.cuda())
    return torch.ops.radix._fold_by_key(*arguments, torch.tensor(key), hash_bits)


@pytest.mark.cuda
@pytest.mark.parametrize("hash_bits", [0, 4, 12])
def test_fold_on_cuda_is_exact_under_hash_collisions(hash_bits):
    collisions = sorts = total = 0
    for (ids, _, cu_seqlens), positions in batches():
        *got, ways = fold_by_key(ids, positions, cu_seqlens, hash_bits=hash_bits)
        for g, want in zip(got, torch.ops.radix.fold_plan(ids, positions, cu_seqlens), strict=True):
            assert torch.equal(g.cpu(), want)
        for g, want in zip(got[:4], reference.fold(ids, positions, cu_seqlens), strict=True):
            assert torch.equal(g.cpu(), want)
        collisions += ways > 1
        sorts += ways == 3
        total += 1
    assert collisions > {0: 0.8, 4: 0.6, 12: 0.04}[hash_bits] * total
    assert sorts > {0: 0.8, 4: 0.5, 12: 0}[hash_bits] * total


@pytest.mark.cuda
def test_fold_on_cuda_meets_no_collision_by_whole_hashes():
    rng = np.random.default_rng(3)
    for (ids, _, cu_seqlens), positions in batches():
        key = rng.integers(-(2**63), 2**63, 3).tolist()
        assert fold_by_key(ids, positions, cu_seqlens, key)[-1] == 1


def unmixed(h: np.ndarray) -> np.ndarray:
    """Invert `mix` of csrc/hash.h."""
    inverse = np.uint64(pow(0xD6E8FEB86659FD93, -1, 2**64))
    for _ in range(2):
        h = (h ^ (h >> np.uint64(32))) * inverse
    return h ^ (h >> np.uint64(32))


ONE_SLOT = torch.from_numpy(unmixed(unmixed(np.arange(COUNT, dtype=np.uint64) << np.uint64(20))).view(np.int64))
CRAFTED_ON_CUDA = {  # ids, positions, key, bits of the hashes, how many ways are tried, how often the time of others
    "ids, one slot": (ONE_SLOT, NOUGHT, (0, 1, 1), 64, 2, 5),
    "ids, one hash": (NUMBERS, NOUGHT, (0, 0, 1), 64, 2, 5),
    "positions, one hash": (NOUGHT, NUMBERS << 20, (0, 1, 1), 64, 2, 5),
    "all collide whatever the key": (NUMBERS, NOUGHT, (0, 1, 1), 0, 3, 20),
}


def cuda_seconds(function) -> float:
    best = float("inf")
    for _ in range(7):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


@pytest.mark.cuda
@pytest.mark.parametrize("name", CRAFTED_ON_CUDA)
def test_tokens_chosen_by_the_key_fold_on_cuda_as_on_the_cpu(name):
    ids, positions, key, hash_bits, ways, _ = CRAFTED_ON_CUDA[name]
    cu_seqlens = torch.arange(COUNT + 1)
    *got, tried = fold_by_key(ids, positions, cu_seqlens, key, hash_bits)
    assert tried == ways
    for g, want in zip(got, torch.ops.radix.fold_plan(ids, positions, cu_seqlens), strict=True):
        assert torch.equal(g.cpu(), want)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CRAFTED_ON_CUDA)
def test_tokens_chosen_by_the_key_take_no_longer_on_cuda(name):
    ids, positions, key, hash_bits, _, times = CRAFTED_ON_CUDA[name]
    given = [x.cuda() for x in (ids, positions, torch.arange(COUNT + 1))]
    others = [torch.randperm(COUNT).cuda(), *given[1:]]
    usual = cuda_seconds(lambda: torch.ops.radix.fold_plan(*others))
    assert cuda_seconds(lambda: fold_by_key(*given, key, hash_bits)) < times * usual


@pytest.mark.cuda
@pytest.mark.parametrize("length", [1, 8])
def test_equal_sequences_take_no_longer_on_cuda(length):
    count = COUNT // length
    cu_seqlens = torch.arange(0, COUNT + 1, length).cuda()
    positions = torch.arange(length).repeat(count).cuda()
    equal = (torch.arange(length).repeat(count).cuda(), positions, cu_seqlens)
    others = (torch.randperm(COUNT).cuda(), positions, cu_seqlens)
    assert torch.equal(torch.ops.radix.fold(*equal)[2].cpu().long(), torch.arange(length).repeat(count))
    usual = cuda_seconds(lambda: torch.ops.radix.fold(*others))
    assert cuda_seconds(lambda: torch.ops.radix.fold(*equal)) < 5 * usual
