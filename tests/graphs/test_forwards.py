"""Which forwards are padded, captured and replayed. A stand-in for what CUDA does computes where a graph would."""

from __future__ import annotations

import contextlib

import pytest
import torch

from helpers.batches import NAMED
from helpers.qwen3_models import FILLED, oracle, run_theirs
from radix_ops import FoldedBatch
from radix_ops.graphs import forwards, shelf
from radix_ops.models import replaying
from radix_ops.models.qwen3 import Qwen3Model

LONG = [[7, 8] * 40 + [i] * (20 + i) for i in range(5)]
LIKE_LONG = [[5, 6, 9] * 26 + [30 + i] * (20 + i) for i in range(5)]  # of its sizes


class StandIn:
    """What `Captured` is, with every kernel launched anew."""

    made = replays = 0

    def __init__(self, compute, inputs, count, memory):
        StandIn.made += 1
        self.compute, self.inputs = compute, inputs

    def replay(self, batch, rows):
        StandIn.replays += 1
        self.inputs.fill(batch, rows)
        return self.compute(self.inputs)[: batch.num_rows if rows is None else len(rows)].clone()


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setattr(forwards, "Captured", StandIn)
    monkeypatch.setattr(forwards, "Memory", lambda *_: torch.empty(0))
    monkeypatch.setattr(forwards, "why_eager", lambda *_: "gradients" if torch.is_grad_enabled() else None)
    monkeypatch.setattr(forwards, "_kernels", lambda *_: (True, True))
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(replaying, "is_bound_by_host", lambda *_: True)
    monkeypatch.setattr(StandIn, "made", 0)
    monkeypatch.setattr(StandIn, "replays", 0)
    oracle(tmp_path)
    return Qwen3Model.from_pretrained(tmp_path, torch.bfloat16)


def call(model, batch, layout="trie", **options):
    with torch.no_grad():
        return model(batch, layout, **options)


def eager(model, batch, layout="trie"):
    model.cuda_graphs = False
    result = call(model, batch, layout)
    model.cuda_graphs = True
    return result


def test_the_second_batch_of_a_size_is_captured_and_later_ones_replayed(model):
    first, second = (FoldedBatch.from_sequences(sequences) for sequences in (LONG, LIKE_LONG))
    want = {batch: eager(model, batch) for batch in (first, second)}
    counts = []
    for batch in (first, second, first, second):
        torch.testing.assert_close(call(model, batch), want[batch], rtol=0.05, atol=0.05)
        counts.append((StandIn.made, StandIn.replays))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_results_are_those_of_transformers(model, tmp_path):
    """The error of replayed rows is that of rounding weights and states to bfloat16."""
    theirs = oracle(tmp_path / "again")
    rounded = oracle(tmp_path / "rounded", torch.bfloat16)
    errors = {"ours": 0.0, "theirs": 0.0}
    for name in FILLED:
        batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4)
        with torch.no_grad():
            exact, plain = run_theirs(theirs, NAMED[name])[0], run_theirs(rounded, NAMED[name])[0]
        for _ in range(3):
            got = batch.unfold(call(model, batch))
        errors["ours"] += float((got.float() - exact).norm()) ** 2
        errors["theirs"] += float((plain.float() - exact).norm()) ** 2
    assert StandIn.replays > 0
    assert errors["ours"] <= 2**2 * errors["theirs"]


def test_equal_batches_give_equal_bits_before_the_capture_and_after(model):
    batch = FoldedBatch.from_sequences(LONG)
    results = [call(model, batch) for _ in range(4)]
    assert all(torch.equal(result, results[0]) for result in results)
    rows = batch.last_rows
    results = [call(model, batch, rows=rows) for _ in range(4)]
    assert all(torch.equal(result, results[0]) for result in results)
    assert StandIn.made == 2


@pytest.mark.parametrize("layout", ["trie", "compact"])
def test_bits_are_the_same_with_and_without_gradients(model, layout):
    batch = FoldedBatch.from_sequences(LONG, pad_multiple_of=5)
    for rows in (None, batch.last_rows):
        with_gradients = model(batch, layout, rows)
        assert with_gradients.requires_grad
        for _ in range(3):
            assert torch.equal(call(model, batch, layout, rows=rows), with_gradients)
    assert StandIn.replays == 4


def test_padding_rows_take_no_part_in_gradients(model, tmp_path):
    """Token 0, which older padding has, is NaN; transformers has the same gradients of the rest, to rounding."""
    sequences = [[1, 2, 3, 4], [1, 2, 5], [6]]
    weights = dict(model.named_parameters())
    with torch.no_grad():
        weights["embed_tokens.weight"][0] = float("nan")
    theirs = oracle(tmp_path / "theirs").double()
    run_theirs(theirs, sequences)[0].square().sum().backward()
    batch = FoldedBatch.from_sequences(sequences)
    batch.unfold(model(batch, "trie")).float().square().sum().backward()
    for name, exact in theirs.model.named_parameters():
        got = weights[name].grad
        assert got.isfinite().all(), name
        assert (got.double() - exact.grad).norm() <= 0.1 * exact.grad.norm(), name


def test_rows_that_the_batch_does_not_have_are_refused(model):
    batch = FoldedBatch.from_sequences(LONG)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), pytest.raises(RuntimeError, match="-1"):
            model(batch, "trie", torch.tensor([0, batch.num_rows]))


def test_a_change_gives_up_the_graphs_and_the_call_sees_it(model):
    batch = FoldedBatch.from_sequences(LONG)
    for _ in range(3):
        before = call(model, batch)
    model.layers[0].self_attn.sliding_window = 3
    after = call(model, batch)
    assert len(model._graphs) == 0
    assert not torch.equal(after, before)
    for _ in range(2):
        assert torch.equal(call(model, batch), after)
    assert len(model._graphs) == 1


def test_a_hook_is_called_as_often_as_without_graphs(model):
    batch = FoldedBatch.from_sequences(LONG)
    for _ in range(3):
        before = call(model, batch)
    calls = []
    handle = model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        call(model, batch)
    # The stand-in runs hooks, which a graph does not: it was asked once more, before the hook was found.
    assert len(calls) == 3 + 1
    assert len(model._graphs) == 0
    handle.remove()
    assert torch.equal(call(model, batch), before)


def test_a_capture_that_fails_is_told_once_for_a_size(model, monkeypatch):
    class Failing(StandIn):
        def __init__(self, *arguments):
            raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(forwards, "Captured", Failing)
    batch = FoldedBatch.from_sequences(LONG)
    want = call(model, batch)
    with pytest.warns(UserWarning, match="without a CUDA graph, since it could not be captured: OutOfMemoryError: no"):
        assert torch.equal(call(model, batch), want)
    for _ in range(3):
        assert torch.equal(call(model, batch), want)
    assert len(model._graphs) == 0


def test_warm_up_captures_at_once(model):
    batch = FoldedBatch.from_sequences(LONG)
    assert model.warm_up(batch, "trie")
    assert StandIn.made == 1
    call(model, batch)
    assert StandIn.made == 1
    model.train()
    assert not model.warm_up(batch, "trie")
    model.eval()
    model.cuda_graphs = False
    assert not model.warm_up(batch, "trie")


def test_warm_up_raises_what_the_call_does(model):
    batch = FoldedBatch.from_sequences(LONG)
    for arguments, error, message in (
        ((batch, "tree"), ValueError, "layout must be one of 'auto', .*got 'tree'"),
        ((batch, "trie", [1]), TypeError, "rows must be a 1-D tensor of int32 or int64, got list"),
        (([[1, 2]],), TypeError, "batch must be a FoldedBatch, got list"),
    ):
        for function in (model, model.warm_up):
            with pytest.raises(error, match=message):
                function(*arguments)
    assert StandIn.made == 0


def test_calls_that_are_none_of_a_graphs_do_not_take_one(model):
    batch = FoldedBatch.from_sequences(LONG)
    for _ in range(3):
        model(batch, "trie")  # gradients
        call(model, batch, "unfold")
        call(model.train(), batch)
        model.eval()
    assert StandIn.made == 0
    with pytest.raises(ValueError, match="layout must be one of"):
        call(model, batch, "tree")
    with pytest.raises(TypeError, match="rows must be a 1-D tensor"):
        call(model, batch, rows=[1])


def test_there_is_an_end_to_graphs(model, monkeypatch):
    monkeypatch.setattr(shelf, "_MOST_GRAPHS", 2)
    batches = [FoldedBatch.from_sequences([[1] * length]) for length in (20, 100, 200, 300)]
    for _ in range(3):
        for batch in batches:
            call(model, batch)
    assert len(model._graphs) == 2
