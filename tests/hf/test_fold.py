"""radix_ops.hf folds: against the same transformers model before enable, and in float64 without padding."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from helpers.batches import NAMED, trie_size
from helpers.hf_models import (
    CONFIGS,
    TREE,
    Witness,
    alone,
    assert_same,
    assert_within_budget,
    build,
    error,
    no_warnings,
    pad,
)
from radix_ops import hf

# transformers renames gradient checkpointing; the old name serves all its supported versions.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
SIDES = ("right", "left", "both")
BATCHES = {name: sequences for name, sequences in NAMED.items() if any(sequences)}
PACKED_IDS = torch.tensor([[1, 2, 3, 1, 2, 3, 4], [1, 2, 3, 4, 1, 2, 9]])
PACKED_POSITIONS = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1, 2]])


def check_output(name, sequences, side):
    model = build(name)
    ids, mask = pad(sequences, side)
    real = mask.bool()
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask)
        exact = alone(build(name).double(), sequences)
        with hf.folded(model, threshold=1.0, verify="never"), Witness() as witness, no_warnings():
            got = model(input_ids=ids, attention_mask=mask)
            stats = model.radix_stats
    assert type(got) is type(plain)
    assert got.keys() == plain.keys()
    assert got.logits.shape == plain.logits.shape
    assert_within_budget(got.logits[real], plain.logits[real], exact)
    assert not got.logits[~real].any()
    rows = trie_size(sequences)
    assert witness.rows == [rows, rows]
    assert witness.attention_calls == 2
    assert stats == hf.RadixStats(tokens=int(mask.sum()), rows=rows, folded=1, skipped=0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("batch", BATCHES)
def test_output_of_every_batch(batch, side):
    check_output("qwen3_sliding", BATCHES[batch], side)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", CONFIGS)
def test_output_of_every_config(name, side):
    assert trie_size(TREE) < sum(map(len, TREE)) / 2
    check_output(name, TREE, side)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["compact", "unfold"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_output_without_mask(dtype, attention, layout):
    sequences = [[1, 2, 3, 4, 5, 6], [1, 2, 3, 9, 8, 7], [1, 2, 3, 9, 8, 6], [1, 2, 3, 4, 5, 6], [7] * 6]
    model = build("qwen3_sliding", attention=attention).to(dtype)
    exact = alone(copy.deepcopy(model).double(), sequences)
    plain = model(torch.tensor(sequences), use_cache=False).logits
    hf.enable(model, threshold=1.0, layout=layout)
    got = model(torch.tensor(sequences)).logits
    assert_within_budget(got.flatten(0, 1), plain.flatten(0, 1), exact)
    assert model.radix_stats.rows == 16


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (4, 1)])
def test_output_of_smallest_shapes(shape):
    model = build()
    ids = torch.full(shape, 7)
    plain = model(ids).logits
    with hf.folded(model, threshold=1.0):
        got = model(ids).logits
        assert model.radix_stats.rows == shape[1]
    torch.testing.assert_close(got, plain)


@torch.no_grad()
@pytest.mark.parametrize("wanted", [True, [0, 2], [1]])
def test_hidden_states(wanted):
    model = build(head="Model")
    ids, mask = pad(TREE, "both")
    plain = model(ids, mask, output_hidden_states=wanted, use_cache=False)
    for _ in range(2):  # hooks that record are installed once
        with hf.folded(model, threshold=1.0):
            got = model(ids, mask, output_hidden_states=wanted)
        assert len(got.hidden_states) == len(plain.hidden_states)
        for ours, theirs in zip(got.hidden_states, plain.hidden_states, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])
                assert not ours[~mask.bool()].any()
    if wanted is True:
        assert len(got.hidden_states) == 3
        assert got.hidden_states[-1] is got.last_hidden_state


@torch.no_grad()
def test_hidden_states_recorded_first_while_folded_are_recorded_once():
    model = build(head="Model")
    ids, mask = pad(TREE, "right")
    with hf.folded(model, threshold=1.0):
        for _ in range(2):
            assert len(model(ids, mask, output_hidden_states=True).hidden_states) == 3
    assert len(model(ids, mask, output_hidden_states=True).hidden_states) == 3


@torch.no_grad()
@pytest.mark.parametrize("head", ["Model", "ForCausalLM"])
def test_return_dict_false(head):
    model = build(head=head)
    ids, mask = pad(TREE, "left")
    plain = model(ids, mask, return_dict=False)
    with hf.folded(model, threshold=1.0):
        got = model(ids, mask, return_dict=False)
    assert type(got) is type(plain) is tuple
    assert len(got) == len(plain) == 2
    assert isinstance(got[1], type(plain[1]))
    torch.testing.assert_close(got[0][mask.bool()], plain[0][mask.bool()])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name", ["llama_biased", "llama_tied", "qwen3_sliding"])
def test_gradient_of_every_parameter(name, side):
    ids, mask = pad(TREE, side)
    real = mask.bool()
    weight = torch.randn(int(mask.sum()), 60)

    def gradients(model, logits):
        (logits * weight.to(logits.dtype)).sum().backward()
        return {key: parameter.grad for key, parameter in model.named_parameters()}

    plain, ours, exact = build(name), hf.enable(build(name), threshold=1.0), build(name).double()
    want = gradients(exact, alone(exact, TREE))
    base = gradients(plain, plain(input_ids=ids, attention_mask=mask, use_cache=False).logits[real])
    got = gradients(ours, ours(input_ids=ids, attention_mask=mask).logits[real])
    assert got.keys() == base.keys()
    # A short gradient of the plain model may be exact by luck, so the largest of its errors is the budget of all.
    budget = 2 * max(error(base[key], want[key]) for key in base) + 2 * torch.finfo(torch.float32).eps
    for key in got:
        assert got[key].shape == base[key].shape
        assert error(got[key], want[key]) <= budget, key


# Equal shapes and equally many rows, so that nothing but the values tells a mixed-up batch.
TWO_BATCHES = (
    torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6], [7, 8, 9, 3]]),
    torch.tensor([[7, 8, 9, 3], [1, 2, 3, 4], [1, 2, 5, 6]]),
)


@pytest.mark.parametrize("disabled_before_backward", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_two_forwards_before_one_backward(use_reentrant, disabled_before_backward):
    def gradients(model):
        losses = [(model(ids).logits * weight).sum() for ids, weight in zip(TWO_BATCHES, weights, strict=True)]
        if disabled_before_backward:
            hf.disable(model)
        sum(losses).backward()
        return [parameter.grad for parameter in model.parameters()]

    weights = torch.randn(2, 3, 4, 60)
    plain, model = build("qwen3_sliding").train(), build("qwen3_sliding").train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with Witness() as witness:
        got = gradients(hf.enable(model, threshold=1.0, verify="never"))
    assert witness.rows == [10] * 8  # two batches, two layers, twice
    assert witness.attention_calls == 8
    for ours, theirs in zip(got, gradients(plain), strict=True):
        assert error(ours, theirs.double()) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("head", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_classification_heads(head, side):
    model = build("qwen3", head=head)
    ids, mask = pad([s for s in TREE if s], side)
    ids[mask == 0] = 0
    plain = model(ids, mask)
    with hf.folded(model, threshold=1.0), no_warnings():
        got = model(ids, mask)
        assert model.radix_stats.folded == 1
    assert got.keys() == plain.keys()
    for ours, theirs in zip(got.values(), plain.values(), strict=True):
        if isinstance(theirs, DynamicCache):
            assert isinstance(ours, DynamicCache)
            continue
        real = mask.bool() if ours.shape[:2] == mask.shape else ...
        torch.testing.assert_close(ours[real], theirs[real])


@torch.no_grad()
@pytest.mark.parametrize(
    "further",
    [{}, {"num_items_in_batch": 7}, {"shift_labels": True}, {"ignore_index": 0}, {"logits_to_keep": 2}],
    ids=lambda further: next(iter(further), "labels"),
)
@pytest.mark.parametrize("side", SIDES)
def test_language_model_loss_and_kept_logits(side, further):
    model = build()
    ids, mask = pad(TREE, side)
    ignored = further.get("ignore_index", -100)
    labels = ids.masked_fill(mask == 0, ignored)
    # The label of a first token is read by the position before it, which may be masked.
    labels[torch.arange(len(ids)), mask.argmax(1)] = ignored
    if "shift_labels" in further:
        further = {"shift_labels": torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)}
    arguments = {"attention_mask": mask, **({} if "logits_to_keep" in further else {"labels": labels}), **further}
    plain = model(ids, use_cache=False, **arguments)
    with hf.folded(model, threshold=1.0), no_warnings():
        got = model(ids, **arguments)
        assert model.radix_stats.folded == 1
    if plain.loss is not None:
        torch.testing.assert_close(got.loss, plain.loss)
    real = mask[:, -plain.logits.shape[1] :].bool()
    torch.testing.assert_close(got.logits[real], plain.logits[real])


@pytest.mark.parametrize("use_cache", [None, False])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3_sliding"])
def test_packed_sequences_are_seen_when_transformers_sees_them(name, checkpointing, with_mask, use_cache):
    model = build(name)
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    arguments = {"position_ids": PACKED_POSITIONS, "use_cache": use_cache}
    if with_mask:
        arguments["attention_mask"] = torch.ones_like(PACKED_IDS)
    plain = model(PACKED_IDS, **arguments).logits
    with hf.folded(model, threshold=1.0):
        got = model(PACKED_IDS, **arguments).logits
        seen = not with_mask and (checkpointing or use_cache is False)
        # [1 2 3 4] and [1 2 9] hold all four packed sequences; unpacked, the rows share [1 2 3].
        assert model.radix_stats == hf.RadixStats(tokens=14, rows=5 if seen else 11, folded=1)
    torch.testing.assert_close(got, plain)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 3])
def test_given_positions_are_used(rows):
    model = build()
    ids, mask = pad([[5, 6, 7, 8], [5, 6, 7, 9], [5, 6, 7, 8]], "both")
    positions = (torch.arange(ids.shape[1]) * 3 % 7).expand(rows, -1)
    plain = model(ids, mask, positions).logits
    with hf.folded(model, threshold=1.0):
        got = model(ids, mask, positions).logits
        assert model.radix_stats.folded == 1
    torch.testing.assert_close(got[mask.bool()], plain[mask.bool()])
    assert error(model(ids, mask).logits[mask.bool()], plain[mask.bool()].double()) > 1e-2


def test_autocast():
    ids, mask = pad(TREE, "right")
    real = mask.bool()
    plain, ours = build(), hf.enable(build(), threshold=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        base, got = (model(ids, mask).logits[real] for model in (plain, ours))
    got.float().sum().backward()
    assert ours.radix_stats.folded == 1
    assert_within_budget(got, base, alone(build().double(), TREE))


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=lambda options: next(iter(options), "greedy"),
)
@pytest.mark.parametrize("name", ["llama", "qwen3_sliding"])
def test_generate(name, options):
    model = build(name)
    ids, mask = pad(TREE, "left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "disable_compile": True, **options}
    torch.manual_seed(3)
    plain = model.generate(ids, **options)
    with hf.folded(model, threshold=1.0), no_warnings():
        torch.manual_seed(3)
        got = model.generate(ids, **options)
        assert model.radix_stats.folded == (5 if options.get("use_cache") is False else 0)
        assert model.radix_stats.skipped == (0 if options.get("use_cache") is False else 5)
    assert_same(got, plain)


@torch.no_grad()
def test_threads_do_not_mix():
    model = build("qwen3_sliding")
    holes = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1]])
    calls = [(TWO_BATCHES[0], None), (TWO_BATCHES[1], None), (TWO_BATCHES[0], holes)]
    hf.enable(model, threshold=1.0)
    with pytest.warns(UserWarning, match="holes"):
        want = [model(*call).logits for call in calls]
    wrong = []

    def work(call, expected):
        for _ in range(40):
            with torch.no_grad():
                if not torch.equal(model(*call).logits, expected):
                    wrong.append(call)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, want, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (82, 41)


class HeadWitness(TorchDispatchMode):
    """Count the rows that a head with 60 outputs computes."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) and out.shape[-1] == 60:
            self.rows.append(out.shape[0])
        return out


def _ignore(*args):
    pass


LABELS = {"labels": torch.full((6, 9), -100)}
LABELS["labels"][0, 4:6] = 3
HEAD_CALLS = {
    "all": ({}, None, 9),
    "labels": (LABELS, None, 6 * 9),
    "kept": ({"logits_to_keep": 1}, None, 6),
    "tuple": ({"return_dict": False}, None, 6 * 9),
    "hook on the head": ({}, lambda model: model.lm_head.register_forward_hook(_ignore), 6 * 9),
    "hook on the stack": ({}, lambda model: model.model.register_forward_hook(_ignore), 6 * 9),
}


@torch.no_grad()
@pytest.mark.parametrize("call", HEAD_CALLS)
def test_language_model_head_runs_on_rows_where_nothing_else_reads_hidden_states(call):
    arguments, change, head_rows = HEAD_CALLS[call]
    ids, mask = pad(TREE, "right")
    plain, model = build(), hf.enable(build(), threshold=1.0, verify="never")
    if change:
        change(model)
    with HeadWitness() as witness:
        got = model(ids, mask, **arguments)
    assert witness.rows == [head_rows]
    assert model.radix_stats.rows == 9
    want = plain(ids, mask, **arguments)
    got, want = (out[0] if isinstance(out, tuple) else out.logits for out in (got, want))
    real = mask[:, -want.shape[1] :].bool()
    torch.testing.assert_close(got[real], want[real])


@torch.no_grad()
@pytest.mark.parametrize("recorded", [True, [0, 2]])
def test_head_on_rows_leaves_recorded_hidden_states_padded(recorded):
    ids, mask = pad(TREE, "both")
    plain, model = build(), hf.enable(build(), threshold=1.0)
    got, want = (m(ids, mask, output_hidden_states=recorded) for m in (model, plain))
    assert got.logits.shape == want.logits.shape
    assert len(got.hidden_states) == len(want.hidden_states)
    for ours, theirs in zip(got.hidden_states, want.hidden_states, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])
