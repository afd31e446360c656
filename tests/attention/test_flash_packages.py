"""FlashAttention 3 and 4 behind the layouts "compact" and "unfold", and behind packed batches, where they are there."""

from __future__ import annotations

import pytest
import torch

import radix_ops
from helpers.op_samples import op_of, samples_of
from helpers.tries import LONG
from radix_ops import FoldedBatch, attention
from radix_ops.ops import flash_packages

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("error:radix_ops")]
# Heads of queries, of keys, head_dim, dtype, sliding window: what each package was tried with.
KINDS = {
    "fa3-fwd": [
        (16, 8, 128, torch.bfloat16, None),
        (32, 8, 128, torch.bfloat16, None),
        (9, 3, 64, torch.bfloat16, None),
        (4, 4, 80, torch.bfloat16, None),
        (6, 1, 10, torch.bfloat16, None),
        (8, 2, 256, torch.bfloat16, None),
    ],
    "flash-attn-4": [(16, 8, 128, torch.bfloat16, None), (9, 3, 64, torch.float16, 100)],
}


@pytest.fixture(params=list(KINDS))
def package(request):
    """Activate each package; skip where it is not installed, or is of another version."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"{request.param} was tried on compute capability 9.0 alone")
    try:
        radix_ops.activate_flash_attention(request.param)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield request.param
    radix_ops.activate_flash_attention("torch")


def inputs(kind, num_rows):
    heads, kv_heads, dim, dtype, _ = kind
    return [
        torch.randn(num_rows, h, dim, dtype=dtype, device="cuda", requires_grad=True)
        for h in (heads, kv_heads, kv_heads)
    ]


def results(tensors, grad, batch, window, layout="compact"):
    out = attention(*tensors, batch, layout=layout, sliding_window=window)
    return [out.detach(), *torch.autograd.grad(out, tensors, grad)]


def error(got, want):
    return float((got.double() - want).norm() / want.norm())


def is_used(name, part="forward"):
    return any(kind.package == name and kind.part == part and right for kind, right in flash_packages._is_right.items())


def test_values_and_gradients_are_as_near_to_float64_as_torchs(package, monkeypatch):
    for kind in KINDS[package]:
        monkeypatch.setattr(flash_packages, "_is_right", {})
        batch = FoldedBatch.from_sequences(LONG, pad_multiple_of=64, device="cuda")
        tensors = inputs(kind, batch.num_rows)
        grad = torch.randn_like(tensors[0])
        exact = [x.detach().double().requires_grad_() for x in tensors]
        want = results(exact, grad.double(), batch, kind[4])
        radix_ops.activate_flash_attention("torch")
        torchs = results(tensors, grad, batch, kind[4])
        radix_ops.activate_flash_attention(package)
        found = results(tensors, grad, batch, kind[4])
        assert is_used(package)
        assert is_used(package, "backward") == (package == "flash-attn-4")
        assert not torch.equal(found[0], torchs[0])  # another kernel ran
        for got, plain, expected in zip(found, torchs, want, strict=True):
            assert error(got, expected) <= 1.5 * error(plain, expected)
            assert not got[batch.num_nodes :].any()


def test_compact_has_the_bits_of_the_packed_batch(package):
    for kind in KINDS[package]:
        folded = FoldedBatch.from_sequences(LONG, device="cuda")
        packed = radix_ops.pack(folded.unfold(folded.input_ids), folded.cu_seqlens)
        with torch.no_grad():
            tensors = inputs(kind, folded.num_rows)
            compact = attention(*tensors, folded, layout="compact", sliding_window=kind[4])
            whole = attention(*map(folded.unfold, tensors), packed, layout="compact", sliding_window=kind[4])
        assert torch.equal(folded.unfold(compact), whole)


def test_forwards_are_the_same_bits_with_and_without_gradients_and_again(package):
    torch.use_deterministic_algorithms(True)
    try:
        for kind in KINDS[package]:
            batch = FoldedBatch.from_sequences(LONG, pad_multiple_of=4, device="cuda")
            tensors = inputs(kind, batch.num_rows)
            grad = torch.randn_like(tensors[0])
            want = results(tensors, grad, batch, kind[4])
            for got, expected in zip(results(tensors, grad, batch, kind[4]), want, strict=True):
                assert torch.equal(got, expected)
            for mode in (torch.no_grad, torch.inference_mode):
                with mode():
                    assert torch.equal(attention(*tensors, batch, layout="compact", sliding_window=kind[4]), want[0])
    finally:
        torch.use_deterministic_algorithms(False)


def test_longest_lengths_that_are_too_large_change_no_bit(package):
    """A graph has them of the largest batch that it serves."""
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    for kind in KINDS[package]:
        with torch.no_grad():
            q, k, v = inputs(kind, batch.num_rows)
            keys, values = torch.ops.radix.gather_kv(k, v, batch.kv_index)
            arguments = q, keys, values, batch.cu_seqlens_q, batch.cu_seqlens_k, batch.num_nodes
            runs = [
                torch.ops.radix.flash_attention(*arguments, *longest, 0.1, kind[4] or 0)[0]
                for longest in ((batch.max_seqlen_q, batch.max_seqlen_k), (batch.num_rows, 2 * batch.num_rows))
            ]
        assert torch.equal(*runs)


def test_graphs_hold_it(package):
    if not flash_packages.may_be_captured():
        pytest.skip(f"{package} is refused in graphs: tests/ops/test_flash_packages.py")
    kind = KINDS[package][0]
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    with torch.no_grad():
        tensors = inputs(kind, batch.num_rows)
        want = attention(*tensors, batch, layout="compact")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = attention(*tensors, batch, layout="compact")
        out.zero_()
        graph.replay()
    assert torch.equal(out, want)


def test_it_runs_on_the_current_stream(package):
    kind = KINDS[package][0]
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    with torch.no_grad():
        drawn = inputs(kind, batch.num_rows)
        want = attention(*drawn, batch, layout="compact")
        late = [torch.zeros_like(x) for x in drawn]
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            for x, y in zip(late, drawn, strict=True):
                x.copy_(y)
            out = attention(*late, batch, layout="compact")
        torch.cuda.synchronize()
    assert torch.equal(out, want)


def test_opcheck(package):
    for name in ("radix::flash_attention", "radix::flash_attention_backward"):
        for arguments in samples_of(name, "cuda", torch.bfloat16, requires_grad=not name.endswith("backward")):
            torch.library.opcheck(op_of(name), arguments, rtol=1e-2, atol=1e-2)


def test_compiled_code_runs_it(package):
    torch._dynamo.reset()
    batch = FoldedBatch.from_sequences(LONG, device="cuda")
    tensors = inputs(KINDS[package][0], batch.num_rows)
    compiled = torch.compile(lambda *x: attention(*x, batch, layout="compact"), fullgraph=True)
    assert torch.equal(compiled(*tensors), attention(*tensors, batch, layout="compact"))


def test_torchs_own_attention_stays_as_it_is(package):
    q = torch.randn(2, 8, 300, 128, dtype=torch.bfloat16, device="cuda")
    radix_ops.activate_flash_attention("torch")
    want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
    radix_ops.activate_flash_attention(package)
    attention(*inputs(KINDS[package][0], 3), FoldedBatch.from_sequences([[1, 2, 3]], device="cuda"), layout="compact")
    assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True), want)
