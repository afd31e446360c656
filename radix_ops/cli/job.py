"""What the subcommands that run a model share: its arguments, the device, checks, progress, and the comparison."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ..data.matrix import check_incomplete, is_matrix
from ..data.output import beside, claimed
from ..data.records import Records
from ..data.results import ResultFile, ResultStream, check_first_line, check_part
from ..engine.errors import UserError
from ..engine.items import Collector, Items
from ..engine.loading import context_length
from ..engine.runners import RunStats
from ..plan.budget import Budget, find_budget
from .arguments import add_trust_argument, positive_int, printable, progress_bar, thread_count

MODEL_HELP = """\
Qwen3 models (safetensors) run on radix_ops.models.qwen3, others on transformers through radix_ops.hf.enable, which
refuses by name what it isn't known to be right for. Without --dtype the model computes in float32 on the CPU and in
its own dtype on CUDA, where one of float32 computes in bfloat16.
"""
RESUME_HELP = """\
An interrupted run leaves complete lines in --output, in the order in which they were finished. The same command
then continues behind them: a torn last line is dropped, and a line whose key is not that of this input, model,
dtype and mode (folded or --plain) is an error. The finished file is put into the input's order, by way of
--output.part. One run at a time can write to an --output, which it holds by --output.lock.
"""


def add_model_arguments(parser: argparse.ArgumentParser, results: str) -> None:
    """The arguments of every command that runs a model; `results` says what goes to --output."""
    parser.add_argument("--model", required=True, metavar="M", help="a local folder, a hub id or a .gguf file")
    parser.add_argument("--output", metavar="PATH", help=results)
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--plain", action="store_true", help="don't fold: batches sorted by length")
    mode.add_argument(
        "--compare",
        action="store_true",
        help="run plain and folded and print both times; results (the folded run's) go to --output only",
    )
    parser.add_argument(
        "--token-budget",
        type=positive_int,
        metavar="N",
        help="rows of a batch at most, that is tokens that are computed; a batch may unfold 8 times as many, and a "
        "longer sequence is a batch of its own (default: found from the free memory, at most 4,096 on the CPU and "
        "65,536 on CUDA)",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of weights and computation (default: see above)"
    )
    parser.add_argument("--device", help="as torch names it (default: cuda where there is one, else cpu)")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's)")
    add_trust_argument(parser)


def add_length_arguments(parser: argparse.ArgumentParser, what: str, cut: str) -> None:
    parser.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help=f"tokens of a {what} at most, special tokens included (default: as the model and its tokenizer say)",
    )
    parser.add_argument("--truncate-right", action="store_true", help=f"cut {cut} at their end where that is too long")


def max_length_of(args: argparse.Namespace, config, tokenizer, recommended: int | None = None) -> int | None:
    """--max-length, or the least of what the model reads and what its tokenizer, or `recommended`, says."""
    longest = context_length(config, tokenizer)
    if args.max_length and longest and args.max_length > longest:
        raise UserError(f"--max-length {args.max_length} is more than the model reads, {longest}")
    limit = min(recommended or tokenizer.model_max_length, longest or 2**31 - 1)
    return args.max_length or (int(limit) if limit < 2**31 - 1 else None)


def find_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r} can't be used: it must be cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name!r} can't be used: torch finds {torch.cuda.device_count()} CUDA devices")
    return device


@contextlib.contextmanager
def claimed_output(args: argparse.Namespace, may_be_matrix: bool = False) -> Iterator[None]:
    """Holds --output for this process alone.

    UserError where another one holds it, where it can't hold such results, or where it holds what, as far as is known
    before a run, no run left.
    """
    if args.output is not None and is_matrix(args.output) and not may_be_matrix:
        raise UserError(f"--output {args.output}: results are JSON lines, and a .npy file holds a matrix")
    with claimed(args.output):
        if args.output is not None:
            _check_existing(args)
        yield


def _check_existing(args: argparse.Namespace) -> None:
    if not is_matrix(args.output):
        check_part(args.output)
    if args.overwrite:
        return
    held = [path for path in (args.output, beside(args.output, ".rows")) if os.path.exists(path)]
    if args.compare and held:
        raise UserError(f"--output {held[0]} exists and --compare times whole runs; --overwrite replaces it")
    if is_matrix(args.output):
        check_incomplete(args.output)
    elif os.path.isfile(args.output):
        check_first_line(args.output)


def check_runner(args: argparse.Namespace, runner, items: Items) -> None:
    """UserError unless the model has the items' tokens, and can be run as the command wants it to."""
    largest = int(items.store.input_ids.max())
    if largest >= runner.vocab_size:
        raise UserError(
            f"the tokenizer yields token {largest} and the model embeds {runner.vocab_size}: they don't fit together"
        )
    runner.check(items.store[0], folded=not args.plain)


def budget_of(args: argparse.Namespace, runner, items: Items) -> Budget:
    if args.token_budget:
        return Budget(args.token_budget)
    dtype = next(runner.model.parameters()).dtype
    longest = int(items.lengths.max())
    return find_budget(runner.hf_config, dtype, runner.device, longest, runner.own_attention)


def with_progress(lines, desc: str) -> Iterator:
    """The lines, with a progress bar where they take long."""
    with progress_bar(len(lines), desc, " lines", delay=2) as bar:
        for line in lines:
            yield line
            bar.update()


@contextlib.contextmanager
def reporting(items: Items, folded: bool, on_batch=None) -> Iterator:
    """An `on_batch` that moves a progress bar of tokens, too."""
    lengths = items.lengths
    with progress_bar(int(lengths.sum()), "folded" if folded else "plain", " tokens") as bar:

        def report(indices: np.ndarray, result) -> None:
            if on_batch:
                on_batch(indices, result)
            bar.update(int(lengths[indices].sum()))

        yield report


@dataclass
class ItemJob:
    """A run of items whose results are JSON lines, made of the numbers that are found for an item's sequences.

    `execute(items, budget, folded, on_batch, warm_up)` runs items and gives `on_batch(indices, arrays)` one array for
    each of `dtypes`; `fields_of(item, *arrays)` makes the line of an item of them.
    """

    args: argparse.Namespace
    runner: object
    items: Items
    records: Records
    key_of: Callable[[int], str]
    execute: Callable
    dtypes: dict[str, type]
    fields_of: Callable[..., dict]
    done: str  # to the items, for the summary

    def run_remaining(self) -> None:
        results = self._results()
        remaining = remaining_of(self.args, results)
        if len(remaining):
            chosen = self.items.subset(remaining)
            collector = Collector(chosen.ends, **self.dtypes)

            def on_batch(indices, found) -> None:
                for index in collector.add(indices, *found):
                    item = int(remaining[index])
                    results.add(item, self.fields_of(item, *collector.of(index)))
                results.flush()

            print(summary(self.done, self._run(chosen, not self.args.plain, on_batch)), file=sys.stderr)
        results.finish()

    def compare(self, choice: str, choices: str, number: str, numbers: str) -> None:
        """Runs all items plain and folded, and prints the table and how the results differ.

        `choice` and `numbers` are fields of a result, which the report calls `choices` and `number`.
        """
        found = {folded: Collector(self.items.ends, **self.dtypes) for folded in (False, True)}
        plain, folded = (
            self._run(self.items, folded, lambda indices, arrays, c=collector: c.add(indices, *arrays), warm_up=True)
            for folded, collector in found.items()
        )
        results = self._results() if self.args.output else None
        agree, largest = 0, 0.0
        for item in range(len(self.items)):
            one, other = (self.fields_of(item, *collector.of(item)) for collector in found.values())
            agree += one[choice] == other[choice]
            largest = max(largest, *np.abs(np.subtract(one[numbers], other[numbers])))
            if results:
                results.add(item, other)
        if results:
            results.finish()
        print(comparison_table(plain, folded), end="\n\n")
        print(f"{choices} that agree: {agree:,} of {len(self.items):,}")
        print(f"largest difference of a {number}: {largest:.1e}")

    def _run(self, items: Items, folded: bool, on_batch, warm_up: bool = False) -> RunStats:
        budget = budget_of(self.args, self.runner, items)
        with reporting(items, folded, on_batch) as report:
            return self.execute(items, budget, folded, report, warm_up)

    def _results(self) -> ResultFile | ResultStream:
        if self.args.output:
            return ResultFile(
                self.args.output, len(self.items), self.key_of, self.args.overwrite, self.records.index_of
            )
        return ResultStream(len(self.items), self.key_of)


def remaining_of(args: argparse.Namespace, results) -> np.ndarray:
    """The items that are not done yet; says how many are. From here on the command continues what it started."""
    args.continues = True
    remaining = np.flatnonzero(~results.done)
    if len(remaining) < len(results.done):
        held = len(results.done) - len(remaining)
        print(f"{printable(args.output)} holds {held:,} of {len(results.done):,} results already", file=sys.stderr)
    return remaining


def summary(verb: str, stats: RunStats) -> str:
    return (
        f"{verb} {stats.tokens:,} tokens as {stats.rows:,} rows in {stats.seconds:.1f} s "
        f"({stats.tokens / stats.seconds:,.0f} tokens a second)"
    )


def comparison_table(plain: RunStats, folded: RunStats) -> str:
    """The two runs side by side, then the speed-up and what share of tokens / rows it is."""
    speed_up, sharing = plain.seconds / folded.seconds, folded.tokens / folded.rows
    counts = {
        "tokens": (plain.tokens, folded.tokens),
        "rows computed": (plain.rows, folded.rows),
        "rows through the head": (plain.head_rows, folded.head_rows),
        "batches": (plain.batches, folded.batches),
    }
    lines = [f"{'':<22}{'plain':>10}{'folded':>10}"]
    lines += [f"{name:<22}{a:>10,}{b:>10,}" for name, (a, b) in counts.items() if a or b]
    lines += [
        f"{'seconds':<22}{plain.seconds:>10.2f}{folded.seconds:>10.2f}",
        f"{'tokens a second':<22}{plain.tokens / plain.seconds:>10,.0f}{folded.tokens / folded.seconds:>10,.0f}",
        "",
        f"padding of the plain run: {plain.rows / plain.tokens - 1:.1%} of its tokens",
        f"speed-up: {speed_up:.2f} times, {speed_up / sharing:.2f} of tokens / rows ({sharing:.2f})",
    ]
    return "\n".join(lines)
