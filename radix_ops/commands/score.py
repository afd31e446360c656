"""`radix-ops score`: multiple-choice questions scored with shared prefixes computed once."""

from __future__ import annotations

import argparse
import functools
import sys

import numpy as np
import torch

from .. import scoring
from ..items import Collector
from ..loading import context_length, load_config, load_runner, load_tokenizer
from ..records import Records
from ..results import ResultFile, ResultStream, fingerprint, key_of_parts
from . import running
from .common import add_command, check_output, read_records

HELP = f"""\
Scores each choice of each line: the log-probability of the choice's tokens behind the context, tokenised as
lm-evaluation-harness does. What sequences of a batch share at their start is computed once.

FILE holds one JSON object a line: {{"context": "Q: ...", "choices": [" yes", " no"]}}. Other keys are copied to the
output. The text that a model reads is context + choice, so a choice brings its leading space along.

The output holds one object a line in the input's order:
  line           the input line, counted from 1, then the input's other keys
  logprobs       the sum over each choice's tokens
  tokens         how many tokens each choice has
  greedy         whether each choice is what greedy decoding would write
  best           the choice with the largest sum (acc), counted from 0
  best_per_char  the same per character, leading white space not counted (acc_norm)
  key            a hash of input line, tokens, model, dtype and mode

  radix-ops score --model Qwen/Qwen3-0.6B --output scores.jsonl questions.jsonl

{running.RESUME_HELP}
It does not pay where nothing long is shared: one choice a line, contexts of a few tokens, contexts that all start
differently. `radix-ops inspect` says how much a file shares, --compare how much time that saves.

{running.MODEL_HELP}"""


def run(args: argparse.Namespace) -> None:
    check_output(args.output, args.file)
    device = running.find_device(args.device)
    running.check_compare(args)
    records = read_records(args.file, scoring.parse_item, scoring.SHAPE)
    if args.threads:
        torch.set_num_threads(args.threads)
    config, tokenizer = load_config(args.model), load_tokenizer(args.model)
    lines = running.with_progress(records, "tokenising")
    choices = scoring.encode(lines, tokenizer, context_length(config, tokenizer), args.truncate_left)
    runner = load_runner(args.model, config, "AutoModelForCausalLM", args.dtype, device)
    running.check_runner(args, runner, choices)
    base = fingerprint(runner, "score", "plain" if args.plain else "folded")
    key_of = functools.partial(_key_of, base, records, choices)
    if args.compare:
        _compare(args, runner, records, choices, key_of)
    else:
        _score_remaining(args, runner, records, choices, key_of)


def _key_of(base, records: Records, choices: scoring.Choices, item: int) -> str:
    return key_of_parts(base, records.raw(item), *(ids.tobytes() for pair in choices[item] for ids in pair))


def _results_of(args, records, key_of) -> ResultFile | ResultStream:
    if args.output:
        return ResultFile(args.output, len(records), key_of, args.overwrite)
    return ResultStream(len(records), key_of)


def _result(records: Records, choices: scoring.Choices, item: int, logprobs: np.ndarray, greedy: np.ndarray) -> dict:
    num_tokens = [len(choice) for _, choice in choices[item]]
    return scoring.result(records[item], num_tokens, logprobs, greedy)


def _score_remaining(args, runner, records, choices, key_of) -> None:
    results = _results_of(args, records, key_of)
    remaining = np.flatnonzero(~results.done)
    if len(remaining) < len(records):
        held = len(records) - len(remaining)
        print(f"{args.output} holds {held:,} of {len(records):,} results already", file=sys.stderr)
    if len(remaining):
        chosen = choices.subset(remaining)
        collector = Collector(chosen.ends, logprobs=np.float64, greedy=bool)

        def on_batch(indices, found) -> None:
            for index in collector.add(indices, logprobs=found[0], greedy=found[1]):
                item = int(remaining[index])
                results.add(item, _result(records, choices, item, *collector.of(index)))
            results.flush()

        stats, _ = _run(args, runner, chosen, not args.plain, on_batch)
        print(running.summary("scored", stats), file=sys.stderr)
    results.finish()


def _compare(args, runner, records, choices, key_of) -> None:
    plain, plain_scores = _run(args, runner, choices, False, warm_up=True)
    folded, scores = _run(args, runner, choices, True, warm_up=True)
    results = _results_of(args, records, key_of) if args.output else None
    agree, largest = 0, 0.0
    for item in range(len(records)):
        found = [_result(records, choices, item, *of.of(item)) for of in (plain_scores, scores)]
        agree += found[0]["best"] == found[1]["best"]
        largest = max(largest, np.abs(np.subtract(*(fields["logprobs"] for fields in found))).max())
        if results:
            results.add(item, found[1])
    if results:
        results.finish()
    print(running.comparison_table(plain, folded))
    print(f"\nanswers that agree: {agree:,} of {len(records):,}")
    print(f"largest difference of a choice's log-probability: {largest:.1e}")


def _run(args, runner, choices, folded: bool, on_batch=None, warm_up: bool = False):
    """(RunStats, Collector of all scores, which is filled where nothing else takes them)."""
    collector = Collector(choices.ends, logprobs=np.float64, greedy=bool)

    def collect(indices, found) -> None:
        collector.add(indices, logprobs=found[0], greedy=found[1])

    budget = running.budget_of(args, runner, choices)
    with running.reporting(choices, folded, on_batch or collect) as report:
        return scoring.score(runner, choices, budget, folded, report, warm_up), collector


def add_parser(commands) -> None:
    command = add_command(commands, "score", "score multiple-choice questions with a language model", HELP, run)
    command.add_argument("file", metavar="FILE", help="the questions, JSONL")
    running.add_model_arguments(command, "where the results go (default: standard output)")
    command.add_argument(
        "--truncate-left", action="store_true", help="cut contexts that are too long for the model from their start"
    )
