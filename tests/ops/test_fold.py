"""radix::fold and radix::fold_plan, against the radix-mlp package and against brute force."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import radix_mlp
import torch

from helpers.batches import NAMED, pack, random_positions, random_sequences, rounds, to
from radix_ops import reference

RADIX = torch.ops.radix


@pytest.fixture
def fold(device):
    """Run radix::fold on each device, of arguments on the CPU and with results there."""
    return lambda *arguments: to("cpu", RADIX.fold(*to(device, arguments)))


@pytest.fixture
def fold_plan(device):
    return lambda *arguments: to("cpu", RADIX.fold_plan(*to(device, arguments)))


def seed_fold(ids, positions, cu_seqlens, pad_multiple_of=1):
    arrays = [x.numpy().astype(np.uint32) for x in (ids, positions, cu_seqlens)]
    return [torch.from_numpy(x.astype(np.int64)) for x in radix_mlp.compute_fold_and_scatter(*arrays, pad_multiple_of)]


def assert_equal_values(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.long(), w.long(), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("pad_multiple_of", [1, 4])
def test_fold_equals_brute_force(fold, name, pad_multiple_of):
    arguments = pack(NAMED[name])
    assert_equal_values(fold(*arguments, pad_multiple_of), reference.fold(*arguments, pad_multiple_of))


def test_fold_golden(fold):
    ids, positions, unfold_index, fold_index = fold(*pack([[5, 6, 7], [5, 6, 8], [5], [6]]), 4)
    assert ids.tolist() == [5, 6, 7, 8, 6, 0, 0, 0]
    assert positions.tolist() == [0, 1, 2, 2, 0, 0, 0, 0]
    assert unfold_index.tolist() == [0, 1, 2, 0, 1, 3, 0, 4]
    assert fold_index.tolist() == [0, 1, 2, 5, 7, 0, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_fold_equals_radix_mlp_on_random_batches(fold, seed):
    rng = np.random.default_rng(seed)
    for _ in rounds(750):
        sequences = random_sequences(rng)
        ids, _, cu_seqlens = pack(sequences)
        arguments = (ids, random_positions(rng, sequences), cu_seqlens, int(rng.choice([1, 2, 8, 64])))
        got = fold(*arguments)
        assert_equal_values(got, seed_fold(*arguments))
        assert_equal_values(got, reference.fold(*arguments))


def adversarial_batches():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 100, 300).tolist()
    yield "staircase up", [base[:i] for i in range(300)]
    yield "staircase down", [base[:i] for i in range(300, 0, -1)]
    yield "comb", [[*base[:i], 1000 + i] for i in range(300)]
    yield "block edges", [[*base[:i], 1000] for i in (1, 63, 64, 65, 127, 128, 129, 255, 256, 257) for _ in range(2)]
    long = rng.integers(0, 100, 5000).tolist()
    yield "long spans", [[*long[:i], 1000 + i] for i in (1023, 1024, 1025, 2047, 2048, 4999, 5000)]
    yield "same everywhere", [[3] * i for i in rng.integers(0, 400, 50)]
    yield "alternating", [[i % 2, *base[:50]] for i in range(50)]
    yield "halves", [[int(bit) for bit in f"{i:09b}"] for i in rng.permutation(512)]
    yield "wide at depth", [[*base[:100], i, *base[:3]] for i in range(2000)]


@pytest.mark.parametrize(("name", "sequences"), list(adversarial_batches()))
def test_fold_equals_radix_mlp_on_adversarial_batches(fold, name, sequences):
    arguments = pack(sequences)
    assert_equal_values(fold(*arguments), seed_fold(*arguments))


def test_fold_position_mismatch_inside_an_edge(fold):
    ids = torch.tensor([1, 2, 3, 4] * 2)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 5, 6])
    arguments = (ids, positions, torch.tensor([0, 4, 8]))
    assert_equal_values(fold(*arguments), reference.fold(*arguments))
    assert fold(*arguments)[0].tolist() == [1, 2, 3, 4, 3, 4]


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_fold_dtypes(fold, ids_dtype, positions_dtype, cu_dtype):
    ids, positions, cu_seqlens = pack(NAMED["nested"])
    want = reference.fold(ids, positions, cu_seqlens)
    got = fold(ids.to(ids_dtype), positions.to(positions_dtype), cu_seqlens.to(cu_dtype))
    assert [x.dtype for x in got] == [ids_dtype, positions_dtype, torch.int32, torch.int32]
    assert_equal_values(got, want)


def test_fold_keeps_extreme_values(fold):
    limits = torch.iinfo(torch.int64)
    ids = torch.tensor([limits.min, limits.max, -1, limits.min, limits.max, 1])
    positions = torch.tensor([limits.max, limits.min, 0] * 2)
    arguments = (ids, positions, torch.tensor([0, 3, 6]))
    assert_equal_values(fold(*arguments), reference.fold(*arguments))


def test_fold_takes_strided_arguments(device):
    ids, positions, cu_seqlens = to(device, pack(NAMED["nested"]))

    def spread(x):
        return torch.stack([x, torch.full_like(x, 99)], 1)[:, 0]

    strided = [spread(x) for x in (ids, positions, cu_seqlens)]
    assert not any(x.is_contiguous() for x in strided)
    assert_equal_values(RADIX.fold(*strided), to(device, reference.fold(*to("cpu", (ids, positions, cu_seqlens)))))
    expanded = torch.tensor(5, device=device).expand(6)
    assert RADIX.fold(expanded, *to(device, (torch.arange(6), torch.tensor([0, 3, 6]))))[0].tolist() == [5] * 6


def test_fold_wide_batch_is_not_quadratic(fold):
    """A quadratic fold would take 1,024 times as long for 32 times as many sequences."""

    def seconds(count):
        ids = torch.stack([torch.randperm(count), torch.full((count,), 3)], 1).flatten()
        arguments = (ids, torch.arange(2).repeat(count), torch.arange(0, 2 * count + 1, 2))
        compact_ids, _, unfold_index, _ = fold(*arguments)  # the first call on a device loads its kernels
        assert torch.equal(compact_ids, ids)
        assert torch.equal(unfold_index.long(), torch.arange(2 * count))
        # Other programs take no share of the processor's time.
        taken = []
        for _ in range(5):
            start = time.process_time()
            fold(*arguments)
            taken.append(time.process_time() - start)
        return min(taken)

    assert seconds(160_000) < 256 * seconds(5_000)


def test_fold_deep_batch(fold):
    base = torch.randint(0, 50_000, (200_000,))
    ids = torch.cat([base, base, base[:-1], torch.tensor([-1])])
    positions = torch.arange(200_000).repeat(3)
    compact_ids, _, unfold_index, fold_index = fold(ids, positions, torch.tensor([0, 200_000, 400_000, 600_000]))
    assert torch.equal(compact_ids, torch.cat([base, torch.tensor([-1])]))
    assert torch.equal(ids[fold_index], compact_ids)
    assert torch.equal(compact_ids[unfold_index], ids)


def check_plan(fold, fold_plan, sequences, positions, pad_multiple_of):
    ids, _, cu_seqlens = pack(sequences)
    arguments = (ids, positions, cu_seqlens, pad_multiple_of)
    *first, indptr, members, runs, cu_q, cu_k, kv_index, kv_indptr, kv_members, counts = fold_plan(*arguments)
    assert_equal_values(first, fold(*arguments))
    unfold_index, fold_index = first[2].tolist(), first[3].tolist()
    num_rows = len(fold_index)

    def inverse(index):
        return [[i for i, row in enumerate(index) if row == j] for j in range(num_rows)]

    def held(indptr, members):
        ends, entries = indptr.tolist(), members.tolist()
        assert ends[0] == 0
        assert ends[-1] == len(entries)
        return [entries[a:b] for a, b in itertools.pairwise(ends)]

    assert held(indptr, members) == inverse(unfold_index)
    assert held(kv_indptr, kv_members) == inverse(kv_index.tolist())

    seen, want_runs, want_kv, want_q, want_k = set(), [], [], [0], [0]
    for s, (start, end) in enumerate(zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False)):
        rows = unfold_index[start:end]
        added = [row for row in rows if row not in seen]
        seen.update(added)
        if added:
            assert added == rows[-len(added) :] == list(range(added[0], added[0] + len(added)))
            want_runs.append(s)
            want_kv += rows
            want_q.append(want_q[-1] + len(added))
            want_k.append(want_k[-1] + len(rows))
    assert runs.tolist() == want_runs
    assert kv_index.tolist() == want_kv
    assert cu_q.tolist() == want_q
    assert cu_k.tolist() == want_k
    lengths = [len(sequence) for sequence in sequences]
    longest_run = max(np.diff(want_q), default=0)
    assert counts.tolist() == [len(seen), longest_run, max(lengths, default=0), min(lengths, default=0)]
    assert {x.dtype for x in (indptr, members, runs, cu_q, cu_k, kv_index, kv_indptr, kv_members)} == {torch.int32}


@pytest.mark.parametrize("name", NAMED)
def test_fold_plan_of_named_batches(fold, fold_plan, name):
    for pad_multiple_of in (1, 3):
        check_plan(fold, fold_plan, NAMED[name], pack(NAMED[name])[1], pad_multiple_of)


def test_the_plan_of_the_tokens_in_front_does_not_look_behind(device):
    for seed in rounds(200):
        rng = np.random.default_rng(seed)
        sequences = random_sequences(rng)
        ids, positions, cu_seqlens = pack(sequences)
        behind = torch.from_numpy(rng.integers(0, 3, seed % 5 * 20))
        arguments = torch.cat([ids, behind]), torch.cat([positions, behind]), cu_seqlens, 4
        *got, ends = RADIX.fold_batch(*to(device, arguments), front=True)
        for g, w in zip(got, RADIX.fold_plan(ids, positions, cu_seqlens, 4), strict=True):
            assert torch.equal(g.cpu(), w)
        assert torch.equal(ends.cpu(), cu_seqlens.int())


@pytest.mark.parametrize("front", [False, True])
def test_a_fold_from_zero_is_that_of_positions_that_count_from_zero(device, front):
    for seed in rounds(200):
        rng = np.random.default_rng(seed)
        ids, positions, cu_seqlens = pack(random_sequences(rng))
        behind = torch.from_numpy(rng.integers(0, 3, seed % 5 * 20 * front))
        given = torch.cat([ids, behind])
        if seed % 2:
            given, cu_seqlens = given.int(), cu_seqlens.int()
        got = RADIX.fold_batch(*to(device, (given, given, cu_seqlens)), 4, from_zero=True, front=front)
        for g, w in zip(got, RADIX.fold_plan(given[: len(ids)], positions, cu_seqlens, 4), strict=False):
            assert torch.equal(g.cpu(), w)
        assert got[1].dtype == torch.int64


def test_fold_plan_of_random_batches(fold, fold_plan):
    rng = np.random.default_rng(1)
    for _ in rounds(300):
        sequences = random_sequences(rng)
        check_plan(fold, fold_plan, sequences, random_positions(rng, sequences), int(rng.choice([1, 5])))
