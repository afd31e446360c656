"""The picture of `radix-ops inspect`: tokens over rows by batch size and order, and the trie as an icicle."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ...engine.errors import UserError, needs
from ...plan.sharing import Prefixes, Sharing
from .summary import ORDERS

_SUFFIXES = (".png", ".svg", ".pdf")
_MAX_COLUMNS, _MAX_DEPTHS = 1200, 600  # of the icicle
_MAX_PARTED = 300  # sequences, beyond which no lines part them
_COLORS = {"given": "#4477aa", "shuffled": "#bbbbbb", "planned": "#cc3311"}
_LABELS = {"given": "as given", "shuffled": "shuffled", "planned": "planned"}
_ALONE = "#d9dde2"


def check_plot_path(path: str, *data: str) -> None:
    """UserError unless a picture can go to `path`, none of the data's files, and matplotlib is there to draw it."""
    if Path(path).suffix.lower() not in _SUFFIXES:
        raise UserError(f"--plot {path} must end in {', '.join(_SUFFIXES)}")
    if not Path(path).absolute().parent.is_dir():
        raise UserError(f"--plot {path}: its folder does not exist")
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"--plot {path} is not a regular file")
    if os.path.exists(path) and any(os.path.samefile(path, name) for name in filter(os.path.exists, data)):
        raise UserError(f"--plot {path} is the input file itself")
    needs("matplotlib", "plot", "--plot")


def plot(sharing: Sharing, summary: dict, path: str) -> None:
    """Draw to `path`, with no display; what stood there is replaced."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.7])
    figure.suptitle(
        f"{Path(summary['file']).name}: {summary['sequences']:,} sequences, {summary['tokens']:,} tokens, "
        f"{summary['rows']:,} trie rows, {summary['tokens_per_row']:.2f} times fewer"
    )
    _draw_ratios(left, summary)
    _draw_trie(figure, right, sharing)
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {path} can't be written: {error.strerror or error}") from error


def _draw_ratios(axes, summary: dict) -> None:
    """Draw lines over batches of so many sequences, and on the right end the batches of the verdict."""
    sized = [batches for batches in summary["batches"] if "max_sequences" in batches]
    budget = next(batches for batches in summary["batches"] if "max_rows" in batches)
    ticks = [f"{batches['max_sequences']:,}" for batches in sized[:-1]] + ["all", f"{budget['max_rows']:,}\nrows"]
    for order in ORDERS:
        ratios = [batches[order]["tokens_per_row"] for batches in sized]
        # A thick line shows below the planner's where both are the same.
        style = {"color": _COLORS[order]} | ({"linewidth": 4, "markersize": 10} if order == "given" else {})
        axes.plot(range(len(ratios)), ratios, marker="o", label=_LABELS[order], **style)
        axes.plot([len(ratios)], [budget[order]["tokens_per_row"]], marker="D", **style)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_xlabel("a batch has at most so many sequences, or rows")
    axes.set_ylabel("tokens / rows")
    axes.set_ylim(bottom=min(0.9, axes.get_ylim()[0]))
    axes.legend(title="order", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_trie(figure, axes, sharing: Sharing) -> None:
    from matplotlib.colors import ListedColormap, LogNorm
    from matplotlib.ticker import MaxNLocator

    depth, note = _shown_depth(sharing)
    image = _icicle(sharing, sharing.prefixes(), depth)
    shared = np.ma.masked_where(image < 2, image)
    alone = np.ma.masked_where(image != 1, image)
    extent = (0, len(sharing), depth, 0)
    options = {"extent": extent, "aspect": "auto", "interpolation": "nearest"}
    axes.imshow(alone, cmap=ListedColormap([_ALONE]), **options)
    most = max(4, int(image.max(initial=0)))
    drawn = axes.imshow(shared, cmap="viridis_r", norm=LogNorm(2, most), **options)
    bar = figure.colorbar(drawn, ax=axes, label="sequences that share a row (grey: one alone)", pad=0.01)
    doublings = np.arange(1, most.bit_length(), 1 + most.bit_length() // 9)
    bar.set_ticks(2**doublings, labels=[f"{2**i:,}" for i in doublings.tolist()])
    bar.minorticks_off()
    if len(sharing) <= _MAX_PARTED:
        # Between neighbours, from where they part.
        lengths = sharing.lengths[sharing.order]
        ends = np.maximum(lengths[1:], lengths[:-1])
        axes.vlines(np.arange(1, len(sharing)), sharing.shared[1:], ends, color="white", linewidth=0.6)
        axes.set_ylim(depth, 0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("sequences, sorted by their tokens")
    axes.set_ylabel("token position" + note)
    axes.set_title("the trie of all sequences", fontsize="medium")


def _shown_depth(sharing: Sharing) -> tuple[int, str]:
    """Return how many positions are drawn: all, but for a few sequences that are far longer."""
    longest, most = int(sharing.lengths.max(initial=0)), int(np.percentile(sharing.lengths, 99))
    if longest <= 1.5 * most or most == 0:
        return max(1, longest), ""
    return most, f" (the longest 1% go on to {longest:,})"


def _icicle(sharing: Sharing, prefixes: Prefixes, depth: int) -> np.ndarray:
    """Return how many sequences share the row of a position of a sequence, 0 behind its end: [positions, sequences],
    sampled evenly where there are more than can be seen."""
    sequences = _samples(len(sharing), _MAX_COLUMNS)
    positions = _samples(depth, _MAX_DEPTHS)
    lengths = sharing.lengths[sharing.order[sequences]]
    image = (positions[:, None] < lengths).astype(np.int64)
    left, right = np.searchsorted(sequences, prefixes.first), np.searchsorted(sequences, prefixes.last, "right")
    top, bottom = np.searchsorted(positions, prefixes.start), np.searchsorted(positions, prefixes.stop)
    # Prefixes overlap nowhere, so what is painted is bounded by the picture's size.
    seen = np.flatnonzero((left < right) & (top < bottom))
    sharers = prefixes.num_sequences
    for i in seen.tolist():
        image[top[i] : bottom[i], left[i] : right[i]] = sharers[i]
    return image


def _samples(count: int, most: int) -> np.ndarray:
    """Return up to `most` of 0 to count - 1, evenly spaced."""
    size = min(count, most)
    return (np.arange(size) * 2 + 1) * count // (2 * max(1, size))
