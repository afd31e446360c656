"""FoldedBatch: its constructors, maps and properties."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import radix_ops
from helpers import processes
from helpers.batches import NAMED, pack
from radix_ops import FoldedBatch


@pytest.fixture(params=NAMED)
def sequences(request):
    return NAMED[request.param]


def assert_same_batch(got, want):
    for (name, g), w in zip(vars(got).items(), vars(want).values(), strict=True):
        assert torch.equal(g, w) if isinstance(g, torch.Tensor) else g == w, name


@pytest.mark.parametrize("make", [radix_ops.fold, radix_ops.pack])
@pytest.mark.parametrize("pad_multiple_of", [1, 8])
def test_maps_lead_from_tokens_to_rows_and_back(sequences, make, pad_multiple_of):
    ids, positions, cu_seqlens = pack(sequences)
    batch = make(ids, cu_seqlens, pad_multiple_of=pad_multiple_of)
    assert torch.equal(batch.unfold(batch.input_ids), ids)
    assert torch.equal(batch.unfold(batch.position_ids), positions)
    assert torch.equal(batch.fold(ids)[: batch.num_nodes], batch.input_ids[: batch.num_nodes])
    assert batch.num_tokens == len(ids)
    assert batch.num_rows % pad_multiple_of == 0
    assert batch.num_rows - batch.num_nodes < pad_multiple_of
    assert not batch.input_ids[batch.num_nodes :].any()
    assert batch.lengths.tolist() == [len(sequence) for sequence in sequences]
    assert batch.num_sequences == len(sequences)
    nodes = len({tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))})
    assert batch.num_nodes == (nodes if make is radix_ops.fold else len(ids))
    assert batch.compact_ratio == (batch.num_nodes / len(ids) if len(ids) else 1.0)


def test_pack_is_the_plan_of_a_batch_with_nothing_to_fold():
    ids, _, cu_seqlens = pack(NAMED["disjoint"])
    assert_same_batch(
        radix_ops.pack(ids, cu_seqlens, pad_multiple_of=4), radix_ops.fold(ids, cu_seqlens, pad_multiple_of=4)
    )


def test_pack_does_not_share():
    batch = radix_ops.pack(*pack(NAMED["identical"])[::2])
    assert batch.compact_ratio == 1.0
    assert batch.run_sequences.tolist() == [0, 1, 2, 3]


def test_from_sequences(sequences):
    ids, _, cu_seqlens = pack(sequences)
    assert_same_batch(FoldedBatch.from_sequences(sequences), radix_ops.fold(ids, cu_seqlens))
    tensors = [torch.tensor(sequence, dtype=torch.int32) for sequence in sequences]
    assert_same_batch(FoldedBatch.from_sequences(tensors), radix_ops.fold(ids, cu_seqlens))


def padded(sequences, left, right, dtype=torch.int64):
    """Return rows with left[i] and right[i] padding tokens of id 99 around sequence i."""
    width = max((a + len(s) + b for a, s, b in zip(left, sequences, right, strict=True)), default=0)
    ids = torch.full((len(sequences), width), 99)
    mask = torch.zeros(len(sequences), width, dtype=dtype)
    for i, sequence in enumerate(sequences):
        start = left[i]
        ids[i, start : start + len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[i, start : start + len(sequence)] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
def test_from_padded(sequences, side, mask_dtype):
    longest = max(map(len, sequences), default=0)
    free = [longest - len(sequence) for sequence in sequences]
    none = [0] * len(sequences)
    left = {"left": free, "right": none, "both": [2 + i % 3 for i in range(len(sequences))]}[side]
    right = {"left": none, "right": free, "both": [i % 2 for i in range(len(sequences))]}[side]
    ids, mask = padded(sequences, left, right, mask_dtype)
    want = FoldedBatch.from_sequences(sequences, pad_multiple_of=4)
    assert_same_batch(FoldedBatch.from_padded(ids, mask, pad_multiple_of=4), want)


def test_from_padded_takes_positions():
    ids, mask = padded([[1, 2, 3], [1, 2]], [0, 1], [0, 0])
    positions = torch.tensor([[0, 1, 2], [0, 1, 2]])
    batch = FoldedBatch.from_padded(ids, mask, positions)
    assert batch.position_ids.tolist() == [0, 1, 2, 1, 2]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1], [1, 0, 1]], r"attention_mask\[1\] must be one unbroken stretch of 1s .* got \[1, 0, 1\]"),
        ([[0, 2, 2], [1, 1, 1]], r"attention_mask\[0\] must be one unbroken stretch of 1s .* got \[0, 2, 2\]"),
        ([[1, 1]], r"must have one shape \[B, T\], got \[2, 3\] for input_ids and \[1, 2\] for attention_mask"),
    ],
)
def test_from_padded_refuses_other_masks(mask, message, device):
    with pytest.raises(ValueError, match=message):
        FoldedBatch.from_padded(torch.ones(2, 3, dtype=torch.int64, device=device), torch.tensor(mask, device=device))


def test_from_padded_refuses_positions_of_another_shape():
    ids = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[2, 3\] for input_ids and \[3\] for position_ids"):
        FoldedBatch.from_padded(ids, ids, torch.arange(3))


@pytest.mark.parametrize("side", ["left", "right"])
def test_to_padded(sequences, side):
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=8)
    longest = max(map(len, sequences), default=0)
    want = torch.full((len(sequences), longest), -7)
    for row, sequence in zip(want, sequences, strict=True):
        if sequence:
            row[slice(-len(sequence), None) if side == "left" else slice(len(sequence))] = torch.tensor(sequence)
    assert torch.equal(batch.to_padded(batch.input_ids, side, fill=-7), want)
    wide = torch.stack([batch.input_ids, batch.input_ids * 2], 1)[:, :, None]
    assert torch.equal(batch.to_padded(wide, side)[:, :, 1, 0], (want * 2).masked_fill(want == -7, 0))


def test_to_padded_refuses_another_side():
    batch = FoldedBatch.from_sequences([[1]])
    with pytest.raises(ValueError, match='side must be "right" or "left", got \'top\''):
        batch.to_padded(batch.input_ids, "top")


def test_last_rows():
    batch = FoldedBatch.from_sequences(NAMED["duplicates"])
    assert batch.input_ids[batch.last_rows].tolist() == [2, 4, 2, 4, 5]
    assert FoldedBatch.from_sequences([]).last_rows.shape == (0,)
    with pytest.raises(ValueError, match="last_rows: a sequence of the batch is empty"):
        _ = FoldedBatch.from_sequences(NAMED["empty_between"]).last_rows


@pytest.mark.parametrize("method", ["fold", "unfold"])
def test_fold_and_unfold_refuse_other_lengths(method):
    batch = FoldedBatch.from_sequences([[1, 2], [1, 3]], pad_multiple_of=8)
    size = {"fold": ("num_tokens", 4), "unfold": ("num_rows", 8)}[method]
    with pytest.raises(
        ValueError, match=rf"{method}: x must have {size[0]}={size[1]} rows in dim 0, got shape \[5, 2\]"
    ):
        getattr(batch, method)(torch.rand(5, 2))
    with pytest.raises(ValueError, match=method):
        getattr(batch, method)(torch.tensor(1.0))
    with pytest.raises(TypeError, match=f"{method}: x must be a torch.Tensor, got ndarray"):
        getattr(batch, method)(torch.rand(size[1], 2).numpy())


def test_it_is_a_pytree_and_copies():
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    leaves, spec = torch.utils._pytree.tree_flatten(batch)
    assert len(leaves) == len(vars(batch))
    for copied in (
        torch.utils._pytree.tree_unflatten(leaves, spec),
        pickle.loads(pickle.dumps(batch)),
        copy.deepcopy(batch),
        batch.to("cpu", non_blocking=True),
    ):
        assert_same_batch(copied, batch)
    assert batch.to("meta").unfold_index.device.type == "meta"


GOOD = pack(NAMED["nested"])


@pytest.mark.parametrize("make", [radix_ops.fold, radix_ops.pack])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], GOOD[2]), TypeError, "input_ids must be a torch.Tensor or a NumPy array, got list"),
        ((GOOD[0].float(), GOOD[2]), TypeError, "input_ids must hold integers, got torch.float32"),
        ((GOOD[0], GOOD[2].half()), TypeError, "cu_seqlens must hold integers, got torch.float16"),
        ((GOOD[0], GOOD[2], GOOD[1].bool()), TypeError, "position_ids must hold integers, got torch.bool"),
        ((GOOD[0], GOOD[2], GOOD[1], 2.0), TypeError, "pad_multiple_of must be an int, got float"),
        ((GOOD[0], GOOD[2], GOOD[1], 0), ValueError, "pad_multiple_of must be from 1 to 2147483647, got 0"),
        ((GOOD[0][None], GOOD[2]), ValueError, r"input_ids must have 1 dimension, got shape \[1, 17\]"),
        (
            (GOOD[0], GOOD[2], GOOD[1][1:]),
            ValueError,
            "position_ids must be as long as input_ids, got 16 positions for 17",
        ),
        ((GOOD[0], GOOD[2][1:]), ValueError, "cu_seqlens must start at 0"),
        ((GOOD[0], GOOD[2][:-1]), ValueError, "cu_seqlens must .*end at"),
        ((GOOD[0], torch.tensor([0, 9, 8, 17])), ValueError, "cu_seqlens must .*not decrease"),
        ((GOOD[0], GOOD[2][:0]), ValueError, "cu_seqlens"),
        ((GOOD[0], GOOD[2].to("meta")), ValueError, "cu_seqlens is on meta, but input_ids is on cpu"),
    ],
)
def test_fold_and_pack_refuse_bad_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(*arguments)


@pytest.mark.parametrize(
    ("sequences", "error", "message"),
    [
        ([[1, 2], [1, 1.5]], TypeError, r"sequences\[1\] must hold integers, got 1.5"),
        ([["a"]], TypeError, r"sequences\[0\] must hold integers"),
        ([[1, True]], TypeError, r"sequences\[0\] must hold integers, got True"),
        ([[2**63]], ValueError, r"sequences\[0\] must hold integers that int64 holds, got 9223372036854775808"),
        ([[[1, 2]]], ValueError, r"sequences\[0\] must be a flat list of token ids, got shape \[1, 2\]"),
        ([1, 2], ValueError, r"sequences\[0\] must be a flat list of token ids, got shape \[\]"),
    ],
)
def test_from_sequences_refuses_bad_arguments(sequences, error, message):
    with pytest.raises(error, match=message):
        FoldedBatch.from_sequences(sequences)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ids: FoldedBatch.from_padded(ids, None), "attention_mask must be a torch.Tensor or a .* got NoneType"),
        (lambda ids: FoldedBatch.from_padded(ids.tolist(), ids), "input_ids must be a torch.Tensor or a .* got list"),
        (lambda ids: FoldedBatch.from_padded(ids, ids, [0]), "position_ids must be a torch.Tensor or a .* got list"),
        (lambda ids: FoldedBatch.from_sequences(None), "sequences must be a list of lists of token ids, got NoneType"),
        (lambda ids: FoldedBatch.from_sequences("12"), "sequences must be a list of lists of token ids, got str"),
        (lambda ids: FoldedBatch.from_sequences([[1]]).to(torch.float32), "dtype"),
    ],
)
def test_other_types_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call(torch.ones(2, 3, dtype=torch.int64))


def test_repr():
    batch = FoldedBatch.from_sequences([[1, 2], [1, 3]], pad_multiple_of=4)
    assert repr(batch) == (
        "FoldedBatch(num_sequences=2, num_tokens=4, num_rows=4, num_nodes=3, compact_ratio=0.75, device=cpu)"
    )
    assert "num_tokens=0, num_rows=0, num_nodes=0, compact_ratio=1," in repr(FoldedBatch.from_sequences([]))


def test_repr_looks_at_no_value():
    """It neither waits for a device nor fails where there are no values, or where sizes are symbols."""
    batch = FoldedBatch.from_sequences([[1, 2], [1, 3]])
    assert repr(batch.to("meta")) == repr(batch).replace("device=cpu", "device=meta")
    assert repr(tree_map(type, batch)).startswith("<radix_ops.batch.FoldedBatch object")
    shown = []

    def pool(ids, cu_seqlens):
        batch = radix_ops.fold(ids, cu_seqlens)
        shown.append(repr(batch))
        return batch.unfold(batch.input_ids)

    ids, _, cu_seqlens = pack(NAMED["nested"])
    make_fx(pool, tracing_mode="symbolic")(ids, cu_seqlens)
    sizes = r"num_tokens=(\w+), num_rows=\w+, num_nodes=(\w+), compact_ratio=\2/\1, device=cpu"
    assert re.fullmatch(rf"FoldedBatch\(num_sequences=.+, {sizes}\)", shown[0])


def test_repr_in_compiled_code_costs_a_graph_break_at_most():
    torch.compiler.reset()
    batch = FoldedBatch.from_sequences([[1, 2], [1, 3]])
    compiled = torch.compile(lambda batch, x: (f"{batch}", batch.unfold(x) + 1), backend="eager")
    text, tokens = compiled(batch, batch.input_ids)
    assert text == repr(batch)
    assert tokens.tolist() == [2, 3, 2, 4]


READ = """
import sys, torch, radix_ops
batch = torch.load(sys.argv[1], weights_only=True)
print(batch, batch.unfold(batch.input_ids).tolist(), batch.unfold_members is batch.unfold_index)
"""


@pytest.mark.parametrize("make", [radix_ops.fold, radix_ops.pack])
def test_saved_by_torch_and_read_without_pickles_that_run(tmp_path, make):
    ids, _, cu_seqlens = pack(NAMED["nested"])
    batch = make(ids, cu_seqlens)
    torch.save(batch, tmp_path / "batch.pt")
    assert_same_batch(torch.load(tmp_path / "batch.pt", weights_only=True), batch)
    found = processes.run_python("-W", "error", "-c", READ, tmp_path / "batch.pt")
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{batch} {ids.tolist()} {make is radix_ops.pack}\n"


@pytest.mark.parametrize("weights_only", [True, False])
@pytest.mark.parametrize("make", [radix_ops.fold, radix_ops.pack])
def test_batches_saved_before_modules_moved_into_packages_load(make, weights_only):
    ids = torch.tensor([5, 6, 7, 8, 5, 6, 7, 9, 5, 6])
    batch = torch.load(Path(__file__).parent / "saved_batches.pt", weights_only=weights_only)[make.__name__]
    assert torch.equal(batch.unfold(batch.input_ids), ids)
    assert batch.num_rows == (5 if make is radix_ops.fold else 10)
    assert_same_batch(batch, make(ids, torch.tensor([0, 4, 8, 10])))


def test_a_pickle_that_lacks_a_table_is_refused():
    state = vars(FoldedBatch.from_sequences([[1, 2], [1, 3]])).copy()
    del state["kv_index"]
    with pytest.raises(ValueError, match="a saved FoldedBatch must hold kv_index, a tensor"):
        FoldedBatch.__new__(FoldedBatch).__setstate__(state)
    with pytest.raises(ValueError, match="a saved FoldedBatch must hold num_nodes, an integer"):
        FoldedBatch.__new__(FoldedBatch).__setstate__(state | {"kv_index": torch.ones(1), "num_nodes": "3"})


def test_pinning_keeps_the_batch(monkeypatch):
    """Without a device, memory that isn't pinned stands in."""
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=8)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    pinned = torch.utils.data._utils.pin_memory.pin_memory({"batch": batch})["batch"]
    assert_same_batch(pinned, batch)
    assert (
        len({tensor.untyped_storage().data_ptr() for tensor in vars(pinned).values() if torch.is_tensor(tensor)}) == 1
    )
    with pytest.raises(ValueError, match="pin_memory: only a batch on the CPU can be pinned, this one is on meta"):
        batch.to("meta").pin_memory()


@pytest.mark.cuda
@pytest.mark.parametrize("make", [radix_ops.fold, radix_ops.pack])
def test_pinned_batches_travel_without_a_copy_on_the_host(make):
    ids, _, cu_seqlens = pack(NAMED["nested"])
    batch = make(ids.int(), cu_seqlens, pad_multiple_of=8)
    loaded = next(iter(torch.utils.data.DataLoader([batch], batch_size=None, pin_memory=True)))
    tensors = [value for value in vars(loaded).values() if torch.is_tensor(value)]
    assert all(tensor.is_pinned() for tensor in tensors)
    with torch.profiler.profile() as profile:
        moved = loaded.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
    copies = [event.name for event in profile.events() if event.name.startswith("Memcpy")]
    assert len(copies) == 1
    assert "Pinned" in copies[0]
    assert not any(event.name == "aten::pin_memory" for event in profile.events())
    assert_same_batch(moved.to("cpu"), batch)
