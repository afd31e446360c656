"""What the benchmarks say of their batches, counted one by one."""

import argparse
import types
from pathlib import Path

import numpy as np
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


@pytest.fixture
def read(batches, tmp_path):
    """Return a function that reads the batches of a file with these arrays."""

    def read(*options: str, **arrays):
        path = tmp_path / "prompts.npz"
        np.savez(path, **{f"gsm8k_group5.{name}": np.array(array, np.int32) for name, array in arrays.items()})
        parser = argparse.ArgumentParser()
        batches.add_data_options(parser)
        return batches.real_batches(parser.parse_args(["--data", str(path), *options]), "cpu")

    return read


def test_the_first_sequences_of_a_file_are_read(read):
    (batch,) = read("--sequences", "2", ids=[1, 2, 1, 3, 9], cu=[0, 2, 4, 5], group=[0, 0, 1])
    assert batch.name == "gsm8k_group5 (2)"
    assert sequences_of(batch) == [(1, 2), (1, 3)]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": [1], "group": [0]}, "has gsm8k_group5.ids, but no gsm8k_group5.cu"),
        ({"ids": [1, 2], "cu": [0, 3], "group": [0]}, "do not belong together: cu must rise from 0 to len"),
        ({"ids": [1, 2], "cu": [0, 1, 2], "group": [1, 0]}, "do not belong together"),
        ({"ids": [1, 2], "cu": [[0, 2]], "group": [0]}, "not 1-D or not of integers"),
        (
            {"ids": [1, 151_936], "cu": [0, 2], "group": [0]},
            "holds tokens from 1 to 151936, and the models have 151,936",
        ),
        ({"other": [1]}, "--workloads must name some of these"),
    ],
)
def test_a_file_that_does_not_fit_is_told_before_anything_runs(read, arrays, message):
    with pytest.raises(SystemExit, match=message):
        read(**arrays)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no file; tools/make_prompts.py makes one"),
        (b"text", "can't be read as a .npz"),
        (b"", "can't be read as a .npz"),
        (b"PK\x03\x04 and no more", "can't be read as a .npz"),
    ],
)
def test_what_is_no_file_of_arrays_is_told(batches, tmp_path, content, message):
    path = tmp_path / "prompts.npz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        batches.read_prompts(path)


def test_one_array_alone_is_no_file_of_prompts(batches, tmp_path):
    np.save(tmp_path / "prompts.npy", np.arange(3))
    with pytest.raises(SystemExit, match="can't be read as a .npz"):
        batches.read_prompts(tmp_path / "prompts.npy")
