"""Losses on compact rows on CUDA, and their Triton kernels, which Triton's interpreter runs where there is no GPU."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from helpers import processes
from helpers.batches import NAMED
from helpers.packed_losses import OPTIONS, Options, Packed, check_all, random_labels, tensors
from radix_ops import FoldedBatch, losses
from radix_ops.ops import head, head_plan

SHARED = [[*range(40), i, *range(i, i + 20)] for i in range(6)] + [list(range(30))] * 3
GIB = 2**30


def check_statistics(device):
    """Check three blocks of 50 columns, of which the first holds no finite logit of row 2."""
    from radix_ops.ops import head_triton

    logits = torch.randn(3, 7, 50, device=device) * 5
    logits[0, 2] = -torch.inf
    logits[1, :, 3:9] = -torch.inf
    for has_spread in (False, True):
        got, want = ([torch.zeros(7, device=device) for _ in range(3)] for _ in range(2))
        for kernels, (highest, total, spread) in ((head_triton, got), (head._Plain, want)):
            highest.fill_(-torch.inf)
            for block in logits.clone():
                kernels.update_statistics(block, highest, total, spread if has_spread else None)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        probabilities = logits.movedim(0, 1).flatten(1).double().softmax(-1)
        entropy = torch.special.entr(probabilities).sum(-1).float()
        if has_spread:
            torch.testing.assert_close(got[1].log() + got[2] / got[1], entropy, rtol=1e-5, atol=1e-5)


def check_gradients(device):
    from radix_ops.ops import head_triton

    logits = torch.randn(7, 50, device=device)
    logits[:, 3:9] = -torch.inf
    vectors = torch.randn(4, 7, 1, device=device)
    for some in ((True, True, False, False), (True, True, True, False), (True, True, False, True), (True,) * 4):
        terms = head._RowTerms(*[x if given else None for x, given in zip(vectors, some, strict=True)])
        for bent in (0.0, 0.3):
            finite = logits.clamp(min=-3.0) if bent else logits  # a softcap leaves none that are not
            got = head_triton.gradient(finite, terms, bent, torch.float32)
            want = head._Plain.gradient(finite.clone(), terms, bent, torch.float32)
            # What is added up is of the size of the vectors, and may cancel.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(vectors.abs().max()))
            # One step of bfloat16: the interpreter cuts digits off.
            half = head_triton.gradient(finite, terms, bent, torch.bfloat16)
            torch.testing.assert_close(half.float(), got, rtol=2**-7, atol=1e-6)


def check_errors(sequences, dtype, device):
    """Values are at most 1.5 times as far from float64 as plain torch's in the same dtype. Gradients are as far as two
    roundings make them, of each number of the logits' gradient, before it is summed, and of each of the result."""
    batch = FoldedBatch.from_sequences(sequences, device=device)
    labels = random_labels(batch, 300)
    inputs = tensors(batch, True, vocabulary=300, width=64, device=device)
    inputs = [(x.detach() / 3).to(dtype).requires_grad_() for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    for options in (Options(), Options(temperature=0.9, logit_scale=1.1, softcap=20.0, with_bias=True)):

        def results(function, inputs, options=options):
            values = function(*inputs, options)
            factors = torch.linspace(-1, 2, len(values[0]), device=device)
            weighted = sum((value * factors).sum() for value in values)
            return values, torch.autograd.grad(weighted, inputs, allow_unused=True)

        def ours(hidden, weight, bias, options):
            head = {
                "weight": weight,
                "bias": bias if options.with_bias else None,
                "rows_per_chunk": 2,
                **options.scalars,
            }
            return losses.token_logprobs_and_entropy(hidden, batch, labels, **head)

        def plain(hidden, weight, bias, options):
            packed = Packed(hidden, batch, labels, weight, bias if options.with_bias else None, options)
            return -packed.losses(), packed.entropy()

        (values, gradients), (exact_values, exact_gradients) = results(ours, inputs), results(plain, exact_inputs)
        for got, theirs, exact in zip(values, results(plain, inputs)[0], exact_values, strict=True):
            assert got.dtype == theirs.dtype
            assert (got - exact).norm() <= 1.5 * (theirs - exact).norm() + 2e-6 * exact.norm()
        hidden, weight, bias = exact_inputs
        # The scores stand for states: their gradient is that of the logits, [rows, vocabulary].
        _, (of_logits, *_) = results(plain, (hidden @ weight.T, torch.eye(300).to(weight).requires_grad_(), bias))
        squares = of_logits.square()
        sums = squares @ weight.square(), squares.T @ hidden.square(), squares.sum(0)
        for x, got, exact, squares_summed in zip(inputs, gradients, exact_gradients, sums, strict=True):
            if exact is None:
                assert got is None
                continue
            assert got.dtype == x.dtype
            # Roundings to nearest make less than 0.6 of this on average, whatever numbers there are.
            budget = torch.finfo(dtype).eps / 2 * (squares_summed.sum() + exact.square().sum()).sqrt()
            assert (got - exact).norm() <= budget + 2e-6 * exact.norm()


def interpret():
    """Run the kernels on the CPU, alone and then as CUDA's losses in half precision use them."""
    from radix_ops.ops import head_triton

    torch.manual_seed(0)
    head_triton._BLOCK = 16
    check_statistics("cpu")
    check_gradients("cpu")

    def multiply_into(out, a, b, *, alpha=1.0, beta=0.0):
        out.addmm_(a.to(out.dtype), b.to(out.dtype), alpha=alpha, beta=beta)

    def gradient(logits, terms, bent, dtype):
        return in_fp32(logits, terms, bent, torch.float32).to(dtype)

    in_fp32, head_triton.gradient = head_triton.gradient, gradient  # since the interpreter cuts digits of bfloat16 off
    head._multiply_into = multiply_into
    head._operand_dtype = lambda device, dtype: dtype
    head_triton._BLOCK = 512
    head_plan._MIN_COLUMNS = 80
    for dtype in (torch.bfloat16, torch.float16):
        check_errors([SHARED[0][:6], [*SHARED[0][:4], 9, 8], SHARED[0][:4]], dtype, "cpu")
    print("interpreted")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed, which no CPU needs")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="test_kernels runs them on the GPU; triton 3.6 can't interpret them"
)
def test_kernels_interpreted():
    result = processes.run_python(__file__, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "interpreted\n"


@pytest.mark.cuda
def test_kernels():
    check_statistics("cuda")
    check_gradients("cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("rows_per_chunk", "narrowest"), [(None, 1024), (1, 2), (3, 1), (5, 1024)])
def test_values_and_gradients_equal_those_of_the_packed_batch(rows_per_chunk, narrowest, options, monkeypatch):
    monkeypatch.setattr(head_plan, "_MIN_COLUMNS", narrowest)
    for name in ("nested", "identical", "empty_between", "all_empty", "no_sequences"):
        batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4, device="cuda")
        check_all(batch, options, rows_per_chunk, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_plain_torch(dtype, monkeypatch):
    monkeypatch.setattr(head_plan, "_MIN_COLUMNS", 80)
    check_errors(SHARED, dtype, "cuda")


def large(num_rows, vocabulary, width, dtype=torch.bfloat16):
    """Return a batch of num_rows + 8 packed tokens, 8 sequences that share their first, and a model's tensors."""
    ids = torch.randint(1, vocabulary, (8, num_rows // 8 + 1), device="cuda")
    ids[:, 0] = 0
    batch = FoldedBatch.from_sequences(list(ids))
    hidden = torch.randn(batch.num_rows, width, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device="cuda") / width**0.5).to(dtype).requires_grad_()
    return batch, hidden, weight


@pytest.mark.cuda
@pytest.mark.parametrize("width", [1024, 2560])
@pytest.mark.parametrize("function", ["token_logprobs", "token_logprobs_and_entropy", "causal_lm_loss"])
def test_memory_at_a_vocabulary_of_151936(width, function):
    """Forward and backward take at most 1 GiB beside states, their gradient and the head's."""
    batch, hidden, weight = large(16384 - 8, 151_936, width)
    more = {"label_smoothing": 0.1, "softcap": 30.0} if function == "causal_lm_loss" else {}
    for _ in range(2):  # the first call compiles, and takes the workspace of products
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = getattr(losses, function)(hidden, batch, weight=weight, **more)
        result = result if isinstance(result, tuple) else (result,)
        torch.autograd.backward([x.sum() for x in result])
        torch.cuda.synchronize()
        beside = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
    print(f"{function}, width {width}: {beside / GIB:.3f} GiB")
    assert beside <= GIB
    assert hidden.grad.isfinite().all()


@pytest.mark.cuda
def test_the_host_waits_twice_and_never_in_the_backward():
    batch, hidden, weight = large(4000, 5000, 64)

    def run(rows_per_chunk):
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            loss = losses.causal_lm_loss(hidden, batch, weight=weight, rows_per_chunk=rows_per_chunk)
            forward = len(waits)
            loss.backward()
        return forward, len(waits) - forward

    run(50)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        assert [run(rows) for rows in (5000, 500, 50)] == [(2, 0)] * 3
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bits_on_every_run(dtype):
    batch = FoldedBatch.from_sequences(SHARED * 40, device="cuda")
    inputs = [x.detach().to(dtype).requires_grad_() for x in tensors(batch, True, vocabulary=300, device="cuda")]
    labels = random_labels(batch, 300)
    factors = torch.randn(batch.num_tokens, device="cuda")
    results = []
    for _ in range(5):
        head = {"weight": inputs[1], "bias": inputs[2], "rows_per_chunk": 30}
        values = losses.token_logprobs_and_entropy(inputs[0], batch, labels, **head)
        grads = torch.autograd.grad(sum((value * factors).sum() for value in values), inputs)
        results.append((*values, *grads))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)


@pytest.mark.cuda
def test_a_block_of_more_logits_than_32_bits_count():
    batch, hidden, weight = large(16384, 151_936, 64)
    grads = []
    for rows_per_chunk in (None, 20_000):
        loss = losses.causal_lm_loss(hidden, batch, weight=weight, rows_per_chunk=rows_per_chunk)
        grads.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-7)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype):
    """Results are those of bfloat16 throughout, with gradients of the head in its own fp32."""
    batch, hidden, weight = large(1000, 3000, 64, torch.float32)
    hidden = hidden.detach().to(dtype).requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        got = losses.causal_lm_loss(hidden, batch, weight=weight)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    want = losses.causal_lm_loss(rounded[0], batch, weight=rounded[1])
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(got, (hidden, weight))
    assert [grad.dtype for grad in grads] == [dtype, torch.float32]
    for grad, wanted in zip(grads, torch.autograd.grad(want, rounded), strict=True):
        assert torch.equal(grad.bfloat16(), wanted)


@pytest.mark.cuda
def test_compiled():
    def loss(hidden, batch, weight):
        logprobs, entropy = losses.token_logprobs_and_entropy(hidden, batch, weight=weight)
        return (logprobs.exp() - 0.1 * entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for num_rows in (800, 1600):
        batch, hidden, weight = large(num_rows, 3000, 64)
        got, want = (function(hidden, batch, weight) for function in (compiled, loss))
        torch.testing.assert_close(got, want)
        grads = [torch.autograd.grad(value, (hidden, weight)) for value in (got, want)]
        torch.testing.assert_close(*grads)
    torch._dynamo.reset()


@pytest.mark.cuda
def test_labels_outside_the_vocabulary_are_an_error_and_leave_the_device_well():
    batch, hidden, weight = large(400, 3000, 64)
    labels = batch.unfold(batch.input_ids)
    for bad in (3000, -1):
        labels[5] = bad
        with pytest.raises(ValueError, match=f"labels must be from 0 to 2999, .* got {bad}$"):
            losses.token_logprobs(hidden, batch, labels, weight=weight)
    torch.cuda.synchronize()


if __name__ == "__main__":
    interpret()
