"""Tiny language models and tokenizers of every task, and the scores of one sequence by itself.

Importing it skips a module where transformers is missing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from radix_ops.engine import scoring

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = [
    "The following are questions about rivers and the sea. Answer with one of the choices.",
    "Question: Which river flows through Paris? Answer: the Seine, not the river Rhine (or the Thames).",
    "Question: Is the sea saltier than the river? Answer: yes, no, maybe.",
]


def needs_hf():
    return pytest.importorskip("radix_ops.hf", exc_type=ImportError)


def tiny_model(kind: str = "Llama", **changes):
    """Return a two-layer model with random weights, spread enough that choices differ clearly."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 340,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def tiny_classifier(kind: str = "Qwen3", num_labels: int = 3, **changes):
    """Return a two-layer model with a classification head of so many labels, named a, b and so on."""
    config = tiny_model(kind, max_position_embeddings=256).config
    config.id2label = {index: "abcdefgh"[index] for index in range(num_labels)}
    config.label2id = {label: index for index, label in config.id2label.items()}
    config.pad_token_id = 1
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(1)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


def tiny_tokenizer(adds_bos: bool):
    """Return a byte-level BPE tokenizer of a few merges; <s> is id 0 and </s> id 1."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(alphabet), show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    if adds_bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def embedding_tokenizer():
    """Return one that puts </s> behind a text, as Qwen3-Embedding's puts <|endoftext|>; it is the padding, too."""
    tokenizer = tiny_tokenizer(adds_bos=False)
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", pair="$A $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.pad_token = "</s>"
    return tokenizer


def reranking_tokenizer(adds_bos=False):
    """Return one with Qwen's pattern of words and markers, and with yes and no as one token each."""
    tokenizer = tiny_tokenizer(adds_bos)
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    pre = tokenizers.pre_tokenizers
    tokenizer.backend_tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Split(tokenizers.Regex(split), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>", "yes", "no"])
    tokenizer.pad_token = "</s>"
    return tokenizer


class Sequence(NamedTuple):
    """One choice behind its context, as token ids."""

    item: int
    context: np.ndarray
    continuation: np.ndarray

    @property
    def inputs(self) -> np.ndarray:
        return np.concatenate([self.context, self.continuation[:-1]])


def sequences_of(choices: scoring.Choices) -> list[Sequence]:
    return [Sequence(item, *pair) for item in range(len(choices)) for pair in choices[item]]


def oracle(model, sequence: Sequence) -> tuple[float, bool]:
    """Run one plain forward of one unpadded sequence, with all its logits and log-softmax in float64."""
    ids = torch.from_numpy(np.concatenate([sequence.context, sequence.continuation]).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    first = len(sequence.context)
    logprobs = logits.log_softmax(-1)[first - 1 : -1]
    picked = logprobs[torch.arange(len(ids) - first), ids[first:]]
    return picked.sum().item(), bool((logprobs.argmax(-1) == ids[first:]).all())


def checked_scores(results, questions, model, tokenizer):
    """Yield each result, whose numbers equal the oracle's, with the other keys of its question."""
    for given, found in zip(questions, results, strict=True):
        item = scoring.Item("", given["context"], given["choices"], {})
        sequences = sequences_of(scoring.encode([item], tokenizer))
        expected = [oracle(model, s) for s in sequences]
        assert found["logprobs"] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
        assert found["greedy"] == [greedy for _, greedy in expected]
        assert found["tokens"] == [len(s.continuation) for s in sequences]
        assert found["best"] == max(range(len(expected)), key=lambda i: expected[i][0])
        extra = {k: v for k, v in given.items() if k not in ("context", "choices")}
        yield found, extra
