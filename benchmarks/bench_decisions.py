"""Decisions in bfloat16: how many answers of real questions change with the way that a batch is computed.

Rounding depends on the sizes of products and on the order of sums, so that plain runs in other batches, with other
padding, differ among themselves, too. Every way scores the same questions by the same weights of transformers' model
(`radix_ops.engine.Scorer`): plain in padded batches, in smaller ones, and one sequence at a time; folded in the layouts
compact and trie. An answer is the choice of the largest log-probability, of its sum or per character. "margin" is how
far plain had its answer by sum above the next, at most, where another way gives another one. "from float32" counts the
answers that differ from those of the plain model in float32, whose weights are the same before rounding. "difference"
is that of log-probabilities from plain's, "error" that from float32's.

By default it takes the demo's model and questions; `examples/mmlu_demo.py --every 1 --questions FILE` makes more.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch

import demo
import harness
from radix_ops.data.records import Records
from radix_ops.engine import Scorer
from radix_ops.engine.errors import UserError
from radix_ops.engine.inputs import Record
from radix_ops.engine.scoring import parse_item

SMALLER = {"cpu": 1024, "cuda": 8192}  # rows of a batch
BEST = {"sum": "best", "per character": "best_per_char"}


def ways(device: str) -> dict[str, dict[str, Any]]:
    """Return Scorer's arguments by the name of each way."""
    return {
        "plain": {"plain": True},
        "plain, smaller batches": {"plain": True, "token_budget": SMALLER[device]},
        "plain, one at a time": {"plain": True, "token_budget": 1},
        "compact": {"layout": "compact"},
        "trie": {"layout": "trie"},
    }


def margin(result: dict) -> float:
    """Return how far the answer's log-probability lies above the next."""
    first, second = sorted(result["logprobs"])[-1:-3:-1]
    return first - second


def compare(found: list[dict], plain: list[dict], exact: list[dict]) -> dict[str, Any]:
    """Count the answers that differ from plain's and from the exact ones, and the right ones where these are known."""
    row: dict[str, Any] = {}
    for name, key in BEST.items():
        row[f"differ, {name}"] = sum(a[key] != b[key] for a, b in zip(found, plain, strict=True))
    changed = [b for a, b in zip(found, plain, strict=True) if a["best"] != b["best"]]
    row["margin"] = max(map(margin, changed), default=None)
    for name, key in BEST.items():
        row[f"from float32, {name}"] = sum(a[key] != b[key] for a, b in zip(found, exact, strict=True))
    for name, others in (("difference", plain), ("error", exact)):
        pairs = zip(found, others, strict=True)
        differences = np.concatenate([np.abs(np.subtract(a["logprobs"], b["logprobs"])) for a, b in pairs])
        row |= {f"mean {name}": float(differences.mean()), f"largest {name}": float(differences.max())}
    return row | {f"right, {name}": right(found, key) for name, key in BEST.items()}


def right(found: list[dict], key: str) -> int | None:
    """Count the right answers, None where none is known."""
    known = [result for result in found if "gold" in result]
    return sum(result[key] == result["gold"] for result in known) if known else None


def question(record: Record) -> dict:
    """Return the fields of a question, whose result has answers. UserError for another item."""
    parse_item(record)
    return record.fields


def main() -> None:
    parser = harness.make_parser(__doc__, threads=2, rounds=None, devices=harness.DEVICES)
    demo.add_options(parser)
    parser.add_argument("--name", help="of the saved file, behind decisions_ (default: the device)")
    args = harness.parse(parser)
    source = demo.find_model(args)
    questions = list(Records(args.questions, question))
    model, tokenizer = demo.load(source, "float32")
    model.to(args.device)

    def score(**options) -> tuple[list[dict], int]:
        scorer = Scorer(model, tokenizer, **options)
        return scorer.score(questions), scorer.runner.rows

    exact, _ = score(plain=True)
    model.to(torch.bfloat16)
    rows, plain = [], None
    for name, options in ways(args.device).items():
        found, computed = score(**options)
        plain = plain or found
        row = {"way": name, "questions": len(found), "rows": computed}
        rows.append(row | compare(found, plain, exact))
        print(rows[-1], flush=True)
    in_float32 = {f"right in float32, {name}": right(exact, key) for name, key in BEST.items()}
    harness.report(f"decisions_{args.name or args.device}", rows, args.save, in_float32)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"bench_decisions: {error}")
