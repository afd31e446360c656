"""A forward has the same bits with and without gradients: a policy that is trained is compared with one that is not."""

from __future__ import annotations

import pytest
import torch

from helpers.batches import NAMED
from helpers.hf_models import TREE, build, pad
from helpers.tries import LONG
from radix_ops import FoldedBatch, attention, hf
from radix_ops.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = ["auto", "compact", "trie", "unfold"]
# They share little, much (each key would be repeated 20 times), and nothing.
BATCHES = {"long": LONG, "much": [[*range(50), i] for i in range(33)], "disjoint": NAMED["disjoint"]}
WITHOUT_GRADIENTS = [torch.no_grad, torch.inference_mode]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("default_device")
def test_attention(layout, dtype, device):
    for sequences in BATCHES.values():
        batch = FoldedBatch.from_sequences(sequences, pad_multiple_of=4, device=device)
        tensors = [torch.randn(batch.num_rows, heads, 16, dtype=dtype) for heads in (6, 2, 2)]
        want = attention(*tensors, batch, layout=layout)
        for wants_gradient in ((0, 1, 2), (0,), (2,)):
            inputs = [x.clone().requires_grad_(i in wants_gradient) for i, x in enumerate(tensors)]
            assert torch.equal(attention(*inputs, batch, layout=layout), want)
            for mode in WITHOUT_GRADIENTS:
                with mode():
                    assert torch.equal(attention(*inputs, batch, layout=layout), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("default_device")
def test_qwen3(layout, dtype, device):
    config = Qwen3Config(
        vocab_size=1100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope={"rope_type": "default", "rope_theta": 1e4},
        sliding_windows=(None, 7),
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).to(dtype)
    for sequences in BATCHES.values():
        batch = FoldedBatch.from_sequences(sequences, device=device)
        want = model(batch, layout=layout)
        assert want.requires_grad
        model.model.gradient_checkpointing = True
        assert torch.equal(model(batch, layout=layout), want)
        model.model.gradient_checkpointing = False
        for mode in WITHOUT_GRADIENTS:
            with mode():
                assert torch.equal(model(batch, layout=layout), want)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", ["ForCausalLM", "ForSequenceClassification"])
def test_enabled_llama(layout, dtype, head):
    """A policy is in training and has gradients; its reference is frozen and in evaluation."""
    ids, mask = pad(TREE, "right")
    ids *= mask  # the last that is no padding is what is pooled
    policy, reference = (hf.enable(build("llama", head).to(dtype), threshold=1.0, layout=layout) for _ in range(2))
    policy.train()
    reference.requires_grad_(False)
    want = policy(input_ids=ids, attention_mask=mask).logits
    assert policy.radix_stats.rows < int(mask.sum())
    assert want.requires_grad
    seen = mask.bool() if head == "ForCausalLM" else slice(None)
    assert torch.equal(reference(input_ids=ids, attention_mask=mask).logits[seen], want[seen])
    for mode in WITHOUT_GRADIENTS:
        with mode():
            for model in (policy, reference):
                assert torch.equal(model(input_ids=ids, attention_mask=mask).logits[seen], want[seen])
    policy.gradient_checkpointing_enable({"use_reentrant": False})  # which runs layers that want gradients twice
    assert torch.equal(policy(input_ids=ids, attention_mask=mask).logits[seen], want[seen])


def test_enabled_llama_losses():
    ids, mask = pad(TREE, "right")
    labels = ids.masked_fill(mask == 0, -100)
    model = hf.enable(build("llama"), threshold=1.0)
    want = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert want.requires_grad
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, attention_mask=mask, labels=labels).loss, want)
