"""docs/models.md, made of the proofs of tools/prove_models.py."""

from __future__ import annotations

from typing import Any

_COUNTS = {"any": "distances", "tokens": "the first token", "columns": "the first column"}
_KINDS = {"full_attention": "full", "sliding_attention": "sliding", "chunked_attention": "chunked"}
_HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")


def page(content: dict[str, Any]) -> str:
    proven, refused = content["proven"], content["refused"]
    newest = content["transformers"]
    tried = ", ".join([newest, *content["older"]])
    lines = [
        "# Supported models",
        "",
        f"Written by `make models` with transformers {newest} and torch {content['torch']}.",
        "`radix_ops.hf.enable` folds these types of transformers models, in the configs that were run and with the",
        "heads that were compared, and refuses all others with the reason. `tools/prove_models.py` compares.",
        "",
        f"## Proven: {len(proven)}",
        "",
        "- Layers: attention is full, or sliding, where a token sees a window of those before it, or chunked, where it",
        "  sees its own chunk of the sequence; a batch longer than a chunk runs as before.",
        "- Positions: a token's value depends on its distances from other tokens alone, and left padding does not",
        "  matter; or on its place, counted from the row's first token or, padding included, from its first column.",
        "  Counted from the first column, left-padded rows share nothing with rows of another length.",
        "- Packing: transformers tells several sequences in a row apart by their `position_ids`.",
        "- Heads besides the base model: LM (a causal language model's), sequence, token and question classifiers.",
        f"- From: the oldest version of transformers that it holds for, of those tried: {tried}.",
        "",
        "| type | class | layers | positions | packing | heads | from |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_row(name, proof) for name, proof in proven.items()]
    lines += ["", f"## Refused: {len(refused)}", "", "| type | reason |", "|---|---|"]
    lines += [f"| {name} | {reason.replace('|', '/')} |" for name, reason in refused.items()]
    return "\n".join(lines) + "\n"


def _row(name: str, proof: dict[str, Any]) -> str:
    kinds = {_KINDS.get(kind, kind) for kind in proof["layer_types"]} or {"full"}
    if "a number" in proof["values"].get("sliding_window", ()):
        kinds.add("sliding")
    heads = [
        word
        for word, end in zip(("LM", "sequence", "token", "question"), _HEADS, strict=True)
        if any(_is(head, end) for head in proof["heads"])
    ]
    cells = [name, proof["stack"], ", ".join(sorted(kinds)), _COUNTS[proof["positions"]]]
    cells += ["yes" if proof["packing"] else "no", ", ".join(heads) or "none", proof["since"]]
    return f"| {' | '.join(cells)} |"


def _is(head: str, end: str) -> bool:
    return head.endswith(end) or (end == "ForCausalLM" and not any(head.endswith(other) for other in _HEADS[1:]))
