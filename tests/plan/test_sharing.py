"""The prefixes that sequences share, against brute force over sets of them, and the picture of them."""

import importlib.util
import itertools
import random

import numpy as np
import pytest

from helpers.batches import short_sequences, trie_size
from helpers.commands import failing_inspect, report, write_jsonl
from radix_ops.cli.inspection import plot
from radix_ops.plan import TokenStore, plan_folded
from radix_ops.plan.sharing import Sharing, sharing_from_end

SEEDS = range(30)


def sharing_of(sequences):
    return Sharing(TokenStore.from_sequences(sequences))


def parts_of(order, ends):
    return np.split(order, ends[:-1]) if len(order) else []


@pytest.mark.parametrize("seed", SEEDS)
def test_counts_against_brute_force(seed):
    sequences = short_sequences(random.Random(seed))
    found, real = sharing_of(sequences), [tuple(s) for s in sequences if s]
    assert found.num_tokens == sum(map(len, sequences))
    assert found.num_rows == trie_size(sequences)
    common = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*sequences, strict=False))
    assert found.num_common == (len(list(common)) if len(sequences) > 1 else 0)
    assert found.num_empty == len(sequences) - len(real)
    assert found.num_duplicates == len(real) - len(set(real))
    assert found.num_strict_prefixes == sum(any(t != s and t[: len(s)] == s for t in real) for s in set(real))


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_prefixes_against_brute_force(seed):
    sequences = short_sequences(random.Random(seed))
    found = sharing_of(sequences)
    sharers = {}
    for index, sequence in enumerate(sequences):
        for size in range(1, len(sequence) + 1):
            sharers.setdefault(tuple(sequence[:size]), set()).add(index)
    expected = {}  # the shortest and the longest of the prefixes that the same sequences share
    for prefix, indices in sharers.items():
        if len(indices) > 1:
            lengths = expected.setdefault(frozenset(indices), [len(prefix), len(prefix)])
            lengths[:] = min(lengths[0], len(prefix)), max(lengths[1], len(prefix))
    prefixes = found.prefixes()
    columns = zip(prefixes.first, prefixes.last, prefixes.start, prefixes.stop, strict=True)
    assert {frozenset(found.order[a : b + 1]): [start + 1, stop] for a, b, start, stop in columns} == expected
    assert len(prefixes) == len(expected)
    assert prefixes.num_saved.sum() == found.num_tokens - found.num_rows


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("seed", SEEDS)
def test_batches_against_brute_force(seed, window):
    rng = random.Random(seed)
    sequences, size = short_sequences(rng), rng.randint(1, 5)
    found = sharing_of(sequences)
    for order in (found.given(), found.shuffled(), found.order):
        for limit in ({"max_sequences": size}, {"max_rows": 12}):
            batches = found.batches(order, **limit)
            parts = [[sequences[i] for i in part] for part in parts_of(order, batches.ends)]
            assert batches.num_rows == sum(map(trie_size, parts))
            if "max_sequences" in limit:
                assert all(len(part) <= size for part in parts)
                assert order is found.order or all(len(part) == size for part in parts[:-1])
            else:
                assert all(len(part) == 1 or trie_size(part) <= 12 for part in parts)
            depths = [len(p) for part in parts for p in {tuple(s[:i]) for s in part for i in range(1, len(s) + 1)}]
            assert batches.num_keys(window) == sum(min(depth, window or depth) for depth in depths)
            longest = [len(part) * [max(map(len, part))] for part in parts]
            assert batches.num_padded_keys(window) == sum(
                min(depth, window or depth) for n in itertools.chain(*longest) for depth in range(1, n + 1)
            )
    assert sorted(found.shuffled()) == list(range(len(sequences)))


@pytest.mark.parametrize("seed", SEEDS)
def test_batches_of_so_many_rows_are_the_planners(seed):
    store = TokenStore.from_sequences(short_sequences(random.Random(seed), most=30))
    found = Sharing(store)
    limits = {"max_rows": 20, "max_tokens": 160, "max_positions": 90}
    plan = plan_folded(store, **limits, order="sorted")
    planned = found.batches(found.order, **limits)
    assert (planned.ends.tolist(), planned.num_rows) == (plan.ends.tolist(), plan.num_rows)
    assert found.batches(found.given(), **limits).num_rows == plan.given_rows
    chosen, run = found.planned(**limits), plan_folded(store, **limits)
    assert (chosen.ends.tolist(), chosen.num_rows) == (run.ends.tolist(), run.num_rows)


@pytest.mark.parametrize("seed", range(20))
def test_padded_batches_against_brute_force(seed):
    rng = random.Random(seed)
    sequences, size = short_sequences(rng), rng.randint(1, 5)
    found, lengths = sharing_of(sequences), sorted(map(len, sequences), reverse=True)
    padded = found.padded(max_sequences=size)
    batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
    assert len(padded) == len(batches)
    assert padded.num_rows == sum(len(batch) * max(batch) for batch in batches)
    assert padded.num_keys(2) == sum(len(batch) * sum(min(i, 2) for i in range(1, max(batch) + 1)) for batch in batches)
    assert found.packed().num_rows == sum(lengths)
    assert found.packed().num_keys() == sum(length * (length + 1) // 2 for length in lengths)


def test_tokens_behind_the_given_lengths_do_not_count():
    store = TokenStore.from_sequences([[1, 2, 3, 4], [1, 2, 3, 5], [1, 2, 9, 9]])
    found = Sharing(store, np.array([3, 3, 2]))
    assert (found.num_tokens, found.num_rows, found.num_duplicates, found.num_strict_prefixes) == (8, 3, 1, 1)


def test_a_store_on_disk_is_counted_as_one_in_memory():
    sequences = short_sequences(random.Random(0), most=2000, longest=40, vocabulary=2)
    store = TokenStore(max_memory=1000)
    for sequence in sequences:
        store.append(sequence)
    assert isinstance(store.input_ids, np.memmap)
    assert Sharing(store).num_rows == trie_size(sequences)


def test_sharing_from_the_end_reads_sequences_backwards():
    sequences = [[i, 7, 7, 7] for i in range(10)]
    store = TokenStore.from_sequences([[*s, 99 - s[0]] for s in sequences])
    sample = sharing_from_end(store, store.lengths - 1)
    assert sample == {"sequences": 10, "from_start": 1.0, "from_end": 40 / 13}


# The picture.


def test_icicle_against_brute_force():
    sequences = short_sequences(random.Random(3), most=60, longest=12, vocabulary=2)
    found = sharing_of(sequences)
    depth = max(map(len, sequences))
    image = plot._icicle(found, found.prefixes(), depth)
    in_order = sorted(tuple(s) for s in sequences)
    expected = [
        [sum(t[: p + 1] == s[: p + 1] for t in in_order) if p < len(s) else 0 for s in in_order] for p in range(depth)
    ]
    assert image.tolist() == expected


def test_icicle_of_many_sequences_is_a_sample():
    sequences = [[i // 100, *([7] * 700)] for i in range(2000)]
    found = sharing_of(sequences)
    image = plot._icicle(found, found.prefixes(), 701)
    assert image.shape == (600, 1200)
    assert set(np.unique(image)) == {100}


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_picture(capsys, tmp_path, suffix):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / f"sharing.{suffix}"
    text = report(capsys, tmp_path, [[1, 2, 3, i % 3, i] for i in range(20)] + [[]], "--plot", picture)
    assert f"The picture is sharing.{suffix}." in text
    assert picture.stat().st_size > 5000
    if suffix == "png":
        pixels = matplotlib_image.imread(picture)
        counts = np.unique((pixels[..., :3] * 255).astype(int) @ [1, 256, 65536], return_counts=True)[1]
        assert (counts > 2000).sum() >= 4  # background, and blocks of the trie in several colours
        assert pixels.shape[1] > 1000


@pytest.mark.parametrize("sequences", [[[1, 2]], [[], []], [[*range(500)], *[[3]] * 300]])
def test_picture_of_extreme_data(capsys, tmp_path, sequences):
    pytest.importorskip("matplotlib")
    report(capsys, tmp_path, sequences, "--plot", tmp_path / "sharing.png")
    assert (tmp_path / "sharing.png").stat().st_size > 5000


def test_pictures_that_cannot_be_made(capsys, tmp_path, monkeypatch):
    file = write_jsonl(tmp_path / "ids.jsonl", [{"input_ids": [1]}])
    assert "must end in .png, .svg, .pdf" in failing_inspect(capsys, file, "--plot", tmp_path / "sharing.gif")
    assert "its folder does not exist" in failing_inspect(capsys, file, "--plot", tmp_path / "no" / "sharing.png")
    (tmp_path / "folder.png").mkdir()
    assert "is not a regular file" in failing_inspect(capsys, file, "--plot", tmp_path / "folder.png")
    same = write_jsonl(tmp_path / "ids.png", [{"input_ids": [1]}])
    assert "is the input file itself" in failing_inspect(capsys, same, "--plot", same)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    assert failing_inspect(capsys, file, "--plot", tmp_path / "sharing.png") == (
        "radix-ops: --plot needs matplotlib, which is not installed; in a checkout of radix_ops: "
        "pip install --no-build-isolation '.[plot]'"
    )
