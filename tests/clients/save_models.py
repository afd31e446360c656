"""Saves a small model of each task, and what sentence-transformers and transformers compute of it.

    python save_models.py FOLDER

runs in the package's own environment, and writes FOLDER/{embed,rerank,classify,score} and FOLDER/expected.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from sentence_transformers import CrossEncoder, SentenceTransformer

from helpers import sentence_models
from helpers.language_models import tiny_classifier, tiny_model, tiny_tokenizer

TEXTS = sentence_models.texts(10)
PROMPTS = {"query": "w1 w2 ", "document": ""}
SCORED = ["Which river flows through Paris? The Seine.", "Is the sea saltier than the river?"]


def main(folder: Path) -> None:
    made = sentence_models.encoder(
        sentence_models.save(folder / "base"), "lasttoken", sentence_models.Normalize(), prompts=PROMPTS
    )
    made.save_pretrained(str(folder / "embed"))
    encoder = SentenceTransformer(str(folder / "embed"), device="cpu")
    sentence_models.save(folder / "rerank", head="ForSequenceClassification")
    ranker = CrossEncoder(str(folder / "rerank"), device="cpu")
    tokenizer = tiny_tokenizer(True)
    tokenizer.pad_token = "</s>"
    for name, model in (("classify", tiny_classifier()), ("score", tiny_model(max_position_embeddings=256))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    labels = transformers.pipeline("text-classification", str(folder / "classify"), device="cpu", top_k=None)
    scorer = transformers.AutoModelForCausalLM.from_pretrained(folder / "score")
    expected = {
        "texts": TEXTS,
        "prompts": PROMPTS,
        "embeddings": encoder.encode(TEXTS).tolist(),
        "query_embeddings": encoder.encode(TEXTS, prompt_name="query").tolist(),
        "ids": [encoder.tokenizer(text)["input_ids"] for text in TEXTS],
        "rank_scores": ranker.predict([(TEXTS[0], text) for text in TEXTS[1:]]).tolist(),
        "labels": [{entry["label"]: entry["score"] for entry in entries} for entries in labels(SCORED)],
        "scored": SCORED,
        "logprobs": [logprobs(scorer, tokenizer, text) for text in SCORED],
    }
    (folder / "expected.json").write_text(json.dumps(expected))


def logprobs(model, tokenizer, text: str) -> list[float]:
    """Return the log-probability of each token but the first, and of the likeliest next one."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        found = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return [*found[torch.arange(ids.shape[1] - 1), ids[0, 1:]].tolist(), found[-1].max().item()]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
