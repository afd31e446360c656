"""radix_ops.hf.enable and disable: refusals, what disable restores, and copies, pickles and saves of enabled models."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import torch
import transformers
from expecttest import assert_expected_inline
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaModel, Qwen3Config, Qwen3Model

from helpers.hf_models import assert_same, build
from radix_ops import hf

IDS = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 5}
WRONG_TYPES = ("qwen3_next", "mamba", "jamba", "recurrent_gemma", "lfm2", "bert", "bloom")


@pytest.mark.parametrize("model_type", WRONG_TYPES)
def test_other_model_types_are_refused_by_name(model_type):
    config = AutoConfig.for_model(model_type)
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    message = f"'{model_type}', which folding is not known to be right for: .+ docs/models.md"
    with pytest.raises(ValueError, match=message):
        hf.enable(model)


class RemoteModel(LlamaModel):
    pass


class RemoteAttention(transformers.models.llama.modeling_llama.LlamaAttention):
    pass


def tiny_llama(**rope):
    return LlamaModel(LlamaConfig(**TINY, rope_parameters={"rope_theta": 1e4, "factor": 2.0, **rope}))


def tiny_qwen3(**further):
    return Qwen3Model(Qwen3Config(**TINY, layer_types=["sliding_attention"], **further))


def refusal(model, change=lambda model: None) -> str:
    """Return the kind and text of enable's error after `change`, without its opening and this module's name."""
    change(model)
    before = dict(vars(model))
    with pytest.raises((ValueError, TypeError)) as caught:
        hf.enable(model)
    assert vars(model) == before
    text = f"{caught.typename}: {caught.value}"
    return text.replace(f"{type(model).__name__} can't be folded: ", "").replace(f"{__name__}.", "")


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="enable needs a transformers model, got str"):
        hf.enable("llama")


def test_refusals_say_why():
    def swap_attention(model):
        model.model.layers[1].self_attn = RemoteAttention(model.config, 1)

    def swap_mlp(model):
        model.model.layers[1].mlp = torch.nn.GRU(32, 32)

    def replace_forward(model):
        model.model.forward = model.model.forward

    def set_config(**values):
        return lambda model: vars(model.config).update(values)

    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 4}
    messages = [
        refusal(torch.nn.Linear(2, 2)),
        refusal(torch.nn.Sequential(torch.nn.Linear(2, 2))),
        refusal(RemoteModel(build().config)),
        refusal(build(), swap_attention),
        refusal(build(), swap_mlp),
        refusal(build(), replace_forward),
        refusal(build(), lambda model: model.to("meta")),
        refusal(build(), set_config(is_causal=False)),
        refusal(build(), set_config(_attn_implementation_internal="flash_attention_2")),
        refusal(tiny_llama(rope_type="dynamic")),
        refusal(tiny_llama(rope_type="longrope", **factors)),
        refusal(tiny_qwen3()),
        refusal(tiny_qwen3(use_sliding_window=True, sliding_window=3), set_config(layer_types=["full_attention"])),
    ]
    assert_expected_inline(
        "\n".join(messages),
        """\
TypeError: enable needs a transformers PreTrainedModel, got Linear, which holds none
TypeError: enable needs a transformers PreTrainedModel, got Sequential, which holds none
ValueError: its decoder stack is RemoteModel and not transformers' own LlamaModel
ValueError: layers.1.self_attn is RemoteAttention, which transformers' own LlamaModel does not hold
ValueError: layers.1.mlp is torch.nn.modules.rnn.GRU, which transformers' own LlamaModel does not hold
ValueError: the forward of its decoder stack was replaced
ValueError: embed_tokens.weight is on meta; folding runs on the CPU and on CUDA
ValueError: config.is_causal is False
ValueError: its attention implementation is 'flash_attention_2'; supported are eager, sdpa (set_attn_implementation)
ValueError: rope_type 'dynamic' depends on the padded length; supported are default, linear, llama3, yarn, proportional
ValueError: rope_type 'longrope' depends on the padded length; supported are default, linear, llama3, yarn, proportional
ValueError: layers.0.self_attn has sliding_window None in a layer of type 'sliding_attention'
ValueError: layers.0.self_attn has sliding_window 3 in a layer of type 'full_attention'""",
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 1.5}, "threshold must be between 0 and 1, or None, got 1.5"),
        ({"threshold": float("nan")}, "threshold must be between 0 and 1, or None, got nan"),
        ({"layout": "tree"}, "layout must be one of .*, got 'tree'"),
        ({"layout": np.array(["trie", "compact"])}, "layout must be one of .*, got array"),
        ({"verify": np.array(["first", "never"])}, "verify must be one of .*, got array"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        hf.enable(build(), **options)


def snapshot(model):
    """Return all attributes of all modules, by identity, and a copy of the config's."""
    return [
        {name: value if name == "config" else id(value) for name, value in vars(module).items()}
        for module in model.modules()
    ], copy.deepcopy(vars(model.config))


@pytest.mark.parametrize("head", ["Model", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering"])
def test_disable_restores_every_attribute(head):
    model = build("qwen3_sliding", head=head)
    before = snapshot(model)
    assert hf.enable(model) is model
    hf.enable(model, threshold=1.0)
    assert snapshot(model)[1] == before[1]
    model(IDS[:1])
    assert model.radix_stats.folded == 1
    hf.disable(model)
    assert snapshot(model) == before
    hf.disable(model)
    assert snapshot(model) == before
    with pytest.raises(ZeroDivisionError), hf.folded(model):
        raise ZeroDivisionError
    assert snapshot(model) == before


def test_disable_through_another_module_leaves_nothing():
    model = build()
    before = snapshot(model)
    hf.enable(model.model)
    hf.enable(model)
    assert model.radix_stats is model.model.radix_stats
    hf.disable(model.model)
    assert snapshot(model) == before


def test_folded_inside_enabled_restores_its_options():
    model = build()
    hf.enable(model.model, threshold=0)
    before = snapshot(model)
    with hf.folded(model, threshold=1.0):
        model(IDS)
        assert model.radix_stats.folded == 1
    assert snapshot(model) == before
    model(IDS)
    assert model.model.radix_stats.skipped == 1


def test_enable_again_changes_options_and_keeps_counts():
    model = hf.enable(build(), threshold=0)
    model(IDS)
    assert hf.enable(model, threshold=1.0) is model
    model(IDS)
    assert model.radix_stats == hf.RadixStats(tokens=16, rows=8 + 5, folded=1, skipped=1)


@pytest.mark.parametrize(("path", "name"), [("", "LlamaForCausalLM"), ("model", "the decoder stack")])
def test_disable_refuses_a_forward_that_was_replaced(path, name):
    model = hf.enable(build())
    before = snapshot(model)
    module = model.get_submodule(path)
    ours, module.forward = module.forward, lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match=f"forward of {name} was replaced after enable"):
        hf.disable(model)
    module.forward = ours
    assert snapshot(model) == before
    hf.disable(model)


def test_saved_model_knows_nothing_of_folding(tmp_path):
    model = build("qwen3_sliding")
    model.save_pretrained(tmp_path / "before")
    hf.enable(model, threshold=1.0)
    model(IDS)
    model.save_pretrained(tmp_path / "enabled")
    for name in ("config.json", "generation_config.json"):
        before, enabled = (json.loads((tmp_path / kind / name).read_text()) for kind in ("before", "enabled"))
        assert enabled == before
        assert "radix" not in json.dumps(enabled)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "enabled")
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


@torch.no_grad()
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_is_enabled_and_independent(duplicate):
    model = hf.enable(build(), threshold=1.0)
    want = model(IDS).logits
    copied = duplicate(model)
    copied.lm_head.weight.mul_(2)
    copied.model.norm.weight.mul_(2)
    torch.testing.assert_close(copied(IDS).logits, want * 4)
    assert (model.radix_stats.folded, copied.radix_stats.folded) == (1, 2)
    hf.disable(copied)
    assert model(IDS).logits.equal(want)
    assert model.radix_stats.folded == 2


@torch.no_grad()
def test_changes_to_modules_after_enable_are_seen():
    plain, model = build(), hf.enable(build(), threshold=1.0)
    for changed in (plain, model):
        attention = changed.model.layers[0].self_attn
        attention.o_proj = torch.nn.Sequential(attention.o_proj, torch.nn.Tanh())
        changed.model.layers[1].mlp = torch.nn.Identity()
        changed.model.norm = torch.nn.Tanh()
    # Compiled calls are bound to the modules as they were, so folded batches pass them by.
    model.model.layers[1].compile(backend="eager")
    model.model.layers[1].self_attn.compile(backend="eager")
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
    assert model.radix_stats.folded == 1


@torch.no_grad()
def test_forward_that_a_head_had_of_its_own_is_kept():
    model = build()
    calls = []

    def hooked(*args, **kwargs):
        calls.append(args)
        return type(model).forward(model, *args, **kwargs)

    model.forward = hooked
    before = snapshot(model)
    with hf.folded(model, threshold=1.0):
        model(IDS)
        assert model.radix_stats.folded == 1
        assert len(calls) == 1
    assert snapshot(model) == before


def test_callers_see_the_original_signature():
    model = build()
    before = inspect.signature(model.forward), inspect.signature(model.model.forward)
    hf.enable(model)
    assert (inspect.signature(model.forward), inspect.signature(model.model.forward)) == before


def test_attention_that_goes_another_way_is_noticed(monkeypatch):
    def forward(self, hidden_states, **kwargs):
        return self.o_proj(self.q_proj(hidden_states)), None

    model = hf.enable(build(), threshold=1.0, verify="never")
    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forward)
    with pytest.raises(RuntimeError, match="called the folded attention 0 times and not 2"):
        model(IDS)


def test_attention_cannot_be_chosen_by_name():
    model = build()
    model.set_attn_implementation("radix_ops")
    with pytest.raises(RuntimeError, match=r"use radix_ops\.hf\.enable"):
        model(IDS)
    with pytest.raises(ValueError, match="attention implementation is 'radix_ops'"):
        hf.enable(model)
