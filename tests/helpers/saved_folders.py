"""Folders saved by the sentence-transformers that is installed, with what it computes of them itself.

    python saved_folders.py FOLDER

saves each case's folder in FOLDER and its numbers in FOLDER/expected.json, null for a case that this version can't
save. A test runs it as a process of its own and reads the folders with radix_ops alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POOLINGS = ("lasttoken", "mean", "weightedmean", "mean_sqrt_len_tokens", "max", "cls")
FLAGS = ("mean_tokens", "lasttoken", "max_tokens", "weightedmean_tokens")  # of folders that pool in several ways
TEMPLATES = ("none", "flat", "parts")
# Those of even and those of odd numbers start alike.
TEXTS = [" ".join(f"w{(7 * n + k * k) % 80 if k > 5 else k + n % 2}" for k in range(2 + 3 * n)) for n in range(9)]
PAIRS = [(f"w1 w2 w{n % 3}", text) for n, text in enumerate(TEXTS)]
PROMPT = "w3 w4 w5 "


@dataclass(frozen=True)
class Case:
    """A folder: of an encoder that pools, of a classification head, or of a language model that answers."""

    name: str
    kind: str  # encoder, head or answer
    template: str = "none"
    model: str = "Qwen3"
    pooling: Any = "mean"  # one, several in their order, or "flags"
    normalize: bool = True
    side: str = "right"
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)  # of the module
    max_length: int = 120
    refusal: str | None = None  # part of the message where radix_ops computes none of it


def _cases() -> list[Case]:
    prompts = {"prompts": {"q": PROMPT}, "default_prompt_name": "q"}
    cases = [
        Case(f"{pooling}-{template}-{side}", "encoder", template, pooling=pooling, side=side)
        for pooling in POOLINGS
        for template in TEMPLATES
        for side in ("right", "left")
    ]
    cases += [Case(f"{p}-unnormalised", "encoder", pooling=p, normalize=False) for p in POOLINGS]
    cases += [Case(f"{p}-prompt", "encoder", pooling=p, options=prompts) for p in POOLINGS]
    cases += [
        Case(
            f"{p}-behind-the-prompt", "encoder", pooling=p, options=prompts, changes={"include_prompt": False},
            refusal="sets include_prompt to false beside the pooling cls" if p == "cls" else None,
        )
        for p in POOLINGS
    ]  # fmt: skip
    cases += [
        Case("flags", "encoder", pooling="flags"),
        Case("flags-behind-the-prompt", "encoder", pooling="flags", options=prompts, changes={"include_prompt": False}),
        Case("several", "encoder", pooling=("max", "cls", "weightedmean")),
        Case("mean-llama", "encoder", "flat", "Llama"),
        Case("mean-cut", "encoder", "none", max_length=9),
        Case("lasttoken-cut", "encoder", "flat", max_length=9),
        Case("mean-short", "encoder", options={"truncate_dim": 8}),
    ]
    for template in TEMPLATES:
        cases += [
            Case(f"head-{template}", "head", template),
            Case(f"head-{template}-llama", "head", template, "Llama"),
            Case(f"head-{template}-logit", "head", template, options={"activation_fn": "identity"}),
            Case(f"answer-{template}", "answer", template),
            Case(f"answer-{template}-prompt", "answer", template, options=prompts),
        ]
    cases.append(Case("head-prompt", "head", options=prompts))
    cases.append(Case("head-of-three", "head", changes={"num_labels": 3}, refusal="of 3 labels; rerank needs one of 1"))
    return cases


CASES = _cases()


def _base(case: Case, parent: Path) -> str:
    """Return a folder of transformers' for the case, which others may share."""
    from helpers.sentence_folders import FLAT, PARTS, with_template
    from helpers.sentence_models import save

    head = {"encoder": "Model", "head": "ForSequenceClassification", "answer": "ForCausalLM"}[case.kind]
    changes = {name: value for name, value in case.changes.items() if name == "num_labels"}
    folder = parent / "-".join(["base", case.model, head, case.template, case.side, *changes])
    if folder.exists():
        return str(folder)
    save(folder, case.model, head, case.side, vocab_size=100, **changes)
    if case.template != "none":
        with_template(folder, {"flat": FLAT, "parts": PARTS}[case.template], case.side)
    return str(folder)


def _encoder(case: Case, base: str, folder: Path) -> list | None:
    import sentence_transformers

    from helpers.sentence_models import SIZE, VERSION, Normalize, Pooling, Transformer

    if VERSION.major < 6 and (isinstance(case.pooling, tuple) or "truncate_dim" in case.options):
        return None
    changes = dict(case.changes)
    if case.pooling == "flags":
        changes |= {f"pooling_mode_{flag}": True for flag in FLAGS}
    else:
        changes["pooling_mode"] = case.pooling
    modules = [Transformer(base), Pooling(SIZE, **changes)]
    modules += [Normalize()] if case.normalize else []
    made = sentence_transformers.SentenceTransformer(modules=modules, device="cpu", **case.options)
    made.max_seq_length = case.max_length
    made.save_pretrained(str(folder))
    if "truncate_dim" in case.options:
        path = folder / "config_sentence_transformers.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **case.options}))
    # One text at a time: up to version 5 a weighted mean counts the padding on the left.
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, batch_size=1).tolist()


def _cross_encoder(case: Case, base: str, folder: Path) -> list | None:
    import sentence_transformers
    import torch

    from helpers.sentence_models import VERSION, Transformer

    options = dict(case.options)
    if VERSION.major < 6 and (case.kind == "answer" or "prompts" in options):
        return None
    if options.get("activation_fn") == "identity":
        options["activation_fn"] = torch.nn.Identity()
    if case.kind == "head":
        made = sentence_transformers.CrossEncoder(base, device="cpu", **options)
    else:
        from sentence_transformers.cross_encoder.modules import LogitScore

        modules = [Transformer(base, transformer_task="text-generation"), LogitScore(4, 5)]
        made = sentence_transformers.CrossEncoder(modules=modules, device="cpu", **options)
    made.save_pretrained(str(folder))
    return sentence_transformers.CrossEncoder(str(folder), device="cpu").predict(PAIRS, batch_size=1).tolist()


def save_all(folder: Path) -> None:
    """Save all cases' folders and numbers."""
    import sentence_transformers

    found: dict[str, Any] = {}
    for case in CASES:
        base = _base(case, folder)
        found[case.name] = (_encoder if case.kind == "encoder" else _cross_encoder)(case, base, folder / case.name)
    written = {"version": sentence_transformers.__version__, "numbers": found}
    (folder / "expected.json").write_text(json.dumps(written))


if __name__ == "__main__":
    save_all(Path(sys.argv[1]))
