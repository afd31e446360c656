"""Plans of batches: every sequence once, rows counted exactly, limits kept, and the cuts the best there are."""

import itertools
import random

import numpy as np
import pytest
import torch

from helpers.batches import short_sequences, trie_size
from radix_ops import reference
from radix_ops.plan import TokenStore, plan_folded, plan_padded

ops = torch.ops.radix


def random_limits(rng):
    limits = {"max_rows": rng.randint(1, 30)}
    for name, most in (("max_tokens", 40), ("max_positions", 40), ("max_sequences", 6)):
        if rng.random() < 0.4:
            limits[name] = rng.randint(1, most)
    return limits


def fits(sequences, limits):
    longest = max(map(len, sequences))
    found = {
        "max_rows": trie_size(sequences),
        "max_tokens": sum(map(len, sequences)),
        "max_positions": longest * len(sequences),
        "max_sequences": len(sequences),
    }
    return len(sequences) == 1 or all(found[name] <= limit for name, limit in limits.items())


@pytest.mark.parametrize("order", ["auto", "sorted", "given"])
@pytest.mark.parametrize("seed", range(100))
def test_every_sequence_is_planned_once_within_the_limits_and_rows_are_those_of_the_tries(order, seed):
    rng = random.Random(seed)
    sequences, limits = short_sequences(rng), random_limits(rng)
    plan = plan_folded(TokenStore.from_sequences(sequences), **limits, order=order)
    batches = [[sequences[i] for i in indices] for indices in plan]
    assert sorted(plan.order) == list(range(len(sequences)))
    assert plan.rows.tolist() == [trie_size(batch) for batch in batches]
    assert all(fits(batch, limits) for batch in batches)
    assert plan.num_tokens == sum(map(len, sequences))
    assert len(plan) == len(batches)
    if order == "sorted":
        assert plan.order.tolist() == sorted(range(len(sequences)), key=lambda i: (sequences[i], i))
    if order == "given":
        assert plan.order.tolist() == list(range(len(sequences)))
        assert plan.given_rows == plan.num_rows


@pytest.mark.parametrize("seed", range(60))
def test_no_cuts_of_the_sorted_order_have_fewer_rows_and_batches(seed):
    rng = random.Random(seed)
    sequences = sorted(short_sequences(rng, most=8))
    limits = random_limits(rng)
    plan = plan_folded(TokenStore.from_sequences(sequences), **limits, order="sorted")
    best = min(
        rows_and_batches
        for size in range(len(sequences) + 1)
        for cuts in itertools.combinations(range(1, max(len(sequences), 1)), size)
        if (rows_and_batches := cost(sequences, cuts, limits)) is not None
    )
    assert plan.num_rows + len(plan) == best


def cost(sequences, cuts, limits):
    """Return rows plus one for each batch (1% of max_rows is less than one row here), None beyond the limits."""
    if not sequences:
        return 0 if not cuts else None
    batches = [sequences[a:b] for a, b in itertools.pairwise([0, *cuts, len(sequences)])]
    if not all(fits(batch, limits) for batch in batches):
        return None
    return sum(map(trie_size, batches)) + len(batches)


def test_auto_keeps_an_order_that_shares_as_much():
    grouped = TokenStore.from_sequences([[9, 9, 9, i] for i in range(4)] + [[1, 1, 1, i] for i in range(4)])
    assert plan_folded(grouped, max_rows=7).order.tolist() == list(range(8))
    shuffled = TokenStore.from_sequences([[9 - 8 * (i % 2)] * 3 + [i] for i in range(8)])
    plan = plan_folded(shuffled, max_rows=7)
    assert plan.order.tolist() == [1, 3, 5, 7, 0, 2, 4, 6]
    assert plan.num_rows == 14
    assert plan.given_rows == 4 * 8  # batches of one sequence of each group: a third one would make 9 rows


def test_cuts_fall_between_groups():
    groups = [[[g] * 50 + [10 + i] for i in range(4)] for g in range(6)]
    plan = plan_folded(TokenStore.from_sequences(itertools.chain(*groups)), max_rows=130)
    assert [len(batch) for batch in plan] == [8, 8, 8]
    assert plan.num_rows == 6 * 54


def test_lengths_leave_out_the_ends_of_sequences():
    sequences = [[1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 5]]
    plan = plan_folded(TokenStore.from_sequences(sequences), max_rows=100, lengths=np.array([3, 2, 3]), order="sorted")
    assert plan.num_tokens == 8
    assert plan.num_rows == 3
    assert plan.order.tolist() == [1, 0, 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("seed", range(30))
def test_order_and_shared_tokens_against_python_lists(dtype, seed):
    rng = random.Random(seed)
    sequences = short_sequences(rng, most=40, longest=30, vocabulary=2)
    # Windows of one text overlap, and ids at the ends of the type's range sort as the others do.
    largest = torch.iinfo(dtype).max
    sequences = [[largest if t else 0 for t in s] for s in sequences]
    ids = torch.tensor(list(itertools.chain(*sequences)), dtype=dtype)
    starts = torch.tensor([0, *itertools.accumulate(map(len, sequences))][:-1], dtype=torch.int64)
    lengths = torch.tensor(list(map(len, sequences)), dtype=torch.int32)
    order = ops.lexicographic_order(ids, starts[: len(sequences)], lengths)
    assert order.tolist() == sorted(range(len(sequences)), key=lambda i: (sequences[i], i))
    shuffled = torch.tensor(rng.sample(range(len(sequences)), len(sequences)), dtype=torch.int32)
    shared = ops.common_prefix_lengths(ids, starts[: len(sequences)], lengths, shuffled)
    expected = [len(commonprefix(sequences[a], sequences[b])) for a, b in itertools.pairwise(shuffled.tolist())]
    assert shared.tolist() == [0, *expected][: len(sequences)]


def commonprefix(a, b):
    return list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def test_nested_prefixes_take_no_deep_recursion():
    longest = 3_000
    ids = torch.zeros(longest, dtype=torch.int32)
    lengths = torch.arange(longest, 0, -1)
    order = ops.lexicographic_order(ids, torch.zeros(longest, dtype=torch.int64), lengths)
    assert order.equal(torch.arange(longest - 1, -1, -1))


def test_rows_agree_with_a_fold_of_real_sizes():
    rng = np.random.default_rng(0)
    prefixes = rng.integers(0, 150_000, (40, 120))
    sequences = [[*prefixes[rng.integers(40)][: rng.integers(121)], *rng.integers(0, 150_000, 20)] for _ in range(600)]
    plan = plan_folded(TokenStore.from_sequences(sequences), max_rows=4000)
    assert plan.num_rows < 0.8 * plan.given_rows
    for rows, batch in zip(plan.rows, plan, strict=True):
        chosen = [sequences[i] for i in batch]
        ids = torch.tensor(np.concatenate(chosen))
        ends = torch.tensor([0, *itertools.accumulate(map(len, chosen))])
        positions = torch.cat([torch.arange(len(s)) for s in chosen])
        assert len(reference.fold(ids, positions, ends)[0]) == rows


@pytest.mark.parametrize("max_memory", [0, 1000, 2**20])
def test_a_store_gives_back_what_it_was_given_in_memory_and_from_its_file(max_memory):
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 2**31, rng.integers(0, 3000), dtype=np.int64) for _ in range(60)]
    store = TokenStore(max_memory)
    for count, sequence in enumerate(sequences):
        store.append(sequence if count % 2 else sequence.tolist())
        if count % 7 == 0:  # looks between appends
            assert store[count].tolist() == sequence.tolist()
    assert [s.tolist() for s in (store[i] for i in range(len(store)))] == [s.tolist() for s in sequences]
    assert store[-1].tolist() == sequences[-1].tolist()
    assert store.input_ids.dtype == np.int32
    assert store.lengths.tolist() == [len(s) for s in sequences]
    assert (store._file is None) == (max_memory == 2**20)


def test_a_plan_of_a_file_is_that_of_memory():
    rng = random.Random(3)
    sequences = [[rng.randrange(2) for _ in range(rng.randrange(200))] for _ in range(300)]
    on_disk = TokenStore(max_memory=0)
    for sequence in sequences:
        on_disk.append(sequence)
    found, expected = (plan_folded(s, max_rows=500) for s in (on_disk, TokenStore.from_sequences(sequences)))
    assert found.order.tolist() == expected.order.tolist()
    assert found.ends.tolist() == expected.ends.tolist()


def test_a_store_of_packed_sequences():
    store = TokenStore.from_packed([1, 2, 3, 4], [0, 3, 3, 4])
    assert [store[i].tolist() for i in range(3)] == [[1, 2, 3], [], [4]]
    store.append(torch.tensor([5], dtype=torch.int64))
    assert store[3].tolist() == [5]
    for wrong in ([0, 3], [1, 4], [0, 3, 2, 4], [], [[0, 4]]):
        with pytest.raises(ValueError, match="cu_seqlens must start at 0, not decrease and end at the 4 tokens"):
            TokenStore.from_packed([1, 2, 3, 4], wrong)


@pytest.mark.parametrize("seed", range(20))
def test_padded_batches_stay_within_positions_and_padding(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 60, rng.integers(0, 40))
    limit, padding = int(rng.integers(1, 300)), float(rng.choice([0, 0.05, 1]))
    plan = plan_padded(lengths, max_positions=limit, max_padding=padding)
    assert sorted(plan.order) == list(range(len(lengths)))
    for positions, batch in zip(plan.rows, plan, strict=True):
        chosen = lengths[batch]
        assert positions == chosen.max() * len(chosen)
        assert len(batch) == 1 or positions <= limit
        assert positions - chosen.sum() <= padding * chosen.sum()
    assert lengths[plan.order].tolist() == sorted(lengths, reverse=True)


def test_bad_arguments_are_named():
    store = TokenStore.from_sequences([[1, 2], [3]])
    with pytest.raises(TypeError, match="store must be a TokenStore, got tuple; TokenStore.from_sequences makes one"):
        plan_folded(((1, 2),), max_rows=3)
    with pytest.raises(ValueError, match=r"max_rows must be from 1 to 2\^62, got 0"):
        plan_folded(store, max_rows=0)
    with pytest.raises(TypeError, match="max_tokens must be a whole number, got float"):
        plan_folded(store, max_rows=3, max_tokens=1.5)
    with pytest.raises(TypeError, match="max_rows must be a whole number, got NoneType"):
        plan_folded(store, max_rows=None)
    with pytest.raises(ValueError, match="order must be one of 'auto', 'sorted', 'given', got 'random'"):
        plan_folded(store, max_rows=3, order="random")
    with pytest.raises(ValueError, match="order must be one of 'auto', 'sorted', 'given', got array"):
        plan_folded(store, max_rows=3, order=np.array(["auto", "given"]))
    with pytest.raises(ValueError, match=r"lengths\[1\] must be from 0 to the sequence's 1 tokens, got 2"):
        plan_folded(store, max_rows=3, lengths=np.array([2, 2]))
    with pytest.raises(ValueError, match="lengths must hold one whole number for each of 2 sequences, got int64 of"):
        plan_folded(store, max_rows=3, lengths=np.array([1]))
    with pytest.raises(ValueError, match="sequence 2 must hold token ids from 0 to 2147483647, got -1 to 4"):
        store.append([4, -1])
    with pytest.raises(ValueError, match="sequence 2 must hold token ids from 0 to 2147483647, got -128 to 4"):
        store.append(np.array([4, -128], dtype=np.int8))
    with pytest.raises(ValueError, match="sequence 2 must hold token ids from 0 to 2147483647, got 0 to 2147483648"):
        store.append(torch.tensor([0, 2**31]))
    with pytest.raises(TypeError, match="sequence 2 must hold integers, got True"):
        store.append([True])
    with pytest.raises(TypeError, match="sequence 2 must hold integers, got 0.5"):
        store.append([0.5])
    with pytest.raises(ValueError, match=r"sequence 2 must be a flat list of token ids, got shape \[1, 2\]"):
        store.append([[1, 2]])
    with pytest.raises(IndexError, match="the store holds 2 sequences, asked for 2"):
        store[2]
    assert len(store) == 2
    with pytest.raises(ValueError, match="max_padding must not be negative, got -1"):
        plan_padded([1], max_positions=3, max_padding=-1)


def test_ops_name_bad_arguments():
    ids, starts, lengths = torch.tensor([1, 2, -3]), torch.tensor([0, 1]), torch.tensor([1, 2])
    with pytest.raises(RuntimeError, match="radix::lexicographic_order: token ids must not be negative, got -3 in seq"):
        ops.lexicographic_order(ids, starts, lengths)
    with pytest.raises(RuntimeError, match="sequence 1 starts at 1 and has 3 tokens, which does not lie within the 3"):
        ops.lexicographic_order(ids, starts, torch.tensor([1, 3]))
    with pytest.raises(RuntimeError, match="sequence 0 starts at 9223372036854775807 and has 9223372036854775807 tok"):
        ops.lexicographic_order(ids, torch.tensor([2**63 - 1, 0]), torch.tensor([2**63 - 1, 0]))
    with pytest.raises(RuntimeError, match="starts and lengths must be equally long, got 2 and 1"):
        ops.lexicographic_order(ids, starts, lengths[:1])
    with pytest.raises(RuntimeError, match="order must hold indices of the 2 sequences, got 2 at index 0"):
        ops.common_prefix_lengths(ids, starts, lengths, torch.tensor([2]))
    with pytest.raises(RuntimeError, match="radix::cut_batches: max_tokens must be at least 1, got 0"):
        ops.cut_batches(lengths, torch.tensor([0, 1]), 1, 0, 1, 1)
    with pytest.raises(RuntimeError, match="shared must be from 0 to the lengths of a sequence and the one before it"):
        ops.cut_batches(lengths, torch.tensor([0, 2]), 1, 1, 1, 1)


def test_ops_have_fakes():
    ids, starts, lengths = torch.tensor([1, 2, 3]), torch.tensor([0, 1]), torch.tensor([1, 2])
    torch.library.opcheck(ops.lexicographic_order.default, (ids, starts, lengths))
    torch.library.opcheck(ops.common_prefix_lengths.default, (ids, starts, lengths, torch.tensor([1, 0])))
    torch.library.opcheck(ops.cut_batches.default, (lengths, torch.tensor([0, 1]), 2, 9, 9, 9))


def within(limits, lengths, shared):
    sizes = sum(lengths) - sum(shared), sum(lengths), max(lengths) * len(lengths), len(lengths)
    return all(size <= limit for size, limit in zip(sizes, limits, strict=True))


def test_cuts_of_lengths_whose_sums_no_int64_holds():
    """Lengths, costs and limits are near 2^63; all ways to cut are tried, in Python's integers."""
    huge = 2**63 - 1
    for lengths, shared, limits, batch_cost in (
        ([huge] * 4, [0, huge, huge, huge], (huge,) * 4, 0),
        ([huge] * 4, [0, huge, 5, huge], (huge, huge, huge, 2), huge),
        ([huge, 2**62, 2**62, 1], [0, 1, 2**61, 1], (2**62, huge, huge, huge), 3),
        ([1] * 6, [0] + [1] * 5, (huge, 2, huge, huge), huge),
    ):
        count = len(lengths)
        costs = {}
        for cuts in itertools.product([False, True], repeat=count - 1):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [count]
            begins = [0, *ends[:-1]]
            parts = [(lengths[begin:end], shared[begin + 1 : end]) for begin, end in zip(begins, ends, strict=True)]
            if all(len(part) == 1 or within(limits, part, common) for part, common in parts):
                costs[tuple(ends)] = sum(batch_cost + (shared[begin] if begin else 0) for begin in begins)
        got = ops.cut_batches(torch.tensor(lengths), torch.tensor(shared), *limits, batch_cost).tolist()
        assert costs[tuple(got)] == min(costs.values())
