"""The Qwen3 reference model on the CPU, against transformers' Qwen3 with the same weights, one sequence at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional as F

import radix_ops
from helpers.batches import NAMED
from helpers.qwen3_models import FILLED, LAYOUTS, VOCABULARY, oracle, run_theirs
from radix_ops import FoldedBatch
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_and_logits_equal_those_of_transformers(pair, layout):
    theirs, ours = pair
    for name in FILLED:
        batch = FoldedBatch.from_sequences(NAMED[name], pad_multiple_of=4)
        with torch.no_grad():
            want_hidden, want_logits = run_theirs(theirs, NAMED[name])
            torch.testing.assert_close(batch.unfold(ours.model(batch, layout)), want_hidden, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(batch.unfold(ours(batch, layout=layout)), want_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_error_is_that_of_transformers(pair, tmp_path, layout):
    """Against transformers in float64, folding has at most twice the error that transformers has itself."""
    theirs, ours = pair
    exact_model = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path).double().eval()
    sequences = [[7, 7, *range(50)], [7, 7, *range(40), 3, 4], [7, *range(60)]]
    batch = FoldedBatch.from_sequences(sequences)
    with torch.no_grad():
        exact = run_theirs(exact_model, sequences)[1]
        plain = (run_theirs(theirs, sequences)[1] - exact).norm()
        assert (batch.unfold(ours(batch, layout=layout)) - exact).norm() <= 2 * plain


@pytest.mark.parametrize(
    ("layout", "checkpointing"),
    [("compact", False), ("compact", True), ("trie", False), ("trie", True), ("unfold", False)],
)
@pytest.mark.parametrize(
    "name", ["single", "identical", "nested", "duplicates", "strict_prefix_after", "mixed_lengths"]
)
def test_loss_and_every_gradient_equal_those_of_transformers(pair, name, layout, checkpointing):
    theirs, ours = pair
    ours.model.gradient_checkpointing = checkpointing
    sequences = [s for s in NAMED[name] if len(s) > 1]
    labels = torch.cat([torch.tensor([*s[1:], -100]) for s in sequences])
    want = F.cross_entropy(run_theirs(theirs, sequences)[1], labels)
    want.backward()
    batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4)
    got = F.cross_entropy(batch.unfold(ours(batch, layout=layout)), labels)
    got.backward()
    torch.testing.assert_close(got, want)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for parameter_name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[parameter_name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradcheck_through_two_layers(tmp_path, layout):
    oracle(tmp_path, num_hidden_layers=2, hidden_size=6, intermediate_size=4, head_dim=4, vocab_size=9)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    batch = FoldedBatch.from_sequences([[1, 2, 3], [1, 2, 4, 5], [1, 2]], pad_multiple_of=4)
    names = [name for name, _ in model.named_parameters()]

    def function(*parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, weights, (batch,), {"layout": layout})

    assert torch.autograd.gradcheck(function, tuple(model.parameters()))


def test_rows_wanted_are_the_rows_computed(plain):
    _, model = plain
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    seen = []
    model.lm_head.register_forward_hook(lambda module, given, result: seen.append(len(result)))
    rows = torch.tensor([4, 0, 4], dtype=torch.int32)
    torch.testing.assert_close(model(batch, rows), model(batch)[rows.long()])
    assert model(batch, batch.last_rows).shape == (batch.num_sequences, VOCABULARY)
    assert seen == [3, batch.num_rows, batch.num_sequences]


@pytest.mark.parametrize("dim", [None, 1, 20, 32])
def test_embed_equals_last_token_pooling_of_transformers(plain, dim):
    theirs, ours = plain
    sequences = NAMED["duplicates"] + NAMED["nested"]
    batch = FoldedBatch.from_sequences(sequences)
    with torch.no_grad():
        last = [run_theirs(theirs, [sequence])[0][-1] for sequence in sequences]
        want = F.normalize(torch.stack(last)[:, :dim], dim=-1)
        for model in (ours, ours.model):
            torch.testing.assert_close(model.embed(batch, dim), want, rtol=1e-4, atol=1e-5)


def test_rerank_equals_the_probability_of_yes_against_no(plain):
    theirs, ours = plain
    sequences = NAMED["nested"]
    with torch.no_grad():
        last = torch.stack([run_theirs(theirs, [sequence])[1][-1] for sequence in sequences])
        want = torch.softmax(last[:, [5, 9]], -1)[:, 1]
        got = ours.rerank(FoldedBatch.from_sequences(sequences), yes_id=9, no_id=5)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_and_folded_batches_go_the_same_way(plain, layout):
    _, model = plain
    ids, cu_seqlens = torch.tensor([1, 2, 3, 1, 2, 4]), torch.tensor([0, 3, 6])
    packed, folded = radix_ops.pack(ids, cu_seqlens), radix_ops.fold(ids, cu_seqlens)
    assert (packed.num_rows, folded.num_rows) == (6, 4)
    torch.testing.assert_close(model(packed, layout=layout), folded.unfold(model(folded, layout=layout)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padded_batches_on_either_side(plain, layout):
    theirs, ours = plain
    sequences = [[5, 6, 7], [5, 6, 8, 9], [1]]
    want = run_theirs(theirs, sequences)[1]
    for side in ("left", "right"):
        ids, mask = torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            place = slice(0, len(sequence)) if side == "right" else slice(5 - len(sequence), 5)
            ids[row, place], mask[row, place] = torch.tensor(sequence), 1
        batch = FoldedBatch.from_padded(ids, mask)
        torch.testing.assert_close(batch.unfold(ours(batch, layout=layout)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["auto", *LAYOUTS])
def test_compile_is_one_graph_for_batches_never_seen(plain, layout):
    _, model = plain
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    batches = [NAMED["nested"], [[1, 2], [1, 3], [4, 5, 6]], [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9], [], [1, 2, 3, 4]]]
    with torch._dynamo.config.patch(error_on_recompile=True), torch.fx.experimental._config.patch(use_duck_shape=False):
        for sequences in batches:
            batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=8)
            got, want = compiled(batch, layout=layout), model(batch, layout=layout)
            torch.testing.assert_close(got, want)
            grads = [torch.autograd.grad(x.square().sum(), list(model.parameters())) for x in (got, want)]
            for g, w in zip(*grads, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_compiled_layers_share_a_graph_and_change_nothing(tmp_path, at_once):
    """Each number of layers in a row has a graph, and another where nothing is shared; other sizes need no more."""
    oracle(tmp_path, num_hidden_layers=4)
    plain, model = (Qwen3ForCausalLM.from_pretrained(tmp_path) for _ in range(2))
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    model.model.compile_layers(at_once, fullgraph=True, backend=backend)
    torch._dynamo.reset()
    assert model.state_dict().keys() == plain.state_dict().keys()
    each = 2 if 4 % at_once else 1
    seen = []
    for sequences in ([[1, 2, 3], [1, 2, 4, 5, 6]], [[1, 2, 3, 4], [1, 2, 3, 9, 9], [7]], [[1, 2], [3, 4, 5]]):
        batch = FoldedBatch.from_sequences(sequences)
        got, want = (m(batch, layout="compact") for m in (model, plain))
        torch.testing.assert_close(got, want)
        grads = [
            torch.autograd.grad(m(batch, layout="compact").square().sum(), [*m.parameters()]) for m in (model, plain)
        ]
        for g, w in zip(*grads, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
        seen.append(len(graphs))
    assert seen == [each, each, 2 * each]
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        model.model.compile_layers(0)
    torch._dynamo.reset()


def test_wrong_arguments_are_refused(plain):
    _, model = plain
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    for call in (model, model.embed, lambda batch: model.rerank(batch, yes_id=1, no_id=2)):
        with pytest.raises(TypeError, match="batch must be a FoldedBatch, got Tensor"):
            call(torch.tensor([[1, 2]]))
        with pytest.raises(ValueError, match="the batch is on meta, but the model is on cpu"):
            call(batch.to("meta"))
    with pytest.raises(ValueError, match="input_ids must be from 0 to 63, got values from 1 to 64"):
        model(FoldedBatch.from_sequences([[1, 64]]))
    with pytest.raises(ValueError, match="layout must be one of 'auto', 'compact', 'trie', 'unfold', got 'flat'"):
        model(batch, layout="flat")
    with pytest.raises(TypeError, match=r"rows must be a 1-D tensor of int32 or int64, got torch.float32 \[1\]"):
        model(batch, torch.zeros(1))
    with pytest.raises(TypeError, match="rows must be a 1-D tensor of int32 or int64, got list"):
        model(batch, [1])
    with pytest.raises(RuntimeError, match=r"index\[0\] is 99, out of range"):
        model(batch, torch.tensor([99]))
    with pytest.raises(ValueError, match="dim must be from 1 to hidden_size=32, got 33"):
        model.embed(batch, 33)
    with pytest.raises(ValueError, match="yes_id must be from 0 to 63, got 9693"):
        model.rerank(batch)
    for method in (model.embed, lambda batch: model.rerank(batch, yes_id=1, no_id=2)):
        with pytest.raises(ValueError, match="a sequence of the batch is empty"):
            method(FoldedBatch.from_sequences([[1], []]))


@pytest.mark.parametrize(("value", "kind"), [(True, "bool"), (2.5, "float"), ("4", "str")])
def test_numbers_that_are_no_integers_are_refused(plain, value, kind):
    _, model = plain
    batch = FoldedBatch.from_sequences([[1, 2]])
    with pytest.raises(TypeError, match=f"dim must be an int, got {kind}"):
        model.embed(batch, value)
    for name in ("yes_id", "no_id"):
        with pytest.raises(TypeError, match=f"{name} must be an int, got {kind}"):
            model.rerank(batch, **({"yes_id": 1, "no_id": 2} | {name: value}))
    assert model.embed(batch, np.int64(4)).shape == (1, 4)


def test_sequences_past_the_longest_position_are_refused(tmp_path):
    oracle(tmp_path, max_position_embeddings=6)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path)
    model(FoldedBatch.from_sequences([[1, 2, 3, 4, 5, 6], [1, 2]]))
    with pytest.raises(ValueError, match="a sequence of 7 tokens is longer than the 6 positions of the config"):
        model(FoldedBatch.from_sequences([[1, 2], [1, 2, 3, 4, 5, 6, 7]]))
    for positions, low, high in (([0, 6], 0, 6), ([-1, 0], -1, 0)):
        batch = radix_ops.fold(torch.tensor([1, 2]), torch.tensor([0, 2]), torch.tensor(positions))
        with pytest.raises(ValueError, match=f"position_ids must be from 0 to 5, .* got values from {low} to {high}"):
            model(batch)


def test_scaled_positions_reach_as_far_as_the_scaling(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 10}
    theirs = oracle(tmp_path, max_position_embeddings=12, rope_parameters=yarn)
    ours = Qwen3ForCausalLM.from_pretrained(tmp_path)
    sequence = [i % 50 for i in range(40)]
    with torch.no_grad():
        want = run_theirs(theirs, [sequence])[1]
        torch.testing.assert_close(ours(FoldedBatch.from_sequences([sequence])), want, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="a sequence of 41 tokens is longer than the 40 positions of the config"):
        ours(FoldedBatch.from_sequences([[*sequence, 1]]))


def test_dropout_in_training_is_refused(tmp_path):
    oracle(tmp_path, attention_dropout=0.1)
    model = Qwen3ForCausalLM.from_pretrained(tmp_path)
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    model(batch)
    with pytest.raises(RuntimeError, match=r"attention_dropout=0.1: tokens that share a row can't be dropped apart"):
        model.train()(batch)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_autocast(plain, checkpointing):
    theirs, ours = plain
    ours.model.gradient_checkpointing = checkpointing
    batch = FoldedBatch.from_sequences(NAMED["nested"])
    with torch.autocast("cpu", torch.bfloat16):
        want, got = run_theirs(theirs, NAMED["nested"])[1], batch.unfold(ours(batch))
    got.float().square().sum().backward()
    exact = run_theirs(theirs, NAMED["nested"])[1]
    assert (got - exact).norm() <= 2 * (want - exact).norm()


def test_a_new_model_starts_where_that_of_transformers_does(tmp_path):
    config = oracle(tmp_path, tie_word_embeddings=True, vocab_size=1000, pad_token_id=3).config
    torch.manual_seed(0)
    ours = Qwen3ForCausalLM(Qwen3Config.from_dict(config.to_dict()))
    theirs = transformers.Qwen3ForCausalLM(config)
    for name, parameter in theirs.named_parameters():
        assert abs(ours.get_parameter(name).std() - parameter.std()) <= 0.2 * parameter.std() + 1e-8
    assert not ours.model.embed_tokens.weight[3].any()
