"""The findings of `radix-ops inspect` about a data set, as one dictionary, and whether folding pays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...plan.budget import Limits
from ...plan.flops import ForwardCost
from ...plan.sharing import LEAST_SPEED_UP, Batches, Prefixes, Sharing

_SHOWN_PREFIXES = 8
_LEAST_SHOWN = 0.001  # a shown prefix saves this share of all tokens
_SHARERS = ((2, 4), (5, 16), (17, 64), (65, 256), (257, None))
ORDERS = ("given", "shuffled", "planned")


def summarise(
    sharing: Sharing,
    batch_sizes: list[int],
    limits: Limits,
    show: Callable[[int, int, int], str],
    sample: dict,
    cost: ForwardCost | None = None,
) -> dict:
    """Return all numbers of the report, and its verdict, which goes by batches within `limits`, those of a run.

    `show(sequence, start, stop)` is how tokens of a sequence are shown; `sample` is what `sharing_from_end` found.
    """
    lengths = sharing.lengths
    sizes = [*(size for size in batch_sizes if size < len(sharing)), max(1, len(sharing))]
    sized = [_sized(sharing, size, cost) for size in sizes]
    prefixes = sharing.prefixes()
    summary = {
        "sequences": len(sharing),
        "tokens": sharing.num_tokens,
        "lengths": {
            "min": int(lengths.min()),
            "median": float(np.median(lengths)),
            "p90": float(np.percentile(lengths, 90)),
            "max": int(lengths.max()),
        },
        "rows": sharing.num_rows,
        "tokens_per_row": sharing.tokens_per_row,
        "common_prefix": sharing.num_common,
        "duplicates": sharing.num_duplicates,
        "strict_prefixes": sharing.num_strict_prefixes,
        "empty": sharing.num_empty,
        "prefixes": _largest(sharing, prefixes, show),
        "saved_by_sharers": _by_sharers(prefixes),
        "batches": [*sized[:-1], _limited(sharing, limits, cost), sized[-1]],
        "sample": sample,
    }
    return summary | {"verdict": verdict(summary)}


def _ratio(tokens: float, rows: float) -> float:
    return tokens / rows if rows else 1.0


def _largest(sharing: Sharing, prefixes: Prefixes, show) -> list[dict]:
    """Return the prefixes that save most, each beyond the next shorter one; one at least, and no negligible ones."""
    saved = prefixes.num_saved
    largest = np.argsort(-saved, kind="stable")[:_SHOWN_PREFIXES]
    largest = largest[: max(1, int((saved[largest] >= _LEAST_SHOWN * sharing.num_tokens).sum()))]
    found = []
    for i in largest.tolist():
        start, stop = int(prefixes.start[i]), int(prefixes.stop[i])
        sequences, example = int(prefixes.num_sequences[i]), int(sharing.order[prefixes.first[i]])
        shown = {"sequences": sequences, "start": start, "stop": stop, "saved": int(saved[i])}
        found.append(shown | {"text": show(example, start, stop)})
    return found


def _by_sharers(prefixes: Prefixes) -> list[dict]:
    """Return the saved tokens by how many sequences share them."""
    sharers, saved = prefixes.num_sequences, prefixes.num_saved
    found = []
    for least, most in _SHARERS:
        inside = (sharers >= least) & (sharers <= (most or sharers.max(initial=0)))
        found.append({"least": least, "most": most, "prefixes": int(inside.sum()), "saved": int(saved[inside].sum())})
    return found


def _sized(sharing: Sharing, size: int, cost: ForwardCost | None) -> dict:
    """Return the counts of batches of so many sequences."""
    orders = sharing.given(), sharing.shuffled(), sharing.order
    made = [sharing.batches(order, max_sequences=size) for order in orders]
    return {"max_sequences": size} | _counted(sharing, made, sharing.padded(max_sequences=size), cost)


def _limited(sharing: Sharing, limits: Limits, cost: ForwardCost | None) -> dict:
    """Return the counts of batches within the limits of a run; the planned ones are the run's."""
    made = [sharing.batches(order, **limits) for order in (sharing.given(), sharing.shuffled())]
    padded = sharing.padded(max_positions=limits["max_rows"])
    return {"max_rows": limits["max_rows"]} | _counted(sharing, [*made, sharing.planned(**limits)], padded, cost)


def _counted(sharing: Sharing, made: list[Batches], padded: Batches, cost: ForwardCost | None) -> dict:
    """Return rows in each order and the speed-up over packed batches; positions of padded batches, and the speed-up of
    planned ones over them."""
    counted: dict = {}
    by_order, packed = dict(zip(ORDERS, made, strict=True)), sharing.packed()
    for name, batches in by_order.items():
        rows = batches.num_rows
        counted[name] = {"batches": len(batches), "rows": rows, "tokens_per_row": _ratio(sharing.num_tokens, rows)}
        counted[name]["speed_up"] = _speed_up(packed, batches, cost)
    counted["padded"] = {"batches": len(padded), "positions": padded.num_rows}
    counted["padded"]["speed_up"] = _speed_up(padded, by_order["planned"], cost)
    return counted


def _speed_up(before: Batches, after: Batches, cost: ForwardCost | None) -> float:
    """Return the ratio of FLOPs or, where no model was named, of rows; only `after` is folded."""
    if cost is None:
        return _ratio(before.num_rows, after.num_rows)
    num_keys = after.num_keys if cost.folds_attention else after.num_padded_keys
    return _ratio(cost.of(before.num_rows, before.num_keys), cost.of(after.num_rows, num_keys))


def verdict(summary: dict) -> dict:
    """Return whether folding pays, and why, in sentences."""
    batches = next(batches for batches in summary["batches"] if "max_rows" in batches)
    planned = batches["planned"]["speed_up"]
    pays = planned >= LEAST_SPEED_UP
    sentences = _gains(summary, batches) if pays else [_why_not(summary)]
    sample = summary["sample"]
    if sample["from_end"] > 1.2 * sample["from_start"]:
        sentences.append(
            f"Read from their ends, the first {sample['sequences']:,} sequences would have {sample['from_end']:.2f} "
            f"times fewer rows than tokens, and from their starts {sample['from_start']:.2f} times: what they have in "
            "common stands behind what differs. Only equal starts are computed once, so put the common part first "
            "where the task allows it."
        )
    return {"pays": pays, "text": sentences}


def _gains(summary: dict, batches: dict) -> list[str]:
    given, shuffled, planned = (batches[order] for order in ORDERS)
    sentences = [
        f"It pays: planned batches of at most {batches['max_rows']:,} rows compute {planned['rows']:,} rows for "
        f"{summary['tokens']:,} tokens, at most {planned['speed_up']:.2f} times faster than packed batches and "
        f"{batches['padded']['speed_up']:.2f} times faster than batches padded by length."
    ]
    if given["speed_up"] < 0.95 * planned["speed_up"]:
        sentences.append(
            f"In the order given it is at most {given['speed_up']:.2f} times: put sequences that share a prefix into "
            "one batch. The planner does (radix_ops.plan, and so the other commands)."
        )
    if shuffled["speed_up"] < 0.95 * planned["speed_up"]:
        sentences.append(
            f"Shuffled one by one it is {shuffled['speed_up']:.2f}: a data loader has to shuffle groups, or batches of "
            "a plan, and not sequences."
        )
    return sentences


def _why_not(summary: dict) -> str:
    whole, common, median = summary["tokens_per_row"], summary["common_prefix"], summary["lengths"]["median"]
    if not summary["tokens"]:
        return "It does not pay: there are no tokens."
    if summary["sequences"] == 1:
        return "It does not pay: a single sequence has none to share with."
    if whole >= LEAST_SPEED_UP:
        return (
            f"It does not pay in batches of this size: one trie of all sequences would have {whole:.2f} times fewer "
            "rows than tokens, but what they share is lost between batches, or small beside attention."
        )
    most = f"even one trie of all sequences would have only {whole:.2f} times fewer rows than tokens"
    if common:
        return (
            f"It does not pay: {most}. All start with the same {_tokens(common)}, which is short beside the "
            f"{_tokens(round(median))} that a sequence has (median)."
        )
    return f"It does not pay: {most}, since sequences start differently."


def _tokens(count: int) -> str:
    return f"{count:,} token{'s' * (count != 1)}"
