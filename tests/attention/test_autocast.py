"""radix_ops.attention under autocast, against scaled_dot_product_attention of each sequence under the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from radix_ops import FoldedBatch, attention

SEQUENCES = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6, 7], [*range(40)], [*range(30), 3]]
LAYOUTS = ["auto", "compact", "trie", "unfold"]
FP32, FP64, BF16, FP16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def inputs(device, dtypes):
    batch = FoldedBatch.from_sequences(SEQUENCES, device=device, pad_multiple_of=4)
    shapes = zip((4, 2, 2), dtypes, strict=True)
    tensors = [torch.randn(batch.num_rows, heads, 16).to(device, dtype).requires_grad_() for heads, dtype in shapes]
    return batch, tensors


def plain(q, k, v, batch):
    """Attend over packed [N, H, D]."""
    parts = zip(*(x[batch.unfold_index.long()].split(batch.lengths.tolist()) for x in (q, k, v)), strict=True)
    out = [
        F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), is_causal=True, enable_gqa=True)
        for part in parts
    ]
    return torch.cat([x[0].transpose(0, 1) for x in out])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("autocast", [BF16, FP16])
@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, FP16), (FP64, FP64, FP64)])
def test_dtypes_and_values_are_those_of_torch(device, layout, autocast, dtypes):
    batch, tensors = inputs(device, dtypes)
    with torch.autocast(device, autocast):
        got, want = batch.unfold(attention(*tensors, batch, layout=layout)), plain(*tensors, batch)
    assert got.dtype == want.dtype == (FP64 if FP64 in dtypes else autocast)
    tolerance = {FP64: 1e-12, FP16: 3e-3, BF16: 2e-2}[got.dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(want)
    gradients = [torch.autograd.grad(out, tensors, grad) for out in (got, want)]
    for x, one, other in zip(tensors, *gradients, strict=True):
        assert one.dtype == other.dtype == x.dtype
        assert (one - other).double().norm() <= 2 * tolerance * other.double().norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compiles", [False, True])
def test_gradients_of_a_backward_inside(layout, compiles):
    """The backward computes in the dtypes of the forward, as torch's attention does."""
    batch, tensors = inputs("cpu", (FP32, FP32, BF16))

    def run(q, k, v):
        return attention(q, k, v, batch, layout=layout)

    torch.compiler.reset()
    with torch.autocast("cpu", BF16):
        out = (torch.compile(run, fullgraph=True) if compiles else run)(*tensors)
        grad = torch.randn_like(out)
        inside = torch.autograd.grad(out, tensors, grad, retain_graph=True)
    outside = torch.autograd.grad(run(*(x.to(BF16) for x in tensors)), tensors, grad)
    assert out.dtype == BF16
    for one, other in zip(inside, outside, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_code_does_not_ask_whether_autocast_is_available(layout, monkeypatch):
    """torch 2.11 can't trace that question."""
    batch, tensors = inputs("cpu", (FP32, FP32, FP32))

    def refuse(device):
        raise AssertionError(device)

    monkeypatch.setattr(torch.amp, "is_autocast_available", refuse)
    torch.compiler.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors, batch, layout=layout), attention(*tensors, batch, layout=layout))


@pytest.mark.parametrize("name", ["varlen_attention", "trie_attention"])
def test_ops_compute_in_the_dtypes_that_they_are_given(name):
    batch, tensors = inputs("cpu", (FP32, FP32, FP32))
    window = 0
    if name == "varlen_attention":
        tables = [batch.cu_seqlens_q, batch.cu_seqlens_k]
        tensors = [tensors[0], *(x[batch.kv_index.long()] for x in tensors[1:])]
    else:
        order = torch.ops.radix.trie_order(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, batch.num_rows)
        tables = [*order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes]

    def run():
        out = getattr(torch.ops.radix, name)(*tensors, *tables, 0.25, window)
        out = out[0] if isinstance(out, (tuple, list)) else out
        return out, *torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)

    want = run()
    with torch.autocast("cpu", BF16):
        got = run()
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtypes", [(FP64, FP32, FP32), (FP32, FP32, FP64), (FP32, torch.int64, FP32)])
def test_what_autocast_leaves_mixed_is_refused(dtypes):
    batch = FoldedBatch.from_sequences(SEQUENCES)
    tensors = [torch.ones(batch.num_rows, heads, 16, dtype=d) for heads, d in zip((4, 2, 2), dtypes, strict=True)]
    with torch.autocast("cpu", BF16), pytest.raises(TypeError, match="q, k and v must be of one dtype"):
        attention(*tensors, batch)
