"""Losses on compact rows against transformers' own losses, of models that run on padded batches."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import transformers
from transformers.generation import TemperatureLogitsWarper
from transformers.trainer_pt_utils import LabelSmoother

from helpers.qwen3_models import oracle
from radix_ops import FoldedBatch, losses
from radix_ops.models.qwen3 import Qwen3ForCausalLM

SEQUENCES = [[1, 2, 3, 4, 5], [1, 2, 3, 9], [1, 2, 3, 4, 5], [1, 2], [1, 2, 3, 4, 7, 7, 8], [6]]
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
}


def padded(sequences, ignored=0.3):
    """Return ids, mask and labels [B, T], padded on the right; some labels are ignored, and padding's are."""
    longest = max(map(len, sequences))
    ids = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
    mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
    labels = ids.masked_fill((mask == 0) | (torch.rand(ids.shape) < ignored), -100)
    return ids, mask, labels


def assert_same_gradients(ours, theirs):
    wants = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wants[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_qwen3_trains_as_transformers_does(tmp_path, tied, label_smoothing):
    theirs = oracle(tmp_path, tie_word_embeddings=tied)
    ours = Qwen3ForCausalLM.from_pretrained(tmp_path)
    ids, mask, labels = padded(SEQUENCES)
    outputs = theirs(input_ids=ids, attention_mask=mask, labels=labels)
    want = outputs.loss
    if label_smoothing:
        want = LabelSmoother(label_smoothing)({"logits": outputs.logits}, labels, shift_labels=True)
    want.backward()
    batch = FoldedBatch.from_padded(ids, mask, pad_multiple_of=8)
    assert batch.num_nodes < batch.num_tokens / 2
    got = losses.causal_lm_loss(
        ours.model(batch),
        batch,
        labels[mask.bool()],
        weight=ours.lm_head.weight,
        label_smoothing=label_smoothing,
        rows_per_chunk=3,
    )
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert_same_gradients(ours, theirs)


CONFIGS = {
    "gemma2": transformers.Gemma2Config(**TINY, final_logit_softcapping=2.0),
    "cohere": transformers.CohereConfig(**{**TINY, "logit_scale": 0.3}),
    "granite": transformers.GraniteConfig(**TINY, logits_scaling=4.0),
}
HEADS = {
    "gemma2": lambda config: {"softcap": config.final_logit_softcapping},
    "cohere": lambda config: {"logit_scale": config.logit_scale},
    "granite": lambda config: {"logit_scale": 1 / config.logits_scaling},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_made_as_transformers_makes_them(name):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        weight.mul_(20)  # logits that a softcap bends
    ids, mask, labels = padded(SEQUENCES)
    outputs = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    states = outputs.hidden_states[-1].detach()
    batch = FoldedBatch.from_padded(ids, mask)
    hidden = batch.fold(states[mask.bool()])
    head = {"weight": weight, **HEADS[name](model.config)}
    got = losses.causal_lm_loss(hidden, batch, labels[mask.bool()], **head)
    torch.testing.assert_close(got, outputs.loss, rtol=1e-5, atol=1e-6)
    plain = losses.causal_lm_loss(hidden, batch, labels[mask.bool()], weight=weight)
    assert (plain - got).abs() > 1e-2

    warped = TemperatureLogitsWarper(0.4)(None, outputs.logits[mask.bool()].detach()).log_softmax(-1)
    want = warped[:-1].gather(1, ids[mask.bool()][1:, None])[:, 0]
    got = losses.token_logprobs(hidden, batch, temperature=0.4, **head)[1:]
    is_first = torch.zeros(batch.num_tokens, dtype=torch.bool)
    is_first[batch.cu_seqlens[:-1].long()] = True
    torch.testing.assert_close(got, want.masked_fill(is_first[1:], 0), rtol=1e-4, atol=1e-5)


def test_a_scale_comes_before_a_softcap():
    """muse_glimmer has both; its head runs here on states that are given."""
    batch = FoldedBatch.from_sequences([[1, 2, 3, 4]])
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    head = Mock(lm_head=lambda states: states @ weight.T)
    head.model.return_value.last_hidden_state = hidden[None]
    head.config.text_config = Mock(output_multiplier=3.0, final_logit_softcapping=2.0)
    logits = transformers.MuseGlimmerForConditionalGeneration.forward(head).logits
    want = logits[0].log_softmax(-1)[[0, 1, 2], [2, 3, 4]]
    got = losses.token_logprobs(hidden, batch, weight=weight, logit_scale=3.0, softcap=2.0)
    torch.testing.assert_close(got[1:], want)
