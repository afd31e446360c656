"""Tiny causal models in folders and texts that share prefixes, for tests of radix_ops.hf on sentence-transformers."""

from __future__ import annotations

import random
from pathlib import Path

import sentence_transformers
import torch
import transformers
from packaging.version import Version
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from radix_ops import hf

VERSION = Version(sentence_transformers.__version__)
if Version("5.4") <= VERSION:
    from sentence_transformers.base.modules import Dense, Router, Transformer
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, StaticEmbedding
    from sentence_transformers.sparse_encoder.modules import SparseAutoEncoder
else:
    from sentence_transformers import losses
    from sentence_transformers.models import Dense, Normalize, Pooling, Router, StaticEmbedding, Transformer
    from sentence_transformers.sparse_encoder.models import SparseAutoEncoder

__all__ = [
    "Dense", "Normalize", "Pooling", "Router", "SparseAutoEncoder", "StaticEmbedding", "Transformer", "enable",
    "encoder", "losses", "pairs", "save", "texts", "tokenizer",
]  # fmt: skip

SIZE = 32
WORDS = [f"w{number}" for number in range(80)]
SPECIAL = ["<pad>", "<s>", "<e>", "<unk>", "yes", "no"]
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + (m['content'] if m['content'] is string else "
    "m['content'] | map(attribute='text') | join(' ')) + ' <e> ' }}{% endfor %}"
)


def tokenizer(padding_side: str = "right", **options):
    """Return a tokenizer of words that ends each text with a token, both texts of a pair too."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="$A <e>", pair="$A <e> $B <e>", special_tokens=[("<e>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<e>", unk_token="<unk>", padding_side=padding_side,
        **{"model_max_length": 120, "model_input_names": ["input_ids", "attention_mask"], **options},
    )  # fmt: skip


def save(path: Path, kind: str = "Qwen3", head: str = "Model", padding_side: str = "right", **changes) -> str:
    """Save a transformers model of random weights and its tokenizer in a folder, and return its path."""
    sizes = {
        "vocab_size": 90, "hidden_size": SIZE, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128,
        "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **changes})
    getattr(transformers, kind + head)(config).save_pretrained(path)
    tokenizer(padding_side).save_pretrained(path)
    return str(path)


def encoder(path: str, pooling: str = "lasttoken", *behind, **options):
    """Return a SentenceTransformer of the folder's model."""
    modules = [Transformer(path), Pooling(SIZE, pooling), *behind]
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **options)


def texts(count: int = 40, seed: int = 0) -> list[str]:
    """Return shuffled texts of three groups that start alike, and strangers, all of different lengths."""
    chosen = random.Random(seed)
    heads = [" ".join(chosen.choices(WORDS, k=length)) for length in (25, 17, 12)] + [""]
    return [f"{chosen.choice(heads)} {' '.join(chosen.choices(WORDS, k=chosen.randint(1, 9)))}" for _ in range(count)]


def pairs(count: int = 40) -> list[tuple[str, str]]:
    """Return three queries, each with documents of its own, shuffled."""
    documents = texts(count, seed=1)
    return [(texts(3, seed=2)[index % 3], document) for index, document in enumerate(documents)]


def enable(model, **options):
    """Enable a model so that all batches fold, sharing or not."""
    return hf.enable(model, **{"threshold": 1.0, "verify": "always", **options})
