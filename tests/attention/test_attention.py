"""radix_ops.attention, against dense attention of each sequence on its own in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import radix_ops
from helpers.batches import NAMED, pack, random_sequences, rounds, to
from radix_ops import FoldedBatch, attention, reference

LONG = [[*range(900), i] for i in range(3)] + [[*range(300), 5, *range(400)], list(range(650)), [*range(300), 5]]
SHAPES = {"mha": (4, 4, 8, 8), "gqa": (6, 2, 8, 8), "mqa": (4, 1, 16, 16), "other_value_dim": (4, 2, 8, 5)}
# Plain PyTorch in each dtype stays well inside these multiples of the dtype's rounding step.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2.5e-2, torch.float16: 3e-3}


def dense_attention(q, k, v, lengths, scale, window):
    """Attend with packed q [N, H, D] in each sequence, by an explicit mask and no fused kernel."""
    out = []
    for q_s, k_s, v_s in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        group = q.shape[1] // k.shape[1]
        k_s, v_s = (x.repeat_interleave(group, 1) for x in (k_s, v_s))
        scores = torch.einsum("qhd,khd->hqk", q_s, k_s) * scale
        distance = torch.arange(len(q_s))[:, None] - torch.arange(len(q_s))
        hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
        out.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v_s))
    return torch.cat(out)


def inputs(batch, shape, dtype):
    heads, kv_heads, dim, value_dim = SHAPES[shape]
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, value_dim))
    return [torch.randn(batch.num_rows, *size, dtype=dtype, requires_grad=True) for size in sizes]


LAYOUTS = ["compact", "trie", "unfold"]


def check(sequences, shape, dtype, layout, window=None, scale=None, pad_multiple_of=4):
    """Compare values and gradients on torch's default device."""
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=pad_multiple_of).to(torch.get_default_device())
    tensors = inputs(batch, shape, dtype)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out = attention(*tensors, batch, layout=layout, sliding_window=window, scale=scale)
    assert out.dtype == dtype
    assert not out[batch.num_nodes :].any()

    rows = batch.unfold_index.long()
    lengths = batch.lengths.tolist()
    packed = dense_attention(*(x[rows] for x in exact), lengths, scale or SHAPES[shape][2] ** -0.5, window)
    want = packed[batch.fold_index[: batch.num_nodes].long()]
    grad = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, grad)
    want_grads = torch.autograd.grad(want, exact, grad[: batch.num_nodes].double())
    for got, expected in zip([out[: batch.num_nodes], *grads], [want, *want_grads], strict=True):
        error = (got.double() - expected).norm() / expected.norm().clamp(min=1)
        assert error <= TOLERANCE[dtype]
    for grad_x in grads:
        assert not grad_x[batch.num_nodes :].any()


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
@pytest.mark.parametrize("name", [name for name in NAMED if sum(map(len, NAMED[name]))])
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.usefixtures("default_device")
def test_attention_of_named_batches(name, layout, window):
    check(NAMED[name], "gqa", torch.float64, layout, window)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("default_device")
def test_attention_of_long_runs(dtype, shape, window, layout):
    """Runs are longer than a block of queries, and so are the prefixes before them."""
    check(LONG, shape, dtype, layout, window)


@pytest.mark.parametrize("layout", ["compact", "trie"])
@pytest.mark.usefixtures("default_device")
def test_attention_of_random_tries(layout):
    rng = np.random.default_rng(0)
    for _ in rounds(60):
        sequences = random_sequences(rng)
        if any(sequences):
            check(sequences, "gqa", torch.float64, layout, int(rng.integers(1, 40)) if rng.random() < 0.5 else None)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**32 + 1, 2**63 - 1])
@pytest.mark.usefixtures("default_device")
def test_a_window_past_every_sequence_is_none(dtype, layout, window, device):
    batch = FoldedBatch.from_sequences(LONG, device=device)
    tensors = inputs(batch, "gqa", dtype)
    want = attention(*tensors, batch, layout=layout)
    got = attention(*tensors, batch, layout=layout, sliding_window=window)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
@pytest.mark.usefixtures("default_device")
def test_a_batch_remembers_nothing_of_earlier_calls(layout, device):
    """Inference comes before training, and a batch's tensors are filled again."""
    sequences = [[1, 2, 3], [1, 2, 4], [1, 5, 6]], [[1, 2, 3], [1, 5, 6], [1, 5, 7]]
    batch, other = (FoldedBatch.from_sequences(s, pad_multiple_of=8).to(device) for s in sequences)
    tensors = inputs(batch, "gqa", torch.float64)
    with torch.inference_mode():
        attention(*tensors, batch, layout=layout)
    attention(*tensors, batch, layout=layout).sum().backward()
    for name, value in vars(other).items():
        if isinstance(value, torch.Tensor):
            getattr(batch, name).copy_(value)
        else:
            setattr(batch, name, value)
    torch.testing.assert_close(attention(*tensors, batch, layout=layout), attention(*tensors, other, layout="compact"))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("default_device")
def test_attention_takes_a_scale(dtype, layout):
    check(NAMED["nested"], "gqa", dtype, layout, scale=0.7)


@pytest.mark.parametrize("pad_multiple_of", [1, 8])
@pytest.mark.usefixtures("default_device")
def test_attention_of_a_packed_batch_unfolds_nothing(pad_multiple_of, device, monkeypatch):
    ids, _, cu_seqlens = to(device, pack(NAMED["mixed_lengths"]))
    batch = radix_ops.pack(ids, cu_seqlens, pad_multiple_of=pad_multiple_of)
    tensors = inputs(batch, "gqa", torch.float64)
    lengths = batch.lengths.tolist()
    want = dense_attention(*(x[: batch.num_nodes] for x in tensors), lengths, 8**-0.5, None)
    grad = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, tensors, grad)
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.radix, "gather_kv", None)
        out = attention(*tensors, batch, layout="compact")
    torch.testing.assert_close(out[: batch.num_nodes], want)
    for got, expected in zip(torch.autograd.grad(out[: batch.num_nodes], tensors, grad), want_grads, strict=True):
        torch.testing.assert_close(got, expected)


# Sequences of 51 tokens that share 50: each key would be repeated 14.6 and 20.4 times.
OFTEN_SHARED = {"often_shared": 20, "shared_by_all": 33}


@pytest.mark.parametrize(
    ("dtype", "wants_grad", "name", "layout"),
    [
        pytest.param(torch.bfloat16, False, "nested", "trie", marks=pytest.mark.cuda),
        pytest.param(torch.bfloat16, True, "nested", "trie", marks=pytest.mark.cuda),
        pytest.param(torch.bfloat16, False, "disjoint", "compact", marks=pytest.mark.cuda),
        pytest.param(torch.float32, False, "nested", "compact", marks=pytest.mark.cuda),
        (torch.float32, False, "nested", "trie"),
        (torch.float64, False, "disjoint", "trie"),
        (torch.float32, True, "nested", "trie"),
        (torch.float64, True, "disjoint", "trie"),
        (torch.bfloat16, True, "nested", "compact"),
        (torch.bfloat16, True, "shared_by_all", "trie"),
        (torch.bfloat16, False, "nested", "compact"),
        (torch.bfloat16, False, "often_shared", "compact"),
        (torch.bfloat16, False, "shared_by_all", "trie"),
    ],
)
def test_auto_takes(dtype, wants_grad, name, layout, request):
    device = "cuda" if request.node.get_closest_marker("cuda") else "cpu"
    sequences = {**NAMED, **{name: [[*range(50), i] for i in range(n)] for name, n in OFTEN_SHARED.items()}}[name]
    batch = FoldedBatch.from_sequences(sequences, device=device)
    q, k, v = (torch.randn(batch.num_rows, heads, 16, dtype=dtype, device=device) for heads in (4, 2, 2))
    v.requires_grad_(wants_grad)
    with RecordedOps() as recorded:
        attention(q, k, v, batch)
    compact = "flash_attention" if device == "cuda" and dtype == torch.bfloat16 else "varlen_attention"
    attends = {"compact": compact, "trie": "trie_attention"}
    assert [op for op in recorded.names if op.endswith("attention")] == [attends[layout]]


class RecordedOps(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("default_device")
def test_attention_of_a_packed_batch(device):
    ids, _, cu_seqlens = to(device, pack(NAMED["duplicates"]))
    folded, packed = radix_ops.fold(ids, cu_seqlens), radix_ops.pack(ids, cu_seqlens)
    tensors = inputs(folded, "gqa", torch.float64)
    got = folded.unfold(attention(*tensors, folded))
    want = attention(*(folded.unfold(x) for x in tensors), packed)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("default_device")
def test_padding_rows_are_zero_whatever_they_hold(dtype, layout, device):
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=16).to(device)
    tensors = inputs(batch, "gqa", dtype)
    with torch.no_grad():
        for x in tensors:
            x[batch.num_nodes :] = float("nan")
    out = attention(*tensors, batch, layout=layout)
    grad_out = torch.full_like(out, float("nan"))
    grad_out[: batch.num_nodes] = 1
    grads = torch.autograd.grad(out, tensors, grad_out)
    for x in (out, *grads):
        assert x[: batch.num_nodes].isfinite().all()
        assert torch.equal(x[batch.num_nodes :], torch.zeros_like(x[batch.num_nodes :]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_sequence(layout, window, value):
    """Row 3 follows the shared rows 0 to 2 and belongs to the first sequence alone."""
    batch = FoldedBatch.from_sequences([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [1, 2, 3, 8]])
    q, k, v = inputs(batch, "gqa", torch.float64)
    clean = attention(q, k, v, batch, layout=layout, sliding_window=window)
    for spoiled in (k, v):
        saved = spoiled.detach()[3].clone()
        spoiled.detach()[3] = value
        out = attention(q, k, v, batch, layout=layout, sliding_window=window)
        rows = [0, 1, 2, 5, 6, 7]
        torch.testing.assert_close(out[rows], clean[rows])
        (grad_q,) = torch.autograd.grad(out[rows].sum(), q)
        assert grad_q[rows].isfinite().all()
        spoiled.detach()[3] = saved
    v.detach()[3] = value
    assert not attention(q, k, v, batch, layout=layout, sliding_window=window)[[3, 4]].isfinite().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["no_sequences", "all_empty"])
@pytest.mark.usefixtures("default_device")
def test_attention_of_nothing(name, dtype, layout, device):
    batch = FoldedBatch.from_sequences(NAMED[name]).to(device)
    out = attention(*inputs(batch, "gqa", dtype), batch, layout=layout)
    assert out.shape == (0, 6, 8)
    out.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("default_device")
def test_attention_takes_strides(dtype, layout, device):
    batch = FoldedBatch.from_sequences(NAMED["nested"]).to(device)
    fused = torch.randn(batch.num_rows, 10, 8, dtype=dtype)
    parts = fused[:, :6], fused[:, 6:8], fused[:, 8:]
    want = attention(*(x.contiguous() for x in parts), batch, layout=layout)
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in parts]
    last_first = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in parts]
    unaligned = [torch.nn.functional.pad(x, (1, 0))[:, :, 1:] for x in parts]
    for strided in (parts, heads_first, last_first, unaligned):
        torch.testing.assert_close(attention(*strided, batch, layout=layout), want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strides", [(1, 1, 1), (2, 1, 1), (1, 9, 1), (0, 1, 1), (0, 8, 1), (8, 0, 1)])
def test_attention_takes_tensors_whose_rows_or_heads_overlap(strides, dtype, layout):
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    size = batch.num_rows, 2, 8
    overlapping = [torch.randn(1000).to(dtype).as_strided(size, strides).requires_grad_() for _ in range(3)]
    apart = [x.detach().contiguous().requires_grad_() for x in overlapping]
    got, want = (attention(*tensors, batch, layout=layout) for tensors in (overlapping, apart))
    grad = torch.randn(size).to(dtype)
    results = [*torch.autograd.grad(got, overlapping, grad), got]
    for result, expected in zip(results, [*torch.autograd.grad(want, apart, grad), want], strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("window", [0, 2])
def test_varlen_attention_equals_reference(window):
    q, k, v = (torch.randn(n, h, d, dtype=torch.float64) for n, h, d in ((7, 4, 6), (9, 2, 6), (9, 2, 3)))
    cu_q, cu_k = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 4, 5, 9])
    arguments = (q, k, v, cu_q, cu_k, 0.3, window)
    torch.testing.assert_close(torch.ops.radix.varlen_attention(*arguments), reference.varlen_attention(*arguments))


def test_gradcheck():
    batch = FoldedBatch.from_sequences(NAMED["nested"], pad_multiple_of=4)
    tensors = [x.detach()[:, :, :3].requires_grad_() for x in inputs(batch, "gqa", torch.float64)]
    trie = {"layout": "trie"}
    for options in ({}, {"sliding_window": 2}, {"layout": "unfold"}, trie, {"sliding_window": 2, **trie}):
        torch.autograd.gradcheck(lambda q, k, v, o=options: attention(q, k, v, batch, **o), tensors)


BATCH = FoldedBatch.from_sequences(NAMED["nested"])
ROWS = BATCH.num_rows


@pytest.mark.parametrize(
    ("shapes", "options", "error", "message"),
    [
        (
            [(ROWS, 4, 8)] * 3,
            {"layout": "flat"},
            ValueError,
            "layout must be one of 'auto', 'compact', 'trie', 'unfold', got 'flat'",
        ),
        ([(ROWS, 4, 8)] * 3, {"layout": np.array(["auto", "trie"])}, ValueError, "layout must be one of"),
        ([(ROWS, 4, 8)] * 3, {"sliding_window": 0}, ValueError, "sliding_window must be at least 1, or None .* got 0"),
        ([(ROWS + 1, 4, 8)] * 3, {}, ValueError, rf"q must have shape \[num_rows={ROWS}, heads, head_dim\], got"),
        ([(ROWS, 4, 8), (ROWS, 32), (ROWS, 4, 8)], {}, ValueError, r"k must have shape \[num_rows"),
        ([(ROWS, 4, 8), (ROWS, 3, 8), (ROWS, 3, 8)], {}, ValueError, "H be a multiple of H_kv"),
        ([(ROWS, 4, 8), (ROWS, 0, 8), (ROWS, 0, 8)], {}, ValueError, "H be a multiple of H_kv"),
        ([(ROWS, 0, 8), (ROWS, 2, 8), (ROWS, 2, 8)], {}, ValueError, "q must have at least one head"),
        ([(ROWS, 4, 0), (ROWS, 2, 0), (ROWS, 2, 8)], {}, ValueError, "a head_dim of at least 1"),
        ([(ROWS, 4, 8), (ROWS, 2, 9), (ROWS, 2, 9)], {}, ValueError, "must agree in D and H_kv"),
        ([(ROWS, 4, 8), (ROWS, 4, 8), (ROWS, 2, 8)], {}, ValueError, "must agree in D and H_kv"),
    ],
)
def test_attention_refuses_bad_arguments(shapes, options, error, message):
    with pytest.raises(error, match=message):
        attention(*(torch.randn(shape) for shape in shapes), BATCH, **options)


def test_attention_refuses_dtypes_and_devices():
    q = torch.randn(ROWS, 4, 8)
    with pytest.raises(TypeError, match="got torch.float32 for q and torch.float64 for k"):
        attention(q, q.double(), q, BATCH)
    with pytest.raises(TypeError, match="got torch.int64 for q"):
        attention(q.long(), q.long(), q.long(), BATCH)
    with pytest.raises(ValueError, match="q is on meta, but the batch is on cpu"):
        attention(q.to("meta"), q, q, BATCH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sliding_window": 2.5}, "sliding_window must be an int or None, got float"),
        ({"sliding_window": True}, "sliding_window must be an int or None, got bool"),
        ({"batch": None}, "batch must be a FoldedBatch, got NoneType"),
        ({"v": [1]}, "v must be a torch.Tensor, got list"),
    ],
)
def test_attention_refuses_other_types(options, message):
    q = torch.randn(ROWS, 4, 8)
    with pytest.raises(TypeError, match=message):
        attention(**{"q": q, "k": q, "v": q, "batch": BATCH, **options})
