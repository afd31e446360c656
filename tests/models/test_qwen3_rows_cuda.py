"""Qwen3 for some rows alone on CUDA: against transformers, and the kernel for few queries against float64."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

import radix_ops
from helpers.qwen3_models import LAYOUTS, oracle, run_theirs
from radix_ops import FoldedBatch
from radix_ops.models.qwen3 import Qwen3ForCausalLM

pytestmark = pytest.mark.cuda

HALF = (torch.bfloat16, torch.float16)
SHARED = [[7] * 3 + [i % 50 for i in range(190)] + [51 + i] * (3 + 40 * i) for i in range(4)]
SEQUENCES = [*SHARED, SHARED[0][:100], *([*SHARED[1][:150], 9, i] for i in range(4)), SHARED[2], [5] * 300]
# Few rows walk their paths alone; many stand among the others.
TOKENS = {"few": [1502, 3, 180, 180, 401, 192], "many": [*range(100, 400, 3), 180, 180, 1502]}
SIZES = [(4, 2, 64, 64), (20, 1, 128, 128), (3, 3, 24, 40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return for each dtype transformers' model and ours, and transformers' in float64; their last layers windowed.

    Ours pads no batch, as it does for graphs: bits are those of as many rows.
    """
    made = {}
    for window in (None, 40):
        folder = tmp_path_factory.mktemp("qwen3")
        changes = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
        oracle(folder, hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=1024, **changes)
        for dtype in (torch.float64, torch.float32, *HALF):
            theirs = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype).to("cuda").eval()
            made[window, dtype] = theirs, Qwen3ForCausalLM.from_pretrained(folder, dtype, "cuda")
            made[window, dtype][1].cuda_graphs = False
    return made


def theirs_on_cuda(model):
    with torch.device("cuda"):
        return run_theirs(model, SEQUENCES)[1]


def gradients(model):
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("wanted", TOKENS)
@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_that_of_transformers(models, dtype, layout, wanted, window, checkpointing):
    """Logits, loss and the gradients of all parameters together, each in float64 as the reference."""
    tokens = torch.tensor(TOKENS[wanted], device="cuda")
    labels = torch.arange(len(tokens), device="cuda") % 7
    batch = FoldedBatch.from_sequences(SEQUENCES, device="cuda", pad_multiple_of=16)
    found = {}
    exact_model, (theirs, ours) = models[window, torch.float64][0], models[window, dtype]
    ours.model.gradient_checkpointing = checkpointing
    for name, model in (("exact", exact_model), ("theirs", theirs), ("ours", ours)):
        model.zero_grad()
        rows = batch.unfold_index[tokens]
        logits = ours(batch, rows, layout) if name == "ours" else theirs_on_cuda(model)[tokens]
        F.cross_entropy(logits.double(), labels).backward()
        found[name] = logits.detach().double(), gradients(model)
    for ours_of, theirs_of, exact in zip(found["ours"], found["theirs"], found["exact"], strict=True):
        assert (ours_of - exact).norm() <= 2 * (theirs_of - exact).norm() + 1e-5 * exact.norm()
    with torch.no_grad():
        assert torch.equal(ours(batch, rows, layout), logits)


@pytest.mark.parametrize("window", [None, 1, 37, 64, 5000])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "value_size"), SIZES)
@pytest.mark.parametrize("dtype", HALF)
def test_few_queries_attend_as_in_float64(dtype, heads, kv_heads, size, value_size, window):
    batch = FoldedBatch.from_sequences(SEQUENCES, device="cuda", pad_multiple_of=64)
    torch.manual_seed(0)
    rows = torch.tensor([0, 400, batch.num_rows - 1, 63, 64, 192, 63], device="cuda", dtype=torch.int32)
    assert batch.num_nodes < batch.num_rows
    assert 64 * len(rows) <= batch.num_rows
    every = torch.randn(batch.num_rows, heads, size, device="cuda", dtype=dtype)
    k = torch.randn(batch.num_rows, kv_heads, size, device="cuda", dtype=dtype)
    v = torch.randn(batch.num_rows, kv_heads, value_size, device="cuda", dtype=dtype)
    order = torch.ops.radix.trie_order(batch.cu_seqlens_q, batch.cu_seqlens_k, batch.kv_index, batch.num_rows)
    tables = *order, batch.kv_index, batch.cu_seqlens_q, batch.num_nodes
    q = every[rows.long()]
    poison = torch.full_like(k, float("nan"))  # of what is freed, new memory is made
    del poison
    for scale in (size**-0.5, -0.3):
        got = torch.ops.radix.trie_attention_rows(q, k, v, rows, *tables, scale, window or 0)
        exact = radix_ops.attention(
            *(x.double() for x in (every, k, v)), batch, scale=scale, sliding_window=window, layout="compact"
        )[rows.long()]
        assert (got - exact).norm() <= 5e-3 * exact.norm()
        assert not got[2].any()
        again = torch.ops.radix.trie_attention_rows(q, k, v, rows, *tables, scale, window or 0)
        assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["auto", "compact"])
def test_rows_of_a_folded_batch_have_the_bits_of_a_packed_one(models, dtype, layout):
    """In "compact" as ever; where few rows walk alone in whatever layout, if products of all rows agree."""
    model = models[None, dtype][1]
    flat = torch.tensor([token for s in SEQUENCES for token in s]).cuda()
    ends = torch.tensor([0] + [len(s) for s in SEQUENCES]).cumsum(0).cuda()
    tokens = torch.tensor(TOKENS["few"], device="cuda")
    packed, folded = radix_ops.pack(flat, ends), radix_ops.fold(flat, ends)
    with torch.no_grad():
        got, want = (model(b, b.unfold_index[tokens], layout) for b in (folded, packed))
    if layout == "compact":
        assert torch.equal(got, want)
    else:
        assert (got - want).norm() <= 0.03 * want.norm()


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_nothing_waits_for_the_device_and_graphs_replay(models, layout):
    model = models[None, torch.bfloat16][1]
    batch = FoldedBatch.from_sequences(SEQUENCES, device="cuda")
    rows = batch.unfold_index[torch.tensor(TOKENS["few"], device="cuda")]
    with torch.no_grad():
        want = model(batch, rows, layout)
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert model(batch, rows, layout).shape == want.shape
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(batch, rows, layout)
        rows.copy_(rows.flip(0))
        graph.replay()
        assert torch.equal(got, want.flip(0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_is_one_graph(models, layout):
    model = models[None, torch.bfloat16][1]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        for sequences, tokens in ((SEQUENCES, TOKENS["few"]), (SHARED, [3, 90, 500]), (SEQUENCES, TOKENS["many"])):
            batch = FoldedBatch.from_sequences(sequences, device="cuda", pad_multiple_of=8)
            rows = batch.unfold_index[torch.tensor(tokens, device="cuda")]
            got, want = compiled(batch, rows, layout), model(batch, rows, layout)
            assert (got - want).norm() <= 0.03 * want.norm()
    torch._dynamo.reset()
