"""Saved folders of sentence-transformers whose tokenizer has a chat template, and the models that they hold."""

from __future__ import annotations

import json

import sentence_transformers as library
from packaging.version import Version
from tokenizers import AddedToken

from helpers.sentence_models import VERSION, Normalize, Pooling, Transformer, save, tokenizer

if Version("6.2") <= VERSION:
    from sentence_transformers.cross_encoder.modules import LogitScore

FLAT = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' <e> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> yes ' + (mark or 'no') }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}<s> {{ m['role'] }} {% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %} <e> {% endfor %}"
)
# The document comes before the query.
SWAPPED = (
    "{% for m in messages if m.role == 'document' %}{{ m.content }} {% endfor %}<s> "
    "{% for m in messages if m.role in ('query', 'system') %}{{ m.content }} {% endfor %}yes"
)


def with_template(folder, template, padding_side="right"):
    """Save a tokenizer in the folder that has the template and knows roles and digits as words."""
    words = tokenizer(padding_side, chat_template=template)
    known = ["user", "system", "query", "document", *"01234"]
    words.add_tokens([AddedToken(word, single_word=True) for word in known])
    words.save_pretrained(folder)
    return str(folder)


def settings(folder):
    return json.loads((folder / "sentence_bert_config.json").read_text())


def encoder(tmp_path, template=FLAT, pooling="mean", kind="Qwen3", max_length=120, processing=None, **options):
    """Return a saved folder with the modality "message", and its SentenceTransformer."""
    base = with_template(save(tmp_path / "base", kind, vocab_size=100), template)
    modules = [Transformer(base, processing_kwargs=processing), Pooling(32, pooling), Normalize()]
    made = library.SentenceTransformer(modules=modules, device="cpu", **options)
    made.max_seq_length = max_length
    made.save_pretrained(str(tmp_path / "st"))
    assert "message" in settings(tmp_path / "st")["modality_config"]
    return tmp_path / "st", library.SentenceTransformer(str(tmp_path / "st"), device="cpu")


def cross_encoder(tmp_path, template=FLAT, kind="Qwen3", **options):
    """Return a saved folder, and its CrossEncoder."""
    base = save(tmp_path / "base", kind, "ForSequenceClassification", vocab_size=100)
    with_template(base, template) if template else None
    made = library.CrossEncoder(base, device="cpu", **options)
    made.save_pretrained(str(tmp_path / "st"))
    assert ("message" in settings(tmp_path / "st")["modality_config"]) == bool(template)
    return tmp_path / "st", library.CrossEncoder(str(tmp_path / "st"), device="cpu")


def answering(tmp_path, template=FLAT, false=5, processing=None, **options):
    """Return a saved folder of a language model that answers, and its CrossEncoder."""
    base = save(tmp_path / "base", head="ForCausalLM", vocab_size=100)
    with_template(base, template) if template else None
    modules = [Transformer(base, transformer_task="text-generation", processing_kwargs=processing)]
    made = library.CrossEncoder(modules=[*modules, LogitScore(4, false)], device="cpu", **options)
    made.save_pretrained(str(tmp_path / "st"))
    return tmp_path / "st", library.CrossEncoder(str(tmp_path / "st"), device="cpu")
