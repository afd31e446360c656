"""Qwen3 for some rows alone: its last layer computes them apart, against transformers' states of all tokens."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

from helpers.batches import NAMED
from helpers.qwen3_models import FILLED, LAYOUTS, oracle, run_theirs
from radix_ops import FoldedBatch
from radix_ops.models.qwen3 import Qwen3ForCausalLM

LONG = [[7, 7, *range(40), 3], [7, 7, *range(40), 4, 5, 6], [7, 7, *range(20)], [9, *range(30)], [7, 7, *range(40), 3]]


def some_tokens(sequences, share):
    """Draw packed tokens in any order, some of them twice."""
    count = sum(map(len, sequences))
    tokens = torch.randint(count, (max(1, int(share * count)),), generator=torch.Generator().manual_seed(count))
    return torch.cat([tokens, tokens[:2]])


@pytest.mark.parametrize(("share", "dtype"), [(0.1, torch.int32), (0.5, torch.int64), (3.0, torch.int32)])
@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_states_and_logits_are_those_of_transformers(pair, layout, dtype, share):
    theirs, ours = pair
    for sequences in (LONG, *(NAMED[name] for name in FILLED)):
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4)
        tokens = some_tokens(sequences, share)
        rows = batch.unfold_index[tokens].to(dtype)
        with torch.no_grad():
            hidden, logits = run_theirs(theirs, sequences)
            torch.testing.assert_close(ours.model(batch, layout, rows), hidden[tokens], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours(batch, rows, layout), logits[tokens], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_that_of_transformers(pair, tmp_path, layout):
    """Against transformers in float64, the rows have at most twice the error that transformers has itself."""
    theirs, ours = pair
    exact_model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path).double().eval()
    batch = FoldedBatch.from_sequences(LONG)
    tokens = some_tokens(LONG, 0.2)
    with torch.no_grad():
        exact = run_theirs(exact_model, LONG)[1][tokens]
        plain = (run_theirs(theirs, LONG)[1][tokens] - exact).norm()
        assert (ours(batch, batch.unfold_index[tokens], layout) - exact).norm() <= 2 * plain


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_gradient_equals_that_of_transformers(pair, layout, checkpointing):
    theirs, ours = pair
    ours.model.gradient_checkpointing = checkpointing
    tokens = some_tokens(LONG, 0.2)
    labels = torch.arange(len(tokens))
    want = F.cross_entropy(run_theirs(theirs, LONG)[1][tokens], labels)
    want.backward()
    batch = FoldedBatch.from_sequences(LONG, pad_multiple_of=4)
    got = F.cross_entropy(ours(batch, batch.unfold_index[tokens], layout), labels)
    got.backward()
    torch.testing.assert_close(got, want)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", [None, 2])
def test_gradcheck_of_rows_that_come_twice(tmp_path, layout, window):
    changes = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1} if window else {}
    oracle(tmp_path, num_hidden_layers=2, hidden_size=6, intermediate_size=4, head_dim=4, vocab_size=9, **changes)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4, 5], [1, 2]], pad_multiple_of=4)
    names = [name for name, _ in model.named_parameters()]
    rows = torch.tensor([4, 1, 4, 2])

    def function(*parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, weights, (batch, rows, layout))

    assert torch.autograd.gradcheck(function, tuple(model.parameters()))


def lengths_seen(model):
    """Return a dict that fills with how many rows each linear layer of the last layer was given."""
    seen = {}
    for name, module in model.model.layers[-1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda module, given, out, name=name: seen.update({name: len(out)}))
    return seen


def test_the_last_layer_computes_the_keys_and_values_of_all_rows_and_else_those_wanted(plain):
    _, model = plain
    batch = FoldedBatch.from_sequences(LONG)
    seen = lengths_seen(model)
    everywhere = {"self_attn.k_proj": batch.num_rows, "self_attn.v_proj": batch.num_rows}
    apart = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    last = batch.last_rows
    for call, count in (
        (lambda: model(batch, torch.tensor([3, 0, 3])), 3),
        (lambda: model(batch, torch.tensor([], dtype=torch.int32)), 0),
        (lambda: model.embed(batch), len(last)),
        (lambda: model.model.embed(batch), len(last)),
        (lambda: model.rerank(batch, yes_id=1, no_id=2), len(last)),
        # To compute most of them apart costs more than it saves.
        (lambda: model(batch, torch.arange(batch.num_rows - 2)), batch.num_rows),
    ):
        seen.clear()
        call()
        assert seen == everywhere | dict.fromkeys(apart, count)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_rows_and_rows_of_padding(plain, layout):
    _, model = plain
    batch = FoldedBatch.from_sequences(LONG, pad_multiple_of=100)
    assert batch.num_nodes < batch.num_rows - 1
    none = model(batch, torch.tensor([], dtype=torch.int64), layout)
    assert none.shape == (0, model.config.vocab_size)
    none.sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())
    some = torch.tensor([5, batch.num_rows - 1, 3, batch.num_nodes])
    got = model(batch, some, layout)
    assert got.isfinite().all()
    torch.testing.assert_close(got[[0, 2]], model(batch, layout=layout)[[5, 3]], rtol=1e-4, atol=1e-5)
    got.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    empty = FoldedBatch.from_sequences([[], []])
    assert model(empty, torch.tensor([], dtype=torch.int64), layout).shape == (0, model.config.vocab_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_and_without_gradients_bits_are_the_same(tmp_path, layout, dtype):
    oracle(tmp_path)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype)
    batch = FoldedBatch.from_sequences(LONG)
    rows = batch.unfold_index[some_tokens(LONG, 0.2)]
    with torch.no_grad():
        want = model(batch, rows, layout)
    assert torch.equal(model(batch, rows, layout), want)
    model.model.gradient_checkpointing = True
    assert torch.equal(model(batch, rows, layout), want)


@pytest.mark.parametrize("row", [-1, 50])
def test_rows_that_there_are_not_are_refused_before_any_layer_runs(plain, row):
    _, model = plain
    batch = FoldedBatch.from_sequences(LONG)
    ran = []
    model.model.layers[0].register_forward_hook(lambda *given: ran.append(given))
    row = row if row < 0 else batch.num_rows
    with pytest.raises(RuntimeError, match=rf"index\[1\] is {row}, (out of range|but)"):
        model(batch, torch.tensor([0, row]))
    assert not ran


def test_rows_elsewhere_are_refused(plain):
    _, model = plain
    batch = FoldedBatch.from_sequences(LONG)
    with pytest.raises(ValueError, match="rows is on meta, but the batch is on cpu"):
        model(batch, torch.tensor([0], device="meta"))
    for face in (model.model, lambda batch, layout, rows: model(batch, rows, layout)):
        with pytest.raises(TypeError, match=r"rows must be a 1-D tensor of int32 or int64, got torch.bool \[2\]"):
            face(batch, "auto", torch.tensor([True, False]))


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_compile_is_one_graph_for_any_number_of_rows(plain, layout):
    _, model = plain
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    cases = [(LONG, [3, 1, 4, 1]), ([[1, 2], [1, 3], [4, 5, 6]], [5, 0, 2]), (LONG[:3], list(range(43)))]
    with torch._dynamo.config.patch(error_on_recompile=True), torch.fx.experimental._config.patch(use_duck_shape=False):
        for sequences, rows in cases:
            batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=8)
            got, want = (m(batch, torch.tensor(rows), layout) for m in (compiled, model))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            grads = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (got, want)]
            for g, w in zip(*grads, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_compiled_layers_have_one_graph_more_for_rows(tmp_path):
    oracle(tmp_path, num_hidden_layers=4)
    plain, model = (Qwen3ForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model.model.compile_layers(2, fullgraph=True, backend=backend)
    torch._dynamo.reset()
    seen = []
    for sequences, rows in ((LONG, None), (LONG, [3, 1, 4, 1]), (LONG[:3], [7, 2, 5])):
        batch = FoldedBatch.from_sequences(sequences)
        rows = None if rows is None else torch.tensor(rows)
        torch.testing.assert_close(*(m(batch, rows, "compact") for m in (model, plain)))
        seen.append(len(graphs))
    assert seen == [1, 2, 2]
    torch._dynamo.reset()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_autocast(plain, layout):
    theirs, ours = plain
    batch = FoldedBatch.from_sequences(LONG)
    tokens = some_tokens(LONG, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        want = run_theirs(theirs, LONG)[1][tokens]
        got = ours(batch, batch.unfold_index[tokens], layout)
    got.float().square().sum().backward()
    exact = run_theirs(theirs, LONG)[1][tokens]
    assert (got - exact).norm() <= 2 * (want - exact).norm()
