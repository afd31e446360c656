"""radix_ops.hf leaves a batch alone where folding would be wrong: equal bit for bit to the plain model, one warning."""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.integrations.neftune import neftune_post_forward_hook

from helpers.hf_models import TREE, assert_same, build, no_warnings, pad
from radix_ops import hf

# The argument's name, which changed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
IDS, MASK = pad(TREE, "right")
SQUARE_IDS = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
HOLES = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
FULL = "full_attention"
CAUSAL = torch.ones(2, 1, 4, 4, dtype=torch.bool).tril()


def _embeddings(model):
    return model.get_input_embeddings()(SQUARE_IDS).detach()


# (reason, model, arguments of a call)
OBSTACLES = [
    ("use_cache=True was given", "llama", lambda model: {"use_cache": True}),
    ("a cache was given", "qwen3", lambda model: {CACHE: DynamicCache(config=model.config)}),
    ("attention weights are asked for", "llama", lambda model: {"output_attentions": True}),
    ("inputs_embeds was given", "llama", lambda model: {"input_ids": None, "inputs_embeds": _embeddings(model)}),
    ("attention_mask isn't shaped like input_ids", "llama", lambda model: {"attention_mask": CAUSAL}),
    ("attention_mask isn't shaped like input_ids", "qwen3", lambda model: {"attention_mask": {FULL: CAUSAL}}),
    ("attention_mask isn't shaped like input_ids", "llama", lambda model: {"attention_mask": HOLES[:, 1:]}),
    ("attention_mask has holes", "llama", lambda model: {"attention_mask": HOLES}),
    ("position_ids are torch.float32", "llama", lambda model: {"position_ids": torch.arange(4.0)[None]}),
    ("is_causal was given", "qwen3", lambda model: {"is_causal": False}),
    ("cu_seq_lens_q was given", "qwen3", lambda model: {"cu_seq_lens_q": torch.tensor([0, 4, 8])}),
]  # fmt: skip


def check_unfolded(plain, model, reason, arguments, enabled=False):
    """Call both models twice: results are equal bit for bit, the batches were skipped, with one warning."""

    def outputs(model):
        torch.manual_seed(5)
        return [model(**arguments(model)) for _ in range(2)]

    if not enabled:
        hf.enable(model, threshold=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", FutureWarning)
        got = outputs(model)
    assert_same(got, outputs(plain))
    said, _, remedy = next(str(warning.message) for warning in caught).partition("; ")
    assert len(caught) == 1
    assert said == f"radix_ops: a batch runs unfolded because {reason}"
    assert remedy
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (0, 2)


@torch.no_grad()
@pytest.mark.parametrize(("reason", "name", "arguments"), OBSTACLES)
def test_argument_runs_unfolded(reason, name, arguments):
    models = [build(name, attention="eager") for _ in range(2)]
    check_unfolded(*models, reason, lambda model: {"input_ids": SQUARE_IDS, **arguments(model)})


def _add_attention_dropout(model):
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


def _add_dropout(model):
    # An adapter does so: around one projection, deep in the stack.
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Sequential(attention.q_proj, torch.nn.Dropout(0.5))


def _add_noise(model):
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("layers.1.self_attn has attention_dropout", _add_attention_dropout),
        ("layers.1.self_attn.q_proj.1 drops out", _add_dropout),
        ("embed_tokens adds NEFTune noise", _add_noise),
    ],
)
def test_randomness_in_training_runs_unfolded(reason, change):
    models = [build(attention="eager") for _ in range(2)]
    for model in models:
        change(model)
        model.train()
    check_unfolded(*models, reason, lambda model: {"input_ids": SQUARE_IDS})
    model.eval()
    model(SQUARE_IDS)
    assert model.radix_stats.folded == 1


def _steer_last_position(module, args, out):
    out[:, -1] += 1
    return out


def test_hook_inside_runs_unfolded_and_hook_outside_does_not():
    models = [build() for _ in range(2)]
    for model in models:
        model.model.layers[0].mlp.register_forward_hook(_steer_last_position)
    reason = "layers.0.mlp has a hook, which would see rows for positions"
    check_unfolded(*models, reason, lambda model: {"input_ids": SQUARE_IDS})
    plain, model = build(), hf.enable(build(), threshold=1.0)
    seen = []
    for hooked in (plain, model):
        hooked.model.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
        hooked(SQUARE_IDS)
    assert model.radix_stats.folded == 1
    torch.testing.assert_close(*seen)


def _replace_forward(model):
    layer = model.model.layers[0]
    layer.forward = layer.forward


@torch.no_grad()
@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("config.is_causal is False", lambda model: setattr(model.config, "is_causal", False)),
        (
            "layers.1.self_attn has is_causal=False",
            lambda model: setattr(model.model.layers[1].self_attn, "is_causal", False),
        ),
        ("layers.0 has a forward that was replaced", _replace_forward),
    ],
)
def test_change_after_enable_runs_unfolded(reason, change):
    plain, model = build(), hf.enable(build(), threshold=1.0)
    for changed in (plain, model):
        change(changed)
    want = plain(SQUARE_IDS)
    with pytest.warns(UserWarning, match=reason):
        assert_same(model(SQUARE_IDS), want)
    with pytest.raises(ValueError, match=reason):
        hf.enable(model)


def _label_all_tokens(ids, mask):
    return {"labels": ids.masked_fill(mask == 0, -100)}


def _label_shifted(ids, mask):
    return {"labels": torch.full_like(ids, -100), "shift_labels": ids}


def _label_last(ids, mask):
    return {"labels": ids[:, -2:], "logits_to_keep": 2}


def _label_reversed(ids, mask):
    return {"labels": ids.masked_fill(mask == 0, -100), "logits_to_keep": torch.arange(ids.shape[1]).flip(0)}


def _label_classes(ids, mask):
    return {"labels": ids[:, 0] % 3}


def _label_spans(ids, mask):
    return {"start_positions": ids[:, 0] % 4, "end_positions": ids[:, 1] % 4}


MASKED_READS = {
    "label of the first token behind padding": ("ForCausalLM", "left", _label_all_tokens),
    "labels at padding": ("ForCausalLM", "right", lambda ids, mask: {"labels": ids}),
    "shifted labels at padding": ("ForCausalLM", "right", _label_shifted),
    "labels of kept logits": ("ForCausalLM", "right", _label_last),
    "labels of logits in another order": ("ForCausalLM", "right", _label_reversed),
    "token labels at padding": ("ForTokenClassification", "left", lambda ids, mask: {"labels": ids % 3}),
    "softmax over all positions": ("ForQuestionAnswering", "right", _label_spans),
    "pooling of a masked token": ("ForSequenceClassification", "right", lambda ids, mask: {}),
    "pooling of a masked token, with labels": ("ForSequenceClassification", "right", _label_classes),
}


@torch.no_grad()
@pytest.mark.parametrize("case", MASKED_READS)
def test_masked_position_that_is_read_runs_unfolded(case):
    head, side, arguments = MASKED_READS[case]
    ids, mask = pad(TREE, side)
    models = [build("qwen3", head=head) for _ in range(2)]
    check_unfolded(
        *models,
        "labels, pooling or logits_to_keep read a masked position",
        lambda model: {"input_ids": ids, "attention_mask": mask, **arguments(ids, mask)},
    )


@torch.no_grad()
def test_custom_loss_is_taken_to_read_masked_positions():
    models = [build() for _ in range(2)]
    for model in models:
        model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().sum()
    labels = IDS.masked_fill(MASK == 0, -100)
    arguments = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    check_unfolded(*models, "labels, pooling or logits_to_keep read a masked position", lambda model: arguments)
    models[1](input_ids=SQUARE_IDS, attention_mask=torch.ones_like(SQUARE_IDS), labels=SQUARE_IDS)
    assert models[1].radix_stats.folded == 1


class OtherHead(transformers.LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        hidden = self.model(input_ids, attention_mask, **kwargs).last_hidden_state
        return hidden.sum() if labels is not None else hidden.shape


@torch.no_grad()
def test_unknown_head_is_taken_to_read_masked_positions():
    models = [OtherHead(build().config).eval() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    arguments = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    check_unfolded(*models, "labels, pooling or logits_to_keep read a masked position", lambda model: arguments)
    models[1](input_ids=IDS, attention_mask=MASK)
    assert models[1].radix_stats.folded == 1


@torch.no_grad()
def test_decoding_step_with_cache_needs_no_warning():
    plain, model = build(), hf.enable(build())
    for folding in (plain, model):
        folding.kept = DynamicCache()
        folding(SQUARE_IDS[:, :2], use_cache=True, **{CACHE: folding.kept})
    with no_warnings():
        got, want = (m(SQUARE_IDS[:, 2:], use_cache=True, **{CACHE: m.kept}) for m in (model, plain))
    assert_same(got, want)
    assert model.radix_stats.skipped == 2


@torch.no_grad()
def test_model_moved_to_another_kind_of_device_runs_unfolded():
    model = hf.enable(build(head="Model")).to("meta")
    # The plain forward of early transformers raises there.
    with pytest.warns(UserWarning, match="input_ids are on meta"), contextlib.suppress(RuntimeError):
        assert model(SQUARE_IDS.to("meta")).last_hidden_state.is_meta


@torch.no_grad()
def test_batch_of_padding_alone_runs_as_before():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    with no_warnings():
        assert_same(model(SQUARE_IDS, 0 * SQUARE_IDS), plain(SQUARE_IDS, 0 * SQUARE_IDS))
    assert model.radix_stats == hf.RadixStats(tokens=0, rows=8, skipped=1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": torch.ones(0, 3, dtype=torch.int64)},
        {"input_ids": torch.ones(2, 0, dtype=torch.int64)},
        {"input_ids": torch.ones(2, 3)},
        {"input_ids": torch.full((2, 3), 60)},
        {"input_ids": SQUARE_IDS, "inputs_embeds": torch.ones(2, 4, 32)},
        {"input_ids": SQUARE_IDS, "position_ids": torch.arange(4)},
        {},
    ],
)
@pytest.mark.filterwarnings("ignore:radix_ops")
def test_malformed_input_gets_the_error_it_had(arguments):
    with pytest.raises(Exception) as plain:  # noqa: PT011
        build(head="Model")(**arguments)
    with pytest.raises(plain.type) as caught:
        hf.enable(build(head="Model"), threshold=1.0)(**arguments)
    assert str(caught.value) == str(plain.value)


def _sharing(saved: int) -> torch.Tensor:
    """Return rows [51, 1300] of which 50 share `saved` / 50 tokens with the first, and no more."""
    ids = torch.arange(51)[:, None].expand(51, 1300).clone()
    ids[:, : saved // 50] = 55
    return ids


@torch.no_grad()
@pytest.mark.parametrize(
    ("threshold", "ids", "mask", "folds"),
    [
        # On a CPU, positions saved times the square of the width (32) must be 2.5e6 at least.
        (None, torch.ones(40, 63, dtype=torch.int64), None, True),
        (None, torch.ones(38, 63, dtype=torch.int64), None, False),
        (None, torch.ones(2, 63, dtype=torch.int64).repeat(30, 1), (torch.arange(63) < 30).expand(60, -1).long(), True),
        (None, _sharing(2600), None, False),  # 0.96 of its positions are rows
        (None, SQUARE_IDS, None, False),
        (0.625, SQUARE_IDS, None, True),
        (0.62, SQUARE_IDS, None, False),
        (0, SQUARE_IDS, None, False),
        (1.0, torch.arange(1, 41).view(2, 20), None, True),
    ],
)
def test_threshold(threshold, ids, mask, folds):
    model = hf.enable(build(), threshold=threshold)
    model(ids, mask)
    assert (model.radix_stats.folded, model.radix_stats.skipped) == ((1, 0) if folds else (0, 1))
    if not folds:
        assert model.radix_stats.rows == ids.numel()


def _mix_positions(x):
    return x - x.mean(-2, keepdim=True)


class _MixingLinear(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(_mix_positions(x))


def _replace_mlp_forward(model):
    mlp = model.model.layers[0].mlp
    original = mlp.forward
    mlp.forward = lambda x: original(_mix_positions(x))


def _replace_norm_forward(model):
    norm = model.model.norm
    original = norm.forward
    norm.forward = lambda x: original(_mix_positions(x))


def _replace_projection(model):
    attention = model.model.layers[1].self_attn
    attention.q_proj = _MixingLinear(attention.q_proj)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_replace_mlp_forward, "layers.0.mlp has a forward that was replaced"),
        (_replace_norm_forward, "norm has a forward that was replaced"),
        (
            _replace_projection,
            f"layers.1.self_attn.q_proj is {__name__}._MixingLinear, which transformers' own LlamaModel does not hold",
        ),
    ],
)
@torch.no_grad()
def test_parts_replaced_after_enable_run_unfolded(change, reason):
    plain, model = build(), hf.enable(build(), threshold=1.0)
    for each in (plain, model):
        change(each)
    arguments = {"input_ids": IDS, "attention_mask": MASK, "use_cache": None}
    check_unfolded(plain, model, reason, lambda model: arguments, enabled=True)
    hf.disable(model)
    with pytest.raises(ValueError, match=re.escape(reason)):
        hf.enable(model)


@torch.no_grad()
def test_global_hooks_run_unfolded():
    plain, model = build(), build()

    def mix(module, inputs, output):
        return _mix_positions(output) if type(module).__name__ == "LlamaMLP" else None

    handle = torch.nn.modules.module.register_module_forward_hook(mix)
    try:
        reason = "a hook on all modules would see rows for positions"
        check_unfolded(plain, model, reason, lambda model: {"input_ids": IDS, "attention_mask": MASK})
    finally:
        handle.remove()


@torch.no_grad()
def test_generate_without_a_cache_from_right_padded_rows():
    """generate() reads the logits of the last column, which are those of padding."""
    model = build()
    options = {"attention_mask": MASK, "max_new_tokens": 3, "use_cache": False, "do_sample": False}
    plain = model.generate(IDS, **options)
    hf.enable(model, threshold=1.0)
    with pytest.warns(UserWarning, match="logits_to_keep read a masked position"):
        got = model.generate(IDS, **options)
    assert torch.equal(got, plain)
