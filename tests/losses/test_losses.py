"""Losses on compact rows against torch.nn.functional on the packed batch, token by token, in values and gradients."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import radix_ops
from helpers.batches import NAMED, random_sequences, rounds
from helpers.packed_losses import OPTIONS, VOCABULARY, Options, Packed, assert_same, check_all, random_labels, tensors
from radix_ops import FoldedBatch, losses
from radix_ops.ops import head_plan

# (rows_per_chunk, narrowest block): whole rows, one and several at a time, then parts of the vocabulary.
BLOCKS = [(None, 1024), (1, 1024), (3, 1024), (100, 1024), (1, 2), (2, 3), (3, 1), (5, 4)]


@pytest.mark.parametrize("name", NAMED)
def test_values_and_gradients_equal_those_of_the_packed_batch(name, monkeypatch):
    batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4)
    for i, options in enumerate(OPTIONS[:2]):
        monkeypatch.setattr(head_plan, "_MIN_COLUMNS", [1024, 2][i])
        check_all(batch, options, [None, 1][i])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows_per_chunk", "narrowest"), [BLOCKS[0], BLOCKS[5]])
def test_options(rows_per_chunk, narrowest, options, monkeypatch):
    monkeypatch.setattr(head_plan, "_MIN_COLUMNS", narrowest)
    check_all(FoldedBatch.from_sequences(NAMED["nested"] + NAMED["duplicates"]), options, rows_per_chunk)


@pytest.mark.parametrize(("rows_per_chunk", "narrowest"), BLOCKS)
def test_blocks(rows_per_chunk, narrowest, monkeypatch):
    monkeypatch.setattr(head_plan, "_MIN_COLUMNS", narrowest)
    check_all(FoldedBatch.from_sequences(NAMED["nested"] + NAMED["duplicates"]), OPTIONS[-1], rows_per_chunk)


def test_random_batches(monkeypatch):
    for seed in rounds(12):
        rng = np.random.default_rng(seed)
        sequences = [[token % VOCABULARY for token in sequence[:60]] for sequence in random_sequences(rng)]
        monkeypatch.setattr(head_plan, "_MIN_COLUMNS", int(rng.choice([1, 2, 5, 1024])))
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=int(rng.choice([1, 8])))
        rows = [None, 1, 3, 7, 64, batch.num_rows + 5][rng.integers(6)]
        check_all(batch, OPTIONS[rng.integers(len(OPTIONS))], rows)


def test_blocks_hold_what_is_asked_for():
    for num_rows, vocabulary, rows in itertools.product(
        (1, 7, 16384, 100_000), (1, 50, 151_936), (0, 1, 3, 500, 20_000)
    ):
        block_rows, block_columns = head_plan.block_shape(num_rows, vocabulary, rows)
        assert 1 <= block_rows <= num_rows
        assert 1 <= block_columns <= vocabulary
        assert block_rows * block_columns <= (rows * vocabulary or max(2**25, vocabulary))
        # There are at most twice as many blocks as logits need.
        whole = min(rows * vocabulary or 2**25, num_rows * vocabulary)
        assert block_rows * block_columns * 2.2 >= whole


def test_other_batches_of_the_same_tokens():
    """Packed, padded on either side, with labels of another dtype or none, they give the same as folded from lists."""
    sequences = NAMED["nested"] + [[]] + NAMED["identical"]
    batch = FoldedBatch.from_sequences(sequences)
    hidden, weight, _ = tensors(batch, False)
    states = batch.unfold(hidden)
    want = losses.token_logprobs(hidden, batch, weight=weight)
    ids = batch.input_ids[batch.unfold_index.long()]
    labels = random_labels(batch)
    for dtype in (torch.int32, torch.int64):
        torch.testing.assert_close(losses.token_logprobs(hidden, batch, ids.to(dtype), weight=weight), want)
    plain = radix_ops.pack(ids, batch.cu_seqlens, pad_multiple_of=8)
    filled = F.pad(states, (0, 0, 0, plain.num_rows - plain.num_tokens), value=float("nan"))
    assert_same(losses.token_logprobs(filled, plain, weight=weight), want, (hidden, weight))
    longest = max(map(len, sequences))
    mask = torch.zeros(len(sequences), longest, dtype=torch.bool)
    for row, sequence in zip(mask, sequences, strict=True):
        start = torch.randint(0, longest - len(sequence) + 1, ())
        row[start : start + len(sequence)] = True
    padded_ids = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, ids)
    padded_labels = torch.zeros(mask.shape, dtype=torch.int64).masked_scatter(mask, labels)
    padded = FoldedBatch.from_padded(padded_ids, mask.long())
    got = losses.token_logprobs(hidden, padded, padded_labels[mask], weight=weight)
    assert_same(got, losses.token_logprobs(hidden, batch, labels, weight=weight), (hidden, weight))


def test_tokens_that_share_a_row_keep_their_labels():
    batch = FoldedBatch.from_sequences([[1, 2, 3]] * 3)
    hidden, weight, _ = tensors(batch, False)
    labels = torch.tensor([-100, 4, 5, -100, 6, -100, 9, 4, 0])
    got = losses.token_logprobs(hidden, batch, labels, weight=weight)
    logprobs = (hidden @ weight.T).log_softmax(-1)
    rows = [None, 0, 1, None, 0, None, None, 0, 1]
    want = [got.new_zeros(()) if row is None else logprobs[row, label] for row, label in zip(rows, labels, strict=True)]
    torch.testing.assert_close(got, torch.stack(want))


def test_entropy_counts_a_row_as_often_as_it_predicts():
    batch = FoldedBatch.from_sequences([[1, 2]] * 3 + [[3, 4]])
    hidden, weight, _ = tensors(batch, False)
    entropy = losses.token_entropy(hidden, batch, weight=weight)
    logprobs = (hidden @ weight.T).log_softmax(-1)
    of_rows = -(logprobs.exp() * logprobs).sum(-1)
    torch.testing.assert_close(entropy.sum() / 4, (3 * of_rows[0] + of_rows[2]) / 4)


@pytest.mark.parametrize("function", ["token_logprobs_and_entropy", "causal_lm_loss"])
def test_gradcheck(function, monkeypatch):
    monkeypatch.setattr(head_plan, "_MIN_COLUMNS", 3)
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=4)
    labels = random_labels(batch)
    more = {"label_smoothing": 0.1} if function == "causal_lm_loss" else {}
    scalars = {"softcap": 1.5, "temperature": 0.8, "rows_per_chunk": 2}

    def run(hidden, weight, bias):
        return getattr(losses, function)(hidden, batch, labels, weight=weight, bias=bias, **scalars, **more)

    torch.autograd.gradcheck(run, tensors(batch, True))


def test_only_rows_with_a_target_run_and_nothing_unwritten_is_read():
    """States of last tokens, of rows before ignored labels and of padding rows are NaN, and so is new memory."""
    batch = FoldedBatch.from_sequences(NAMED["nested"] + NAMED["identical"], pad_multiple_of=16)
    labels = random_labels(batch, ignored=0.5)
    hidden, weight, bias = tensors(batch, True)
    packed = Packed(hidden, batch, labels, weight, bias, Options())
    is_read = torch.zeros(batch.num_rows, dtype=torch.bool)
    is_read[batch.unfold_index[[i - 1 for i in packed.places]].long()] = True
    assert 0 < is_read.sum() < batch.num_nodes
    poisoned = hidden.detach().masked_fill(~is_read[:, None], float("nan")).requires_grad_()
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty gives
    try:
        got = losses.token_logprobs(poisoned, batch, labels, weight=weight, bias=bias, rows_per_chunk=3)
        grads = torch.autograd.grad(got.sum(), (poisoned, weight, bias))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(got, -packed.losses())
    wants = torch.autograd.grad(-packed.losses().sum(), (hidden, weight, bias))
    for grad, want in zip(grads, wants, strict=True):
        torch.testing.assert_close(grad, want)


def test_infinite_bias_and_large_logits(monkeypatch):
    """A bias of -inf takes a token out of the vocabulary, or a whole block; logits of thousands overflow nothing."""
    monkeypatch.setattr(head_plan, "_MIN_COLUMNS", 2)
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    for scale in (1.0, 3000.0):
        hidden, weight, bias = inputs = tensors(batch, True)
        with torch.no_grad():
            hidden.mul_(scale)
            bias[:9] = -torch.inf
        labels = torch.full((batch.num_tokens,), 10)
        packed = Packed(hidden, batch, labels, weight, bias, Options())
        head = {"weight": weight, "bias": bias, "rows_per_chunk": 1}
        assert_same(losses.token_logprobs(hidden, batch, labels, **head), -packed.losses(), inputs)
        entropy = losses.token_entropy(hidden, batch, labels, **head)
        torch.testing.assert_close(entropy, packed.entropy())
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(entropy.sum(), inputs))


def test_labels_of_first_tokens_are_not_looked_at():
    batch = FoldedBatch.from_sequences([[1, 2, 3], [4], [1, 2]])
    hidden, weight, _ = tensors(batch, False)
    labels = torch.tensor([999, 2, 3, -7, 10**12, 2])
    got = losses.token_logprobs(hidden, batch, labels, weight=weight)
    torch.testing.assert_close(got, losses.token_logprobs(hidden, batch, weight=weight))
