"""What the benchmarks say of their batches, counted one by one."""

import types
from pathlib import Path

import pytest


@pytest.fixture
def batches(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import batches

    return batches


CONFIG = types.SimpleNamespace(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)


def flops_by_hand(depths: list[int]) -> int:
    """Add up those of tokens by how many tokens each sees: projections, the MLP, and scores and sums of values."""
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32
    mlp = 3 * 32 * 48
    return sum(3 * (2 * (projections + mlp) + 2 * 4 * (8 + 8) * depth) for depth in depths)


def sequences_of(batch) -> list[tuple[int, ...]]:
    ids, lengths = batch.ids.tolist(), batch.lengths.tolist()
    return [tuple(ids[sum(lengths[:i]) : sum(lengths[: i + 1])]) for i in range(len(lengths))]


@pytest.mark.parametrize("kind", ["shared prefix", "agentic"])
def test_the_flop_ratio_is_that_of_all_tokens_to_all_prefixes(batches, kind):
    make = {
        "shared prefix": lambda: batches.Batch.synthetic(3, 5, 4, "cpu"),
        "agentic": lambda: batches.Batch.agentic(2, 3, "cpu", root=4, step=3, own=2),
    }
    batch = make[kind]()
    sequences = sequences_of(batch)
    prefixes = {sequence[:end] for sequence in sequences for end in range(1, len(sequence) + 1)}
    assert batch.rows == len(prefixes)
    assert batch.tokens == sum(map(len, sequences))
    packed = flops_by_hand([end for sequence in sequences for end in range(1, len(sequence) + 1)])
    folded = flops_by_hand([len(prefix) for prefix in prefixes])
    assert batch.flops(CONFIG) == folded
    assert batch.flop_ratio(CONFIG) == pytest.approx(packed / folded, rel=1e-12)


def test_each_turn_of_an_agent_goes_on_where_the_one_before_it_stood(batches):
    sequences = sequences_of(batches.Batch.agentic(2, 3, "cpu", root=4, step=3, own=2))
    assert [len(sequence) for sequence in sequences] == 2 * [4 + 3 * turn + 2 for turn in (1, 2, 3)]
    assert len({sequence[:4] for sequence in sequences}) == 1
    for first in (0, 3):
        for turn in (1, 2):
            shared = 4 + 3 * turn
            assert sequences[first + turn][:shared] == sequences[first + turn - 1][:shared]
    assert sequences[0][:7] != sequences[3][:7]


def test_padded_ids_hold_each_sequence_at_the_start_of_its_row(batches):
    batch = batches.Batch.agentic(1, 2, "cpu", root=2, step=2, own=1)
    for row, mask, sequence in zip(batch.padded.tolist(), batch.mask.tolist(), sequences_of(batch), strict=True):
        assert row == [*sequence, *[0] * (len(row) - len(sequence))]
        assert mask == [1] * len(sequence) + [0] * (len(row) - len(sequence))
