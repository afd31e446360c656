"""The Qwen3 reference model on CUDA: the error of every layout against that of transformers in the same dtype."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

import radix_ops
from helpers.batches import NAMED
from helpers.qwen3_models import FILLED, LAYOUTS, VOCABULARY, oracle, run_theirs
from radix_ops import FoldedBatch, attention
from radix_ops.models.qwen3 import Qwen3ForCausalLM

pytestmark = pytest.mark.cuda

HALF = (torch.bfloat16, torch.float16)
SHARED = [[7] * 3 + [i % 50 for i in range(190)] + [51 + i] * (3 + 40 * i) for i in range(4)]
BATCHES = {name: NAMED[name] for name in FILLED} | {
    "long shared prefix": SHARED,
    "long nested": [*SHARED, SHARED[0][:100], *([*SHARED[1][:150], 9, i] for i in range(4)), SHARED[2], [5] * 300],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return for each dtype transformers' model and ours, and transformers' in float64."""
    folder = tmp_path_factory.mktemp("qwen3")
    oracle(folder, hidden_size=64, intermediate_size=96, head_dim=16, max_position_embeddings=1024)

    def theirs(dtype):
        model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=dtype)
        return model.to("cuda").eval()

    made = {torch.float64: (theirs(torch.float64), Qwen3ForCausalLM.from_pretrained(folder, torch.float64, "cuda"))}
    for dtype in (torch.float32, *HALF):
        made[dtype] = (theirs(dtype), Qwen3ForCausalLM.from_pretrained(folder, dtype, "cuda"))
    return made


def theirs_on_cuda(model, sequences):
    with torch.device("cuda"):
        return run_theirs(model, sequences)


def error(got, exact):
    return (got.double() - exact).norm()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_error_is_at_most_twice_that_of_transformers(models, dtype, layout):
    """Hidden states, logits, loss and the gradient of every parameter are compared, over all batches together."""
    theirs, ours = models[dtype]
    exact_model = models[torch.float64][0]
    errors = {}
    gradients = {"ours": {}, "theirs": {}}
    for sequences in BATCHES.values():
        sequences = [s for s in sequences if len(s) > 1]
        if not sequences:
            continue
        labels = torch.cat([torch.tensor([*s[1:], -100]) for s in sequences]).cuda()
        batch = FoldedBatch.from_sequences(sequences, device="cuda", pad_multiple_of=4)
        results = {}
        for name, model in (("exact", exact_model), ("theirs", theirs), ("ours", ours)):
            model.zero_grad()
            if name == "ours":
                state = model.model(batch, layout)
                hidden, logits = batch.unfold(state), batch.unfold(model.lm_head(state))
            else:
                hidden, logits = theirs_on_cuda(model, sequences)
            loss = F.cross_entropy(logits.double(), labels)
            loss.backward()
            results[name] = hidden.double(), logits.double(), loss, {n: p.grad for n, p in model.named_parameters()}
        for name in ("theirs", "ours"):
            for part, got, exact in zip(("hidden", "logits", "loss"), results[name], results["exact"], strict=False):
                errors[name, part] = errors.get((name, part), 0) + float(error(got, exact)) ** 2
            for parameter, exact in results["exact"][3].items():
                squared = float(error(results[name][3][parameter], exact)) ** 2
                gradients[name][parameter] = gradients[name].get(parameter, 0) + squared
    for part in ("hidden", "logits"):
        assert errors["ours", part] <= 2**2 * errors["theirs", part], part
    # It is one number a batch, which may be right by chance, so the error of the logits is its measure.
    assert errors["ours", "loss"] <= 2**2 * max(errors["theirs", "loss"], 1e-2 * errors["theirs", "logits"])
    assert sum(gradients["ours"].values()) <= 2**2 * sum(gradients["theirs"].values())
    for parameter, squared in gradients["ours"].items():
        assert squared <= 3**2 * gradients["theirs"][parameter], parameter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float64_equals_transformers(models, layout):
    """They are equal up to the cosines, which both round to float32."""
    theirs, ours = models[torch.float64]
    for sequences in BATCHES.values():
        batch = FoldedBatch.from_sequences(sequences, device="cuda")
        with torch.no_grad():
            want = theirs_on_cuda(theirs, sequences)[1]
            torch.testing.assert_close(batch.unfold(ours(batch, layout=layout)), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_and_packed_batches(models, layout):
    """Batches of CUDA tensors, padded on either side, and packed ones go through the same code."""
    theirs, ours = models[torch.bfloat16]
    exact_model = models[torch.float64][0]
    with torch.no_grad():
        exact, plain = theirs_on_cuda(exact_model, SHARED)[1], theirs_on_cuda(theirs, SHARED)[1]
        longest = max(map(len, SHARED))
        for side in ("left", "right"):
            ids, mask = (torch.zeros(len(SHARED), longest, dtype=torch.int64) for _ in range(2))
            for row, sequence in enumerate(SHARED):
                start = 0 if side == "right" else longest - len(sequence)
                ids[row, start : start + len(sequence)] = torch.tensor(sequence)
                mask[row, start : start + len(sequence)] = 1
            batch = FoldedBatch.from_padded(ids.cuda(), mask.cuda())
            assert error(batch.unfold(ours(batch, layout=layout)), exact) <= 2 * error(plain, exact)
            padded = batch.to_padded(ours.model(batch, layout), side)
            assert torch.equal(padded[mask.bool().cuda()], batch.unfold(ours.model(batch, layout)))
        ids = torch.cat([torch.tensor(s) for s in SHARED]).cuda()
        ends = torch.tensor([0] + [len(s) for s in SHARED]).cumsum(0).cuda()
        packed = radix_ops.pack(ids, ends)
        assert error(packed.unfold(ours(packed, layout=layout)), exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_waits_for_the_device(models, layout):
    """Ids fold on the CPU, travel and go through the whole model without a call of torch's that synchronises."""
    ours = models[torch.bfloat16][1]

    def run():
        batch = FoldedBatch.from_sequences(SHARED, device="cuda", pad_multiple_of=4)
        with torch.no_grad():
            hidden = ours.model(batch, layout)
            batch.unfold(hidden)
            batch.to_padded(hidden)
            ours(batch, batch.last_rows, layout)
            ours.embed(batch, layout=layout)
            ours.rerank(batch, yes_id=1, no_id=2, layout=layout)
        loss = ours(batch, layout=layout).float().square().sum()
        loss.backward()
        return batch

    run()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    want = FoldedBatch.from_sequences(SHARED, pad_multiple_of=4)
    for name, value in vars(want).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(batch, name).cpu(), value), name
        elif isinstance(value, int):
            assert getattr(batch, name) == value, name


@pytest.mark.parametrize("dtype", HALF)
def test_compact_attention_is_that_of_packed_bit_for_bit(dtype):
    for name, sequences in BATCHES.items():
        ids = torch.tensor([token for s in sequences for token in s]).cuda()
        ends = torch.tensor([0] + [len(s) for s in sequences]).cumsum(0).cuda()
        folded, packed = radix_ops.fold(ids, ends), radix_ops.pack(ids, ends)
        q, k, v = (torch.randn(folded.num_rows, heads, 64, dtype=dtype, device="cuda") for heads in (4, 2, 2))
        for window in (None, 37):
            got = folded.unfold(attention(q, k, v, folded, layout="compact", sliding_window=window))
            want = attention(*(folded.unfold(x) for x in (q, k, v)), packed, sliding_window=window)
            assert torch.equal(got, want), name


def test_the_trie_layout_compiles_once_for_batches_never_seen():
    """Numbers of rows are above 128 and below, multiples of 16 and not, forward and backward."""
    from radix_ops.ops import trie_triton

    def run(shared, own):
        sequences = [[1] * shared + [2 + i] * own for i in range(3)]
        batch = FoldedBatch.from_sequences(sequences, device="cuda")
        q, k, v = (
            torch.randn(batch.num_rows, heads, 16, dtype=torch.bfloat16, device="cuda", requires_grad=True)
            for heads in (4, 2, 2)
        )
        for window in (None, 50):
            out = attention(q, k, v, batch, layout="trie", sliding_window=window)
            want = attention(q, k, v, batch, layout="compact", sliding_window=window)
            torch.testing.assert_close(out, want, rtol=2e-2, atol=2e-2)
            grad = torch.randn_like(out)
            for g, w in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (out, want)), strict=True):
                torch.testing.assert_close(g, w, rtol=5e-2, atol=5e-2)

    def compiled():
        kernels = trie_triton.forward_kernel, trie_triton.backward_q_kernel, trie_triton.backward_kv_kernel
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    run(333, 61)
    before = compiled()
    assert min(before) >= 2
    for shared in (1, 2, 16, 64, *range(120, 1300, 97)):
        run(shared, shared % 50 + 3)
    assert compiled() == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compile_is_one_graph(models, layout):
    ours = models[torch.bfloat16][1]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True)
    batches = [BATCHES["long nested"], BATCHES["long shared prefix"], [[*SHARED[0], 5, 6], SHARED[0], [], SHARED[2]]]
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        for sequences in batches:
            batch = FoldedBatch.from_sequences(sequences, device="cuda", pad_multiple_of=8)
            got, want = (run(batch, layout=layout)[: batch.num_nodes] for run in (compiled, ours))
            assert (got - want).norm() <= 0.03 * want.norm()
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_compiled_layers_take_batches_of_every_kind(models, layout):
    """inductor takes batches folded, packed, and folded with nothing shared, with padding rows and without."""
    ours = models[torch.bfloat16][1]
    torch._dynamo.reset()
    ours.model.compile_layers(fullgraph=True)
    flat = torch.tensor([token for s in SHARED for token in s]).cuda()
    ends = torch.tensor([0] + [len(s) for s in SHARED]).cumsum(0).cuda()
    alone = [[i, *s] for i, s in enumerate(SHARED)]
    try:
        for multiple in (1, 8):
            batches = [
                radix_ops.pack(flat, ends, pad_multiple_of=multiple),
                radix_ops.fold(flat, ends, pad_multiple_of=multiple),
                FoldedBatch.from_sequences(alone, device="cuda", pad_multiple_of=multiple),
                FoldedBatch.from_sequences(BATCHES["long nested"], device="cuda", pad_multiple_of=multiple),
            ]
            for batch in batches:
                with torch.no_grad():
                    got = ours.model(batch, layout)[: batch.num_nodes]
                    ours.model._run._compiled_call_impl, compiled = None, ours.model._run._compiled_call_impl
                    want = ours.model(batch, layout)[: batch.num_nodes]
                    ours.model._run._compiled_call_impl = compiled
                assert (got - want).norm() <= 0.03 * want.norm()
    finally:
        ours.model._run._compiled_call_impl = None
        torch._dynamo.reset()


def test_a_batch_elsewhere_is_refused_with_the_way_there(models):
    ours = models[torch.bfloat16][1]
    batch = FoldedBatch.from_sequences([[1, 2, VOCABULARY - 1]])
    with pytest.raises(ValueError, match=r'the batch is on cpu, but .* batch.to\("cuda:0", non_blocking=True\)'):
        ours(batch)
    assert ours(batch.to("cuda:0", non_blocking=True)).shape == (3, VOCABULARY)
