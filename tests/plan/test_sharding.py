"""Shards of a plan: all batches once, the dearest shard the cheapest that stretches can have, the same everywhere."""

import itertools
import json
import random
import subprocess
import sys

import numpy as np
import pytest

from helpers.batches import short_sequences, trie_size
from radix_ops.plan import ForwardCost, TokenStore, plan_folded, plan_padded
from radix_ops.plan.sharding import cut_evenly

COST = ForwardCost(1000.5, {None: 8, 3: 20})
PADDING_COST = ForwardCost(1000.5, {None: 8, 3: 20}, folds_attention=False)


def depths(sequences):
    """Return the depth of each node of the sequences' trie."""
    return [len(prefix) for prefix in {tuple(s[:i]) for s in sequences for i in range(1, len(s) + 1)}]


def flops(num_rows, depths_of_queries):
    attention = sum(8 * depth + 20 * min(depth, 3) for depth in depths_of_queries)
    return 1000.5 * num_rows + attention


def padded_depths(sequences):
    return [depth for _ in sequences for depth in range(1, max(map(len, sequences)) + 1)]


def plan_of(sequences, **options):
    return plan_folded(TokenStore.from_sequences(sequences), **options)


def costs_of(shards):
    return [shard.cost for shard in shards]


def dearest_at_best(costs, num_shards):
    """Return the dearest stretch's cost for the best of all cuts."""
    spots = range(len(costs) + 1)
    return min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise([0, *cuts, len(costs)]))
        for cuts in itertools.combinations_with_replacement(spots, num_shards - 1)
    )


@pytest.mark.parametrize("order", ["sorted", "given"])
@pytest.mark.parametrize("seed", range(30))
def test_costs_of_batches_against_their_tries(seed, order):
    sequences = short_sequences(random.Random(seed))
    plan = plan_of(sequences, max_rows=12, order=order, cost=COST)
    padded = plan_of(sequences, max_rows=12, order=order, cost=PADDING_COST)
    batches = [[sequences[i] for i in indices] for indices in plan]
    assert plan.costs.tolist() == [flops(trie_size(batch), depths(batch)) for batch in batches]
    assert padded.costs.tolist() == [flops(trie_size(batch), padded_depths(batch)) for batch in batches]
    assert plan.tokens.tolist() == [sum(map(len, batch)) for batch in batches]
    without = plan_of(sequences, max_rows=12, order=order)
    assert without.costs.tolist() == without.rows.tolist() == plan.rows.tolist()
    assert (without.order.tolist(), without.ends.tolist()) == (plan.order.tolist(), plan.ends.tolist())


@pytest.mark.parametrize("seed", range(10))
def test_costs_of_padded_batches_count_padding(seed):
    sequences = short_sequences(random.Random(seed))
    plan = plan_padded([len(s) for s in sequences], max_positions=20, cost=COST)
    batches = [[sequences[i] for i in indices] for indices in plan]
    assert plan.costs.tolist() == [flops(len(padded_depths(b)), padded_depths(b)) for b in batches]
    assert plan.tokens.tolist() == [sum(map(len, batch)) for batch in batches]


def test_costs_that_no_int64_holds():
    large = ForwardCost(10**18, {None: 10**18, 2: 10**17})
    sequences = [[1] * 100, [1] * 60 + [2] * 3, [3] * 70]
    rows, deep, near = 173, 5050 + 61 + 62 + 63 + 70 * 71 // 2, 199 + 6 + 139
    plan = plan_of(sequences, max_rows=1000, cost=large)
    assert plan.costs.tolist() == pytest.approx([1e18 * rows + 1e18 * deep + 1e17 * near], rel=1e-12)
    plan = plan_padded([100], max_positions=1000, cost=large)
    assert plan.costs.tolist() == pytest.approx([1e18 * 100 + 1e18 * 5050 + 1e17 * 199], rel=1e-12)


def test_costs_of_lengths_whose_keys_no_int64_holds():
    plan = plan_padded([2**40, 2**40 - 1], max_positions=2**62, cost=ForwardCost(0, {None: 2}))
    assert plan.costs.tolist() == [2 * float(2**40 * (2**40 + 1))]


@pytest.mark.parametrize("seed", range(40))
def test_no_stretches_of_batches_have_a_cheaper_dearest_shard(seed):
    rng = random.Random(seed)
    sequences, num_shards = short_sequences(rng, most=20), rng.randint(1, 5)
    plan = plan_of(sequences, max_rows=rng.randint(1, 30), cost=COST)
    shards = plan.shards(num_shards)
    assert len(shards) == num_shards
    assert [number for shard in shards for number in shard.batches] == list(range(len(plan)))
    for shard in shards:
        batches = [[sequences[i] for i in plan[number]] for number in shard.batches]
        assert shard.num_rows == sum(map(trie_size, batches))
        assert shard.num_tokens == sum(map(len, itertools.chain(*batches)))
        assert shard.cost == sum(flops(trie_size(batch), depths(batch)) for batch in batches)
    assert max(costs_of(shards)) == dearest_at_best(plan.costs.tolist(), num_shards)
    mean = sum(plan.costs.tolist()) / num_shards
    assert shards.imbalance == pytest.approx(max(costs_of(shards)) / mean - 1 if mean else 0)


@pytest.mark.parametrize("seed", range(100))
def test_no_cuts_of_costs_have_a_cheaper_dearest_stretch(seed):
    """Costs that differ by many orders, fractions and zeros: exact, for these sums are."""
    rng = random.Random(seed)
    costs = [rng.choice([0, 0, 0.5, 1, 2, 3, 10, 100, 2.0**40]) for _ in range(rng.randint(0, 9))]
    num_parts = rng.randint(1, 7)
    ends = cut_evenly(np.array(costs, float), num_parts)
    assert len(ends) == num_parts
    assert ends == sorted(ends)
    assert ends[-1] == len(costs)
    parts = [sum(costs[a:b]) for a, b in itertools.pairwise([0, *ends])]
    assert max(parts) == dearest_at_best(costs, num_parts)
    used = sum(cost > 0 for cost in costs)
    assert used > num_parts or sum(part > 0 for part in parts) == used  # a shard for each, where there are enough


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_cuts_do_not_depend_on_the_unit_of_costs(scale):
    costs = np.random.default_rng(0).integers(1, 1000, 500) * 2.0**-10
    ends = cut_evenly(costs, 7)
    assert cut_evenly(costs * scale, 7) == ends
    parts = np.add.reduceat(costs, [0, *ends[:-1]])
    assert parts.max() <= costs.sum() / 7 + costs.max()


@pytest.mark.parametrize("giants", [[50], [0, 50, 99], [97, 98, 99], [20, 21]])
def test_a_sequence_that_costs_more_than_a_shard_leaves_the_others_even(giants):
    lengths = [1000 if i in giants else 10 for i in range(100)]
    sequences = [[i] * length for i, length in enumerate(lengths)]
    shards = plan_of(sequences, max_rows=10, order="given").shards(12)
    assert max(costs_of(shards)) == 1000
    others = [shard.cost for shard in shards if shard.cost < 1000]
    assert len(others) == 12 - len(giants)
    level = (1000 - 10 * len(giants)) / len(others)
    # Shards hold whole batches of 10, and the stretch between two such sequences is a whole number of shards.
    assert max(others) <= level + 20
    assert shards.imbalance == pytest.approx(1000 * 12 / sum(lengths) - 1)


def groups_under_first_tokens(copies, rng):
    """Make a group of a prompt with questions and answers of several lengths, copied under different first tokens."""
    prompt, answers = rng.integers(0, 9000, 150), [rng.integers(0, 9000, n) for n in rng.integers(5, 120, 40)]
    questions = [rng.integers(0, 9000, n) for n in rng.integers(10, 80, 10)]
    group = [np.concatenate([prompt, questions[i % 10], answer]) for i, answer in enumerate(answers)]
    return [np.concatenate([[copy], s]) for copy in range(copies) for s in group]


def giant_trie(copies, rng):
    """Make a trie of one root that branches at every depth, far larger than a batch."""
    sequences = [rng.integers(0, 9000, 64)]
    for _ in range(60 * copies):
        parent = sequences[rng.integers(len(sequences))]
        keep = rng.integers(20, len(parent) + 1)
        sequences.append(np.concatenate([parent[:keep], rng.integers(0, 9000, rng.integers(1, 80))])[:380])
    return sequences


def group_and_tail(copies, rng):
    """Make one group, and singletons whose lengths have a long tail."""
    lengths = np.minimum(5 * rng.pareto(1.2, 60 * copies) + 3, 380).astype(int)
    return groups_under_first_tokens(4, rng) + [rng.integers(9000, 90_000, n) for n in lengths]


def num_nodes(sequences):
    """Count the nodes of a trie, which is built."""
    root, count = {}, 0
    for sequence in sequences:
        node = root
        for token in sequence:
            count += token not in node
            node = node.setdefault(token, {})
    return count


@pytest.mark.parametrize("num_shards", [1, 2, 4, 12])
@pytest.mark.parametrize("make", [groups_under_first_tokens, giant_trie, group_and_tail])
def test_twenty_batches_a_shard_are_even_and_add_no_rows(make, num_shards):
    rng = np.random.default_rng(0)
    sequences = make(60, rng)
    rng.shuffle(sequences)
    cost = ForwardCost(1000.0, {None: 1})
    plan = plan_of(sequences, max_rows=400, cost=cost)
    assert len(plan) >= 20 * num_shards
    shards = plan.shards(num_shards)
    tries = [num_nodes(sequences[i].tolist() for i in plan[n]) for shard in shards for n in shard.batches]
    assert max(tries) <= 400
    assert sum(tries) == sum(shard.num_rows for shard in shards) == plan.num_rows
    assert shards.imbalance <= 0.05


def test_few_batches_empty_sequences_and_duplicates_make_shards():
    plan = plan_of([[1, 2], [3, 4], [5]], max_rows=2)
    shards = plan.shards(64)
    assert [shard.batches.tolist() for shard in shards[:4]] == [[0], [1], [2], []]
    assert shards.imbalance == pytest.approx(2 / (5 / 64) - 1)
    assert [len(shard) for shard in plan_of([], max_rows=2).shards(3)] == [0, 0, 0]
    assert plan_of([], max_rows=2).shards(3).imbalance == 0
    empty = plan_of([[], [], []], max_rows=2).shards(2)
    assert sum(len(shard) for shard in empty) == 1
    assert empty.imbalance == 0
    # A thousand equal sequences have the rows of one.
    shards = plan_of([[1, 2]] * 1000 + [[3, 4]], max_rows=2).shards(2)
    assert [(shard.num_rows, shard.num_tokens) for shard in shards] == [(2, 2000), (2, 2)]


@pytest.mark.parametrize("seed", range(30))
def test_what_is_done_is_left_out_and_batches_stay(seed):
    rng = random.Random(seed)
    sequences, num_shards = short_sequences(rng, most=20), rng.randint(1, 4)
    plan = plan_of(sequences, max_rows=9, cost=COST)
    done = np.array([rng.random() < 0.7 for _ in sequences], bool)
    shards = plan.shards(num_shards, done)
    found = [number for shard in shards for number in shard.batches]
    assert found == [number for number, batch in enumerate(plan) if not all(done[i] for i in batch)]
    assert max(costs_of(shards)) == dearest_at_best(plan.costs[found].tolist(), num_shards)
    assert sum(len(shard) for shard in plan.shards(num_shards, np.ones(len(sequences), bool))) == 0


def test_batches_by_number_are_those_of_the_iteration():
    plan = plan_of([[i, i] for i in range(7)], max_rows=4)
    assert [plan[i].tolist() for i in range(len(plan))] == [batch.tolist() for batch in plan]
    assert plan[-1].tolist() == plan[len(plan) - 1].tolist()
    with pytest.raises(IndexError):
        plan[len(plan)]


def digest(num_shards, max_memory=2**30):
    rng = random.Random(5)
    store = TokenStore(max_memory)
    for _ in range(400):
        store.append([rng.randrange(2) for _ in range(rng.randrange(200))])
    plan = plan_folded(store, max_rows=500, cost=COST)
    return [[plan[n].tolist() for n in shard.batches] for shard in plan.shards(num_shards)]


def test_other_processes_and_stores_on_disk_cut_the_same_shards_of_the_same_batches():
    wanted = digest(7)
    program = "import json, torch, test_sharding as t; torch.set_num_threads(1); print(json.dumps(t.digest(7, 0)))"
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}; {program}"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=__file__.rpartition("/")[0])
    assert json.loads(found.stdout) == wanted
    for num_shards in (1, 2, 64):
        assert list(itertools.chain(*digest(num_shards))) == list(itertools.chain(*wanted))


def test_bad_arguments_are_named():
    plan = plan_of([[1, 2], [3]], max_rows=2)
    for wrong in (0, 2**20 + 1):
        with pytest.raises(ValueError, match=rf"num_shards must be from 1 to 2\^20, got {wrong}"):
            plan.shards(wrong)
    with pytest.raises(TypeError, match="num_shards must be a whole number, got float"):
        plan.shards(2.0)
    with pytest.raises(ValueError, match=r"done must hold a bool for each of 2 sequences, got bool of shape \(3,\)"):
        plan.shards(2, np.zeros(3, bool))
    with pytest.raises(ValueError, match=r"done must hold a bool for each of 2 sequences, got int64 of shape \(2,\)"):
        plan.shards(2, np.array([0, 1]))
    for make, limits in ((plan_of, {"max_rows": 2}), (plan_padded, {"max_positions": 2})):
        with pytest.raises(TypeError, match="cost must be a ForwardCost or None, got float"):
            make([], **limits, cost=2.0)
    with pytest.raises(ValueError, match="linear must be FLOPs from 0 to 1e30, got -1"):
        ForwardCost(-1, {})
    with pytest.raises(ValueError, match=r"attention\[None\] must be FLOPs from 0 to 1e30, got nan"):
        ForwardCost(1, {None: float("nan")})
