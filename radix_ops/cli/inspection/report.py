"""The report of `radix-ops inspect` in words and tables."""

from __future__ import annotations

import textwrap

from .summary import ORDERS

_WIDTH = 110  # of sentences
_BASELINES = "Packed batches have no padding, padded ones hold sequences of similar length. "
_BY_FLOPS = _BASELINES + "Speed-ups compare FLOPs; moving data and launching kernels is not counted."
_BY_ROWS = _BASELINES + "Speed-ups compare rows; attention and overheads take some, and --model counts attention."


def to_text(summary: dict) -> str:
    """Return the summary in words: what the data is and shares, rows by batch and order, and the verdict."""
    parts = [_facts(summary), _prefixes_text(summary), _sharers_text(summary), _batches_text(summary)]
    return "\n\n".join([*filter(None, parts), "\n".join(map(_wrapped, summary["verdict"]["text"]))])


def _facts(summary: dict) -> str:
    lengths, rows = summary["lengths"], summary["rows"]
    ratio = summary["tokens_per_row"]
    facts = [
        ("sequences", summary["sequences"], ""),
        (
            "tokens",
            summary["tokens"],
            f"a sequence has {lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,.0f}, 90% at most "
            f"{lengths['p90']:,.0f}",
        ),
        ("rows of one trie", rows, f"{ratio:.2f} times fewer: the most that sharing could save, in one batch of all"),
        ("common to all", summary["common_prefix"], "tokens that every sequence starts with"),
        ("duplicates", summary["duplicates"], "sequences equal to another, which need no rows of their own"),
        ("strict prefixes", summary["strict_prefixes"], "sequences that another goes on from, which need none either"),
        ("empty", summary["empty"], "sequences of no tokens"),
    ]
    shown = [fact for fact in facts if fact[1] or fact[0] in ("sequences", "tokens", "rows of one trie")]
    width = max(len(f"{value:,}") for _, value, _ in shown)
    return "\n".join(f"{name:<18}{value:>{width},}  {note}".rstrip() for name, value, note in shown)


def _prefixes_text(summary: dict) -> str:
    if not summary["prefixes"]:
        return "No two sequences share their first token."
    lines = [
        "The shared prefixes that save most, each counted beyond the next shorter one that is shared:",
        f"{'sequences':>9}  {'their tokens':>15}  {'saved':>{_saved_width(summary)}}",
    ]
    for prefix in summary["prefixes"]:
        span = _span(prefix["start"] + 1, prefix["stop"])
        lines.append(f"{prefix['sequences']:>9,}  {span:>15}  {_saved(summary, prefix)}  {prefix['text']}")
    return "\n".join(lines)


def _sharers_text(summary: dict) -> str:
    if not summary["prefixes"]:
        return ""
    lines = [
        "Saved tokens by how many sequences share them, so how many have to meet in a batch:",
        f"{'shared by':>15}  {'prefixes':>9}  {'saved':>{_saved_width(summary)}}",
    ]
    for group in summary["saved_by_sharers"]:
        if group["prefixes"]:
            span = _span(group["least"], group["most"]) if group["most"] else f"{group['least']:,} or more"
            lines.append(f"{span:>15}  {group['prefixes']:>9,}  {_saved(summary, group)}")
    return "\n".join(lines)


def _saved(summary: dict, part: dict) -> str:
    """Return the tokens that a part of the prefixes saves, and their share of all tokens."""
    share = f"({part['saved'] / summary['tokens']:.1%})"
    return f"{part['saved']:>{_saved_width(summary) - 8},}{share:>8}"


def _saved_width(summary: dict) -> int:
    return len(f"{summary['tokens'] - summary['rows']:,}") + 8


def _batches_text(summary: dict) -> str:
    width = max(10, len(f"{summary['tokens']:,}") + 1)
    cell = width + 8
    lines = [
        "Rows of all batches (and tokens / rows) by their size and order; speed-up of the planned ones, at most:",
        f"{'a batch has':<20}{'as given':>{cell}}{'shuffled':>{cell}}{'planned':>{cell}}{'over':>10}{'over':>10}",
        f"{'at most':<20}{'':>{cell}}{'':>{cell}}{'':>{cell}}{'packed':>10}{'padded':>10}",
    ]
    for batches in summary["batches"]:
        line = f"{_limit_text(batches, summary['sequences']):<20}"
        for counted in (batches[order] for order in ORDERS):
            ratio = f"({counted['tokens_per_row']:.2f})"
            line += f"{counted['rows']:>{width},}{ratio:>8}"
        # One padded batch of everything is nobody's choice.
        is_all = batches.get("max_sequences", 0) >= summary["sequences"]
        over_padded = "" if is_all else f"{batches['padded']['speed_up']:.2f}"
        lines.append(f"{line}{batches['planned']['speed_up']:>10.2f}{over_padded:>10}".rstrip())
    lines.append(_wrapped(_BY_FLOPS if summary["model"] else _BY_ROWS))
    return "\n".join(lines)


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, _WIDTH)


def _limit_text(batches: dict, sequences: int) -> str:
    if "max_rows" in batches:
        return f"{batches['max_rows']:,} rows"
    size = batches["max_sequences"]
    return "all sequences" if size >= sequences else f"{size:,} sequence{'s' * (size != 1)}"
