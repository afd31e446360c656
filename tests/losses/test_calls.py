"""Calls of losses on compact rows: precision, memory, frozen parameters, autocast, compilation, bad input."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from helpers.batches import NAMED
from helpers.packed_losses import Options, Packed, random_labels, tensors
from radix_ops import FoldedBatch, losses
from radix_ops.ops import head_plan
from radix_ops.ops.head import head_op, head_plan_op


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_plain_torch(dtype):
    """Values and gradients are at most 1.5 times as far from float64 as plain torch's on the same numbers."""
    batch = FoldedBatch.from_sequences([[*range(40), i, *range(i, i + 20)] for i in range(6)])
    inputs = tensors(batch, True, vocabulary=300, width=64)
    labels = random_labels(batch, 300)
    inputs = [(x.detach() / 3).to(dtype).requires_grad_() for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    options = Options(temperature=0.9, softcap=20.0)

    def results(function, inputs):
        value = function(*inputs)
        return value, *torch.autograd.grad(value.sum(), inputs)

    def ours(hidden, weight, bias):
        return losses.token_logprobs(
            hidden, batch, labels, weight=weight, bias=bias, rows_per_chunk=9, **options.scalars
        )

    def plain(hidden, weight, bias):
        return -Packed(hidden, batch, labels, weight, bias, options).losses()

    assert ours(*inputs).dtype == torch.float32
    for got, theirs, exact in zip(
        results(ours, inputs), results(plain, inputs), results(plain, exact_inputs), strict=True
    ):
        assert got.dtype == theirs.dtype
        assert (got - exact).norm() <= 1.5 * (theirs - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_the_head_is_rounded_once(dtype):
    """It is summed over many blocks of rows; in half precision the sum would be many times as far off."""
    batch = FoldedBatch.from_sequences([list(range(i, i + 30)) for i in range(0, 900, 30)])
    hidden, weight, _ = tensors(batch, False, torch.float32, vocabulary=900, width=16)
    hidden, weight = (x.detach().to(dtype).requires_grad_() for x in (hidden, weight))
    exact_inputs = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    labels = random_labels(batch, 900)
    exact = torch.autograd.grad(
        Packed(exact_inputs[0], batch, labels, exact_inputs[1], None, Options()).losses().sum(), exact_inputs
    )
    loss = losses.causal_lm_loss(hidden, batch, labels, weight=weight, reduction="sum", rows_per_chunk=2)
    for got, want in zip(torch.autograd.grad(loss, (hidden, weight)), exact, strict=True):
        assert got.dtype == dtype
        assert (got - want).norm() <= 1.05 * (want.to(dtype) - want).norm()


def allocations(function) -> list[int]:
    """List the bytes that each allocation of CPU memory takes, and each release gives back, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def run(hidden, weight, bias, batch, **more):
    logprobs, entropy = losses.token_logprobs_and_entropy(hidden, batch, weight=weight, bias=bias, **more)
    (logprobs + entropy).sum().backward()


@pytest.mark.parametrize(("rows_per_chunk", "dtype"), [(1, torch.float32), (3, torch.bfloat16), (8, torch.float32)])
def test_no_tensor_is_larger_than_a_block_of_logits(rows_per_chunk, dtype):
    """Nor are there more than a few of them at a time."""
    vocabulary = 5000
    batch = FoldedBatch.from_sequences([[*range(100), *range(i, i + 60)] for i in range(4)])
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors(batch, True, vocabulary=vocabulary, width=2)]
    sizes = allocations(lambda: run(*inputs, batch, rows_per_chunk=rows_per_chunk))
    block = 4 * rows_per_chunk * vocabulary
    small = 4 * vocabulary * 2 + 64 * batch.num_tokens  # gradients, and tables of tokens
    assert 0.7 * block <= max(sizes) <= max(block, small)
    held = highest = 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    assert highest <= 4 * block + 8 * small


def test_the_default_block_has_128_mib_of_logits():
    rows, columns = head_plan.block_shape(16384, 151_936, 0)
    assert 0.9 * 2**27 < rows * columns * 4 <= 2**27


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_what_is_frozen_has_no_gradient(frozen):
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    inputs = tensors(batch, True)
    run(*inputs, batch)
    some = [x.detach().clone().requires_grad_(i not in frozen) for i, x in enumerate(inputs)]
    run(*some, batch)
    for i, (got, want) in enumerate(zip(some, inputs, strict=True)):
        assert got.grad is None if i in frozen else torch.equal(got.grad, want.grad)


def test_a_frozen_head_costs_no_memory():
    vocabulary, width = 3000, 50
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    hidden, weight, _ = tensors(batch, False, torch.float32, vocabulary, width)
    of_weight = 4 * vocabulary * width
    assert max(allocations(lambda: run(hidden, weight, None, batch, rows_per_chunk=1))) >= of_weight
    weight = weight.detach()
    assert max(allocations(lambda: run(hidden, weight, None, batch, rows_per_chunk=1))) < of_weight / 2


def test_nothing_is_kept_without_gradients():
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    hidden, weight, _ = tensors(batch, False)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not losses.token_logprobs(hidden, batch, weight=weight).requires_grad
    assert not losses.token_logprobs(hidden.detach(), batch, weight=weight.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_multiplies_in_bfloat16_and_gives_gradients_in_their_own_dtype(dtype):
    """It is the packed loss on states and weights rounded to bfloat16; hidden states may be rounded already."""
    batch = FoldedBatch.from_sequences([[*range(30), i, *range(i, i + 9)] for i in range(5)])
    hidden, weight, bias = tensors(batch, True, torch.float32, 200, 32)
    hidden = hidden.detach().to(dtype).requires_grad_()
    labels = random_labels(batch, 200)
    with torch.autocast("cpu", torch.bfloat16):
        got = losses.causal_lm_loss(hidden, batch, labels, weight=weight, bias=bias, reduction="sum")
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (hidden, weight, bias)]
    want = Packed(rounded[0], batch, labels, *rounded[1:], Options()).losses().sum()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    inputs = (hidden, weight, bias)
    for grad, exact, x in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(want, rounded), inputs, strict=True
    ):
        assert grad.dtype == x.dtype
        torch.testing.assert_close(
            grad.float(), exact, **({} if x.dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3})
        )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    hidden, weight, bias = tensors(batch, True)

    def function(hidden, weight, bias):
        return losses.token_logprobs(hidden.sin(), batch, weight=weight, bias=bias).square().sum()

    want = torch.autograd.grad(function(hidden, weight, bias), (hidden, weight, bias))
    checkpoint(function, hidden, weight, bias, use_reentrant=reentrant).backward()
    for x, grad in zip((hidden, weight, bias), want, strict=True):
        assert torch.equal(x.grad, grad)


def test_second_derivatives_and_forward_mode_are_refused():
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    hidden, weight, _ = tensors(batch, False)
    value = losses.token_logprobs(hidden, batch, weight=weight).sum()
    (grad,) = torch.autograd.grad(value, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="radix_ops.losses can be differentiated once"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="radix_ops.losses have no forward-mode gradient"):
        torch.func.jvp(lambda x: losses.token_logprobs(x, batch, weight=weight), (hidden,), (hidden,))


def compiled_loss(hidden, batch, labels, weight, bias):
    more = {"weight": weight, "bias": bias, "temperature": 0.8}
    smoothed = losses.causal_lm_loss(hidden, batch, labels, label_smoothing=0.1, **more)
    return smoothed + losses.sequence_logprobs(hidden, batch, reduction="mean", **more).sum()


def test_compiles_as_one_graph_for_batches_of_all_sizes():
    first = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [1, 2, 5, 7], [8, 9], [1, 2, 3], [1, 2, 5]]
    others = [[[1, 2, 3]] * 3, [[7] * 7, [7, 7, 7, 8]], [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [], [1, 2, 3, 4]]]
    torch._dynamo.reset()
    with torch.fx.experimental._config.patch(use_duck_shape=False):
        compiled = torch.compile(compiled_loss, backend="aot_eager", fullgraph=True, dynamic=True)
        for i, sequences in enumerate([first, *others, []]):
            batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4)
            labels, inputs = random_labels(batch), tensors(batch, True)
            with torch._dynamo.config.patch(error_on_recompile=0 < i <= len(others)):
                got = compiled(inputs[0], batch, labels, *inputs[1:])
            want = compiled_loss(inputs[0], batch, labels, *inputs[1:])
            torch.testing.assert_close(got, want, equal_nan=True)
            grads = torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)
            torch.testing.assert_close(*grads, equal_nan=True)
    torch._dynamo.reset()


def test_opcheck():
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=4)
    hidden, weight, bias = tensors(batch, True)
    arguments = (random_labels(batch), batch.unfold_index, batch.cu_seqlens, batch.num_rows, weight.shape[0], -100, 3)
    torch.library.opcheck(head_plan_op, arguments)
    rows, ranks, labels, *_, blocks = head_plan_op(*arguments)
    for inputs, extra in (((hidden, weight, bias), "mean"), ((hidden, weight.detach(), None), "entropy")):
        options = (1.5, 2.0, 0.8, torch.float64, extra)
        torch.library.opcheck(head_op, (*inputs, rows, ranks, labels, blocks, *options))


class Sharded(torch.Tensor):
    """Stands for a DTensor, which takes a group of processes to make."""

    full_tensor = None


BATCH = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4]], pad_multiple_of=8)
HIDDEN, WEIGHT, LABELS = torch.randn(8, 5), torch.randn(13, 5), torch.tensor([1, 2, 3, 1, 2, 4])
BAD = [
    ({"batch": [[1, 2]]}, TypeError, "batch must be a FoldedBatch, got list"),
    ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
    ({"hidden": HIDDEN[:4]}, ValueError, "hidden must have shape [num_rows=8, D], got [4, 5]"),
    ({"hidden": HIDDEN[None]}, ValueError, "hidden must have shape [num_rows=8, D], got [1, 8, 5]"),
    ({"hidden": HIDDEN.long()}, TypeError, "float16, got torch.int64 for hidden, torch.float32 for weight"),
    ({"hidden": HIDDEN.bfloat16()}, TypeError, "hidden, weight and bias must be of one dtype (unless autocast is on)"),
    ({"hidden": HIDDEN.to("meta")}, ValueError, "hidden is on meta, but the batch is on cpu"),
    ({"weight": None}, TypeError, "weight must be a torch.Tensor, got NoneType"),
    ({"weight": WEIGHT.as_subclass(Sharded)}, TypeError, "weight must be a plain tensor, got a DTensor"),
    ({"weight": WEIGHT.T}, ValueError, "weight must have shape [V, D=5] with V at least 1, got [5, 13]"),
    ({"weight": WEIGHT[:0]}, ValueError, "weight must have shape [V, D=5] with V at least 1, got [0, 5]"),
    ({"bias": WEIGHT[:, :1]}, ValueError, "bias must have shape [V=13], got [13, 1]"),
    (
        {"bias": WEIGHT[:, 0].double()},
        TypeError,
        "got torch.float32 for hidden, torch.float32 for weight, torch.float64",
    ),
    ({"labels": LABELS[1:]}, ValueError, "labels must be packed, one for each of num_tokens=6, got shape [5]"),
    (
        {"labels": LABELS.view(2, 3)},
        ValueError,
        "got shape [2, 3]; attention_mask.bool() picks those of a padded batch",
    ),
    ({"labels": LABELS.float()}, TypeError, "labels must be int32 or int64, got torch.float32"),
    ({"labels": LABELS.tolist()}, TypeError, "labels must be a torch.Tensor, got list"),
    (
        {"labels": LABELS + 9},
        ValueError,
        "labels must be from 0 to 12, the last row of weight, or -100 for no target, got 13",
    ),
    (
        {"labels": LABELS - 3},
        ValueError,
        "labels must be from 0 to 12, the last row of weight, or -100 for no target, got -1",
    ),
    (
        {"weight": WEIGHT[:3]},
        ValueError,
        "labels must be from 0 to 2, the last row of weight, or -100 for no target, got 4",
    ),
    ({"temperature": 0.0}, ValueError, "temperature must be above 0 and finite, got 0.0"),
    ({"temperature": -1}, ValueError, "temperature must be above 0 and finite, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be above 0 and finite, got nan"),
    ({"temperature": torch.tensor(1.0)}, TypeError, "temperature must be a number, got Tensor"),
    ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
    ({"logit_scale": float("inf")}, ValueError, "logit_scale must be above 0 and finite, got inf"),
    ({"softcap": 0.0}, ValueError, "softcap must be above 0 and finite, got 0.0"),
    ({"softcap": True}, TypeError, "softcap must be a number, got bool"),
    ({"rows_per_chunk": 0}, ValueError, "rows_per_chunk must be at least 1, got 0"),
    ({"rows_per_chunk": 1.5}, TypeError, "rows_per_chunk must be an int or None, got float"),
]


@pytest.mark.parametrize(
    "function", ["token_logprobs", "token_logprobs_and_entropy", "token_entropy", "sequence_logprobs", "causal_lm_loss"]
)
def test_bad_input(function):
    good = {"hidden": HIDDEN, "batch": BATCH, "weight": WEIGHT}
    for changes, error, message in BAD:
        with pytest.raises(error) as caught:
            getattr(losses, function)(**good | changes)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        ("sequence_logprobs", {"reduction": "none"}, ValueError, "reduction must be one of 'sum', 'mean', got 'none'"),
        (
            "causal_lm_loss",
            {"reduction": None},
            ValueError,
            "reduction must be one of 'mean', 'sum', 'sequence', got None",
        ),
        ("causal_lm_loss", {"label_smoothing": 1.1}, ValueError, "label_smoothing must be from 0 to 1, got 1.1"),
        ("causal_lm_loss", {"label_smoothing": "0"}, TypeError, "label_smoothing must be a number, got str"),
        ("causal_lm_loss", {"ignore_index": 1.0}, TypeError, "ignore_index must be an int, got float"),
        ("causal_lm_loss", {"labels": LABELS - 103, "ignore_index": 2}, ValueError, "or 2 for no target, got -101"),
    ],
)
def test_bad_input_of_reductions(function, changes, error, message):
    with pytest.raises(error) as caught:
        getattr(losses, function)(HIDDEN, BATCH, **{"weight": WEIGHT} | changes)
    assert message in str(caught.value)


OPTIONS = {"softcap": 3.0, "temperature": 0.8}


@pytest.mark.parametrize("name", ["nested", "duplicates"])
def test_targets_made_ahead_give_the_same_bits(name):
    """They are those of the packed loss of plain torch, up to rounding."""
    batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4)
    hidden, weight, bias = tensors(batch, True)
    vocabulary = weight.shape[0]
    labels = random_labels(batch, vocabulary)
    labels[(labels == -100) | (torch.arange(batch.num_tokens) % 5 == 0)] = -7
    more = {"weight": weight, "bias": bias, **OPTIONS}
    for given, options in ((labels, {"ignore_index": -7}), (None, {})):
        chunks = {"rows_per_chunk": 2}
        targets = losses.plan_targets(batch, given, vocabulary=vocabulary, **options, **chunks)
        got = losses.causal_lm_loss(hidden, batch, targets, reduction="sum", **more)
        want = losses.causal_lm_loss(hidden, batch, given, reduction="sum", **more, **options, **chunks)
        assert torch.equal(got, want)
        packed = labels.masked_fill(labels == -7, -100) if given is not None else batch.unfold(batch.input_ids)
        exact = Packed(hidden, batch, packed, weight, bias, Options(**OPTIONS)).losses().sum()
        torch.testing.assert_close(got, exact)
        grads = (torch.autograd.grad(x, (hidden, weight, bias)) for x in (got, want))
        assert all(map(torch.equal, *grads))
        # Others of the batch share them.
        assert losses.sequence_logprobs(hidden, batch, targets, **more).shape == (batch.num_sequences,)


OTHER = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4]], pad_multiple_of=8)
TARGETS = losses.plan_targets(BATCH, vocabulary=13)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": OTHER}, ValueError, "labels are the targets of another batch; plan_targets(batch, ...) makes those"),
        ({"weight": WEIGHT[:12]}, ValueError, "labels are targets of vocabulary=13, but weight has 12 rows"),
        ({"rows_per_chunk": 3}, ValueError, "rows_per_chunk must be given to plan_targets, where labels are targets"),
        ({"ignore_index": 3}, ValueError, "ignore_index must be given to plan_targets, where labels are targets"),
    ],
)
def test_targets_that_do_not_fit_a_loss(changes, error, message):
    with pytest.raises(error) as caught:
        losses.causal_lm_loss(**{"hidden": HIDDEN, "batch": BATCH, "labels": TARGETS, "weight": WEIGHT} | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": [[1, 2]]}, TypeError, "batch must be a FoldedBatch, got list"),
        ({"labels": LABELS[1:]}, ValueError, "labels must be packed, one for each of num_tokens=6, got shape [5]"),
        ({"labels": LABELS + 9}, ValueError, "labels must be from 0 to 12, the last row of weight, or -100"),
        ({"vocabulary": 0}, ValueError, "vocabulary must be at least 1, got 0"),
        ({"vocabulary": 13.0}, TypeError, "vocabulary must be an int, got float"),
        ({"rows_per_chunk": 0}, ValueError, "rows_per_chunk must be at least 1, got 0"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
    ],
)
def test_bad_input_of_targets(changes, error, message):
    with pytest.raises(error) as caught:
        losses.plan_targets(**{"batch": BATCH, "vocabulary": 13} | changes)
    assert message in str(caught.value)
