"""The cache in a folded batch's output: hand-written loops of prefill and decoding go on as with the plain model."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
import warnings

import accelerate
import peft
import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map
from transformers import DynamicCache

from helpers.hf_models import SIZES, TREE, Witness, assert_same, build, build_from, gpt2, no_warnings, pad, proven_gpt2
from radix_ops import hf

# The name of the argument and of the output's field, which changed in transformers 5.24.
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
IDS, MASK = pad(TREE, "left")
ROWS = 9
USED = "a batch runs again, unfolded, because the cache in its output is used; pass use_cache=True"
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Rotary and learnt positions, windows in some layers or all, experts.
MODELS = {
    "llama": lambda: build("llama"),
    "qwen3_sliding": lambda: build("qwen3_sliding"),
    "gpt2": gpt2,
    "gemma2": lambda: build_from(transformers.Gemma2Config(**SIZES, sliding_window=3, attn_implementation="eager")),
    "mixtral": lambda: build_from(transformers.MixtralConfig(**SIZES, **EXPERTS, sliding_window=3)),
}
NAMES = [name if name != "gpt2" else pytest.param(name, marks=proven_gpt2) for name in MODELS]

pytestmark = [
    pytest.mark.filterwarnings("ignore:radix_ops. a batch runs unfolded because a cache was given"),
    pytest.mark.filterwarnings("ignore:radix_ops. a batch runs again, unfolded"),
    pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated"),
]


def decode(model, ids, mask, steps: int = 4, keeps_first: bool = False):
    """Return tokens, logits and cache of a greedy loop; `keeps_first` lets the first output's cache grow in place."""
    out = model(ids, attention_mask=mask)
    cache, logits = out[CACHE], [out.logits[:, -1:]]
    for _ in range(steps):
        mask = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        out = model(logits[-1].argmax(-1), attention_mask=mask, **{CACHE: cache})
        cache = cache if keeps_first else out[CACHE]
        logits.append(out.logits)
    logits = torch.cat(logits, 1)
    return logits.argmax(-1), logits[:, 1:], cache


@torch.no_grad()
@pytest.mark.parametrize("keeps_first", [False, True])
@pytest.mark.parametrize("side", ["left", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_decoding_loop_goes_on_as_plain(name, side, keeps_first):
    plain, model = MODELS[name](), MODELS[name]()
    ids, mask = (IDS, MASK) if side == "left" else (torch.tensor([[*TREE[0], end] for end in range(2, 6)]), None)
    want = decode(plain, ids, mask, keeps_first=keeps_first)
    with hf.folded(model, threshold=1.0):
        got = decode(model, ids, mask, keeps_first=keeps_first)
        # The prefill folds, and runs again where its cache is used; four steps follow.
        assert (model.radix_stats.folded, model.radix_stats.skipped) == (1, 5)
    assert type(got[2]) is type(want[2])
    assert_same(got, want)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_cache_is_that_of_the_plain_model(name, side):
    ids, mask = pad(TREE, side)
    plain, model = MODELS[name](), MODELS[name]()
    want = plain(ids, attention_mask=mask)[CACHE]
    hf.enable(model, threshold=1.0)
    got = model(ids, attention_mask=mask)[CACHE]
    assert got.get_seq_length() == want.get_seq_length() == ids.shape[1]
    assert len(got) == len(want) == 2
    assert_same(got, want)
    assert vars(got).keys() == vars(want).keys()


@torch.no_grad()
def test_cache_that_nobody_uses_costs_no_forward():
    model = hf.enable(build(), threshold=1.0, verify="never")
    with Witness() as witness, no_warnings():
        out = model(IDS, MASK)
        for given in (out, out.to_tuple(), model(IDS, MASK, return_dict=False)):
            assert given[1] is not None
            assert given[1]
            assert isinstance(given[1], DynamicCache)
            assert not hasattr(given[1], "to")
            repr(given)
        # accelerate, a Trainer and DDP do this with outputs.
        converted = accelerate.utils.convert_outputs_to_fp32(lambda: out)()
        accelerate.utils.send_to_device(converted, "cpu")
        tree_map(lambda x: x, out)
        transformers.trainer_pt_utils.nested_detach(out.to_tuple())
    assert witness.rows == [ROWS] * 4
    assert model.radix_stats.skipped == 0


@pytest.mark.parametrize("with_labels", [False, True])
def test_trainer_predicts_without_the_cache(with_labels, tmp_path):
    def predictions(model):
        options = transformers.TrainingArguments(tmp_path, use_cpu=True, per_device_eval_batch_size=3, report_to=[])
        rows = [{"input_ids": row[:4], **({"labels": row[:4]} if with_labels else {})} for row in IDS]
        return torch.as_tensor(transformers.Trainer(model, options).predict(rows).predictions)

    plain, model = build(), hf.enable(build(), threshold=1.0)
    got, want = predictions(model), predictions(plain)
    torch.testing.assert_close(got, want)
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (2, 0)


@torch.no_grad()
def test_cache_is_made_once_with_one_warning():
    model = hf.enable(build(), threshold=1.0, verify="never")
    caches = [model(IDS, MASK)[CACHE] for _ in range(2)]
    with Witness() as witness, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for cache in (*caches, *caches):
            cache.get_seq_length()
            list(cache)
    assert witness.rows == [IDS.numel()] * 4
    (warning,) = caught
    assert USED in str(warning.message)


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_outputs_hold_the_plain_cache(duplicate):
    plain, model = build(), hf.enable(build(), threshold=1.0)
    copied = duplicate(model(IDS, MASK)[CACHE])
    assert type(copied) is DynamicCache
    assert_same(copied, plain(IDS, MASK)[CACHE])
    whole = duplicate(model(IDS, MASK))
    del model
    assert_same(copy.deepcopy(whole[CACHE]), plain(IDS, MASK)[CACHE])


@torch.no_grad()
def test_cache_holds_the_batch_as_it_was_given():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    ids, mask = IDS.clone(), MASK.clone()
    cache = model(ids, mask)[CACHE]
    ids.zero_()
    mask.fill_(1)
    assert_same(copy.copy(cache), plain(IDS, MASK)[CACHE])


@torch.no_grad()
def test_cache_is_used_after_disable():
    plain, model = build(), build()
    with hf.folded(model, threshold=1.0):
        cache = model(IDS, MASK)[CACHE]
    assert_same(copy.copy(cache), plain(IDS, MASK)[CACHE])


def test_cache_has_the_gradients_of_the_plain_model():
    def gradients(model):
        out = model(IDS, MASK)
        with torch.no_grad():  # which does not matter where somebody looks
            out[CACHE].get_seq_length()
        step = model(IDS[:, :1], torch.nn.functional.pad(MASK, (0, 1), value=1), **{CACHE: out[CACHE]})
        step.logits.square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    plain, model = build(), hf.enable(build(), threshold=1.0)
    assert_same(gradients(model), gradients(plain))


@torch.no_grad()
def test_cache_is_made_in_the_precision_of_its_call():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        want, got = (each(IDS, MASK)[CACHE] for each in (plain, model))
    assert_same(copy.copy(got), want)
    got = model(IDS, MASK)[CACHE]
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        got.get_seq_length()
    assert_same(got, plain(IDS, MASK)[CACHE])
    assert not got.layers[0].values.is_inference()


def _in_gradient(look):
    torch.func.grad(lambda x: x * look())(torch.tensor(1.0))


def _in_graph(look):
    make_fx(lambda x: x * look())(torch.tensor(1.0))


def _in_fake(look):
    with FakeTensorMode():
        look()


@torch.no_grad()
@pytest.mark.parametrize("inside", [_in_gradient, _in_graph, _in_fake])
def test_cache_is_made_outside_of_transforms_and_tracers(inside):
    plain, model = build(), hf.enable(build(), threshold=1.0)
    cache = model(IDS, MASK)[CACHE]
    inside(lambda: len(cache.layers))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(cache.layers[0].keys)
    assert type(cache.layers[0].keys) is torch.Tensor
    assert_same(cache, plain(IDS, MASK)[CACHE])


@torch.no_grad()
def test_generate_goes_on_from_the_cache():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    options = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    longer, mask = torch.cat([IDS, IDS[:, :1]], 1), torch.nn.functional.pad(MASK, (0, 1), value=1)
    got, want = (
        each.generate(longer, attention_mask=mask, **{CACHE: each(IDS, MASK)[CACHE]}, **options)
        for each in (model, plain)
    )
    assert_same(got, want)


@torch.no_grad()
def test_compiled_decoding_loop():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    got = decode(torch.compile(model, backend="eager", dynamic=True), IDS, MASK)
    assert model.radix_stats.folded == 1
    assert_same(got[0], decode(plain, IDS, MASK)[0])


def _change_weight(model):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0] += 1e-6


def _replace_weights(model):
    model.load_state_dict({name: x + 1e-6 for name, x in model.state_dict().items()}, assign=True)


def _replace_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data + 1e-6


def _change_data(model):
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)


def _nudge_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1 + 1e-6)


def _change_config(model):
    model.model.layers[0].self_attn.scaling *= 1.1


def _add_hook(model):
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: out * 2)


def _drop_out(model):
    model.config.attention_dropout = 0.5
    model.train()


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_change_weight, "weights or adapters have changed since"),
        (_replace_weights, "weights or adapters have changed since"),
        (_replace_data, "weights or adapters have changed since"),
        (_change_data, "weights or adapters have changed since"),
        (_nudge_data, "weights or adapters have changed since"),
        (_change_config, "the model has changed since: hidden states differ"),
        (_add_hook, "layers.0.mlp has a hook"),
        (_drop_out, "attention_dropout is 0.5"),
    ],
)
def test_cache_of_a_model_that_changed_is_an_error(change, reason):
    model = hf.enable(build(), threshold=1.0)
    out = model(IDS, MASK)
    change(model)
    message = rf"cache of a folded batch can't be made: .*{reason}.*; pass use_cache=True to a call that another one"
    with pytest.raises(RuntimeError, match=message):
        model(IDS[:, :1], **{CACHE: out[CACHE]})


@torch.no_grad()
def test_cache_of_other_adapters_is_an_error():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = hf.enable(peft.get_peft_model(build(), config).eval(), threshold=1.0)
    with model.disable_adapter():
        cache = model(input_ids=IDS, attention_mask=MASK)[CACHE]
    with pytest.raises(RuntimeError, match="weights or adapters have changed since"):
        len(cache)
    with model.disable_adapter():
        assert len(cache) == 2


@torch.no_grad()
def test_cache_of_weights_that_a_call_alone_had_is_an_error():
    model = hf.enable(build(), threshold=1.0)
    near = {name: parameter + 1e-6 for name, parameter in model.named_parameters()}
    cache = torch.func.functional_call(model, near, (IDS, MASK))[CACHE]
    with pytest.raises(RuntimeError, match="weights or adapters have changed since"):
        len(cache)


@torch.no_grad()
def test_cache_of_a_saved_buffer_that_changed_is_an_error():
    model = build()
    model.model.layers[0].mlp.register_buffer("bias", torch.zeros(2))
    cache = hf.enable(model, threshold=1.0)(IDS, MASK)[CACHE]
    model.model.layers[0].mlp.bias += 1
    with pytest.raises(RuntimeError, match="weights or adapters have changed since"):
        len(cache)


@torch.no_grad()
def test_cache_keeps_no_model_alive():
    model = hf.enable(build(), threshold=1.0)
    cache = model(IDS, MASK)[CACHE]
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="can't be made: its model is gone"):
        len(cache)


@torch.no_grad()
def test_several_processes_make_no_cache(monkeypatch):
    model = hf.enable(build(), threshold=1.0)
    cache = model(IDS, MASK)[CACHE]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"several processes, .+; pass use_cache=True to a call"):
        len(cache)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_gradient_checkpointing_makes_no_cache_that_plain_does_not(with_gradients):
    plain, model = build().train(), build().train()
    for each in (plain, model):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    hf.enable(model, threshold=1.0)
    with torch.set_grad_enabled(with_gradients):
        want, got = plain(IDS, MASK).get(CACHE), model(IDS, MASK).get(CACHE)
    if want is not None:
        assert_same(copy.copy(got), want)
    elif got is not None:
        with pytest.raises(RuntimeError, match="the model, as it is set, makes none"):
            len(got)
    if with_gradients:
        assert want is got is None
