"""One run of a command that computes results: resumed where it was stopped, or compared with a plain one."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from radix_ops_command.errors import printable

from ..data.claim import checked_output
from ..data.fingerprint import fingerprint
from ..data.records import Records
from ..data.result_formats import MATRIX, TREC, format_of
from ..data.results import key_of_parts
from ..engine._engine import Engine
from ..engine.batches import OnBatch, RunStats
from ..engine.errors import UserError
from ..engine.items import Collector, Items
from ..engine.loading import find_device
from ..plan.sharing import LEAST_SPEED_UP, Sharing
from .compare import Comparison, compare_runs
from .finished import Memory
from .progress import progress_bar, say
from .reading import encode, files_read, say_what_is_bad
from .writing import Results, check_records, finds_ranges, results_of

Numbers = list[np.ndarray]  # an item's: an array of each kind


@contextlib.contextmanager
def prepared(args: argparse.Namespace, *kinds: str) -> Iterator[dict]:
    """Hold --output for this run, and give the arguments of every engine; `kinds` are formats that --output may have
    beside those of every command."""
    args.memory = memory = Memory(args)
    with (
        contextlib.closing(memory),
        checked_output(
            args.output,
            *files_read(args),
            kinds=kinds,
            has_ranges=finds_ranges(args),
            overwrite=args.overwrite,
            times_runs=args.compare,
        ),
    ):
        if args.on_error == "record":
            _check_takes_errors(args, kinds)
        device = find_device(args.device)
        if args.threads:
            torch.set_num_threads(args.threads)
        yield {
            "device": device,
            "dtype": args.dtype,
            "token_budget": args.token_budget,
            "plain": args.plain,
            "trust_remote_code": args.trust_remote_code,
            "lazy": True,
        }
        memory.keep()


def _check_takes_errors(args: argparse.Namespace, kinds: tuple[str, ...]) -> None:
    is_matrix_or_run = args.output is not None and format_of(args.output, *kinds).kind in (MATRIX, TREC)
    if args.compare or is_matrix_or_run:
        refusing = "--compare" if args.compare else f"--output {args.output}"
        raise UserError(f"{refusing} has no place for errors of rows; --on-error skip leaves such rows out")


@dataclass
class Job:
    """The run of all records of a file through an engine."""

    args: argparse.Namespace
    engine: Engine
    records: Records
    task: str  # part of each result's key
    done: str  # to {count} items, for the summary
    comparison: Comparison
    on_result: Callable[[dict], object] | None = None  # called with each result that is written
    items: Items = field(init=False)
    folded: bool = field(init=False)  # how results are computed; a comparison runs plain and folded
    base: object = field(init=False)  # the hash that keys start from

    def __post_init__(self) -> None:
        check_records(self)

    def run(self) -> None:
        """Tokenise all input, load the model, then compute what is missing, or compare."""
        engine = self.engine
        self.items = encode(self.records, engine.encode)
        self.folded = not self.args.plain and self._may_pay()
        engine.load()
        engine.check(self.items, self.folded)
        self.base = fingerprint(engine.runner, self.task, "folded" if self.folded else "plain", *engine.identity)
        if self.args.compare:
            compare_runs(self)
        else:
            self._run_remaining()
        say_what_is_bad(self.records)

    def _may_pay(self) -> bool:
        """Return whether folding may pay, and say so where it can't. The input alone decides: results' keys hold the
        mode, and the same command must take it again."""
        sharing = Sharing(self.items.store, self.items.lengths)
        if not sharing.num_tokens or sharing.tokens_per_row >= LEAST_SPEED_UP:
            return True
        found = f"{sharing.tokens_per_row:.2f} tokens a row: folding can't pay here"
        outcome = "" if self.args.compare else ", so batches run plain"
        say(f"{found}{outcome}; `radix-ops inspect` says more")
        return False

    @property
    def dim(self) -> int:
        """Return how many numbers an Embedder's embeddings have."""
        engine: Any = self.engine
        return engine.dim

    def fields_of(self, item: int, numbers: Numbers) -> dict:
        if item in self.records.refused:
            return {"error": self.records.refused[item]}
        return self.engine.result(self.records[item], self.items[item], *numbers)

    def key_of(self, item: int) -> str:
        return key_of(self.base, self.records, self.items, item)

    def _run_remaining(self) -> None:
        results = self.results()
        remaining = remaining_of(self.args, results)
        if len(remaining):
            chosen = self.items.subset(remaining)
            collector = Collector(chosen.ends)

            def write(complete: Iterator[tuple[int, Numbers]]) -> None:
                if found := [(int(remaining[item]), numbers) for item, numbers in complete]:
                    results.write(found)

            def on_batch(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
                write(collector.add(indices, found))

            write(collector.empty())
            stats = self._execute(chosen, on_batch)
            say(summary(self.done.format(count=len(remaining)), stats))
        self.finish(results)

    def finish(self, results: Results) -> None:
        """Put the results into their place, and say where that is."""
        results.finish()
        if self.args.output and not results.is_finished:
            say(f"wrote {len(self.items):,} results to {printable(self.args.output)}")
        if self.args.output:
            self.args.memory.results_are_there(len(self.items))

    def _execute(self, items: Items, on_batch: OnBatch) -> RunStats:
        lengths = items.lengths
        with progress_bar(int(lengths.sum()), "folded" if self.folded else "plain", " tokens") as bar:

            def report(indices: np.ndarray, found: tuple[np.ndarray, ...]) -> None:
                on_batch(indices, found)
                bar.update(int(lengths[indices].sum()))

            return self.engine.execute(items, report, folded=self.folded)

    def results(self) -> Results:
        """Open what the results go to."""
        return results_of(self)


def key_of(base, records: Records, items: Items, item: int) -> str:
    """Return the key of an item's result."""
    if item in records.refused:
        return key_of_parts(base, records.raw(item), b"refused")
    return key_of_parts(base, records.raw(item), *(ids.tobytes() for ids in items.tokens(item)))


def remaining_of(args: argparse.Namespace, results) -> np.ndarray:
    """Return the items that are not done yet, and say how many are. From here on the command continues its run."""
    args.continues = True
    remaining = np.flatnonzero(~results.done)
    if len(remaining) < len(results.done):
        held = len(results.done) - len(remaining)
        say(f"{printable(args.output)} holds {held:,} of {len(results.done):,} results already")
    return remaining


def summary(verb: str, stats: RunStats) -> str:
    if not stats.tokens:
        return f"{verb} nothing: no sequences"
    return (
        f"{verb} {stats.tokens:,} tokens as {stats.rows:,} rows in {stats.seconds:.1f} s "
        f"({stats.tokens / stats.seconds:,.0f} tokens a second)"
    )
