"""`radix-ops score`: multiple-choice questions scored with shared prefixes computed once."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from .. import scoring
from ..loading import context_length, load_config, load_tokenizer, load_weights
from ..results import Collector, ResultFile, ResultStream, result_keys
from ..scoring import RunStats, ScoreError
from .common import add_command, check_output, positive_int

SCORE_HELP = """\
Scores each choice of each line: the log-probability of the choice's tokens behind the context, tokenised as
lm-evaluation-harness does. What sequences of a batch share at their start is computed once.

FILE holds one JSON object a line: {"context": "Q: ...", "choices": [" yes", " no"]}. Other keys are copied to the
output. The text that a model reads is context + choice, so a choice brings its leading space along.

The output holds one object a line in the input's order:
  line           the input line, counted from 1, then the input's other keys
  logprobs       the sum over each choice's tokens
  tokens         how many tokens each choice has
  greedy         whether each choice is what greedy decoding would write
  best           the choice with the largest sum (acc), counted from 0
  best_per_char  the same per character, leading white space not counted (acc_norm)
  key            a hash of input line, tokens, model, dtype and mode

An interrupted run leaves complete lines in --output, in the order in which they were finished. The same command
then continues behind them: a torn last line is dropped, and a line whose key is not that of this input, model,
dtype and mode (folded or --plain) is an error. The finished file is put into the input's order.
"""


def score(args: argparse.Namespace) -> None:
    items = scoring.read_items(args.file)
    check_output(args.output, args.file)
    _check_device(args.device)
    if args.compare and args.output and os.path.exists(args.output) and not args.overwrite:
        raise ScoreError(f"--output {args.output} exists and --compare times whole runs; --overwrite replaces it")
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer, config = load_tokenizer(args.model), load_config(args.model)
    sequences = scoring.encode(items, tokenizer, context_length(config, tokenizer), args.truncate_left)
    dtype = args.dtype or ("float32" if torch.device(args.device).type == "cpu" else "auto")
    model = load_weights("AutoModelForCausalLM", args.model, dtype).to(args.device)
    scoring.check_model(model, sequences, folded=not args.plain)
    keys = result_keys(model, "plain" if args.plain else "folded", items, sequences)
    results = None
    if args.output:
        results = ResultFile(args.output, items, keys, args.overwrite)
    elif not args.compare:
        results = ResultStream()
    if args.compare:
        _compare(args, model, items, sequences, keys, results)
    else:
        _score_remaining(args, model, items, sequences, keys, results)


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ScoreError(f"--device {name!r} can't be used: it must be cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ScoreError(f"--device {name!r} can't be used: torch finds {torch.cuda.device_count()} CUDA devices")


def _score_remaining(args, model, items, sequences, keys, results) -> None:
    remaining = [s for s in sequences if s.item not in results.done]
    if results.done:
        print(f"{args.output} holds {len(results.done):,} of {len(items):,} results already", file=sys.stderr)
    if remaining:
        collector = Collector(items, remaining, keys, results)
        _, stats = _run(args, model, remaining, not args.plain, collector)
        print(
            f"scored {stats.tokens:,} tokens as {stats.rows:,} rows in {stats.seconds:.1f} s "
            f"({stats.tokens / stats.seconds:,.0f} tokens a second)",
            file=sys.stderr,
        )
    results.finish()


def _compare(args, model, items, sequences, keys, results) -> None:
    plain_scores, plain = _run(args, model, sequences, False, None, warm_up=True)
    scores, folded = _run(args, model, sequences, True, None, warm_up=True)
    for found in (plain_scores, scores):
        scoring.check_finite(items, sequences, found)
    if results:
        Collector(items, sequences, keys, results).add(range(len(sequences)), scores)
        results.finish()
    agree, difference = scoring.differences(items, plain_scores, scores)
    print(comparison_table(plain, folded))
    print(f"\nanswers that agree: {agree:,} of {len(items):,}")
    print(f"largest difference of a choice's log-probability: {difference:.1e}")


def _run(args, model, sequences, folded, collector, warm_up=False):
    from tqdm import tqdm

    total = sum(sequence.length for sequence in sequences)
    with tqdm(total=total, unit=" tokens", unit_scale=True, desc="folded" if folded else "plain") as bar:

        def on_batch(indices, scores):
            if collector:
                collector.add(indices, scores)
            bar.update(sum(sequences[i].length for i in indices))

        return scoring.run(model, sequences, args.token_budget, folded, on_batch, warm_up)


def comparison_table(plain: RunStats, folded: RunStats) -> str:
    """The two runs side by side, then the speed-up and what share of tokens / rows it is."""
    speed_up, sharing = plain.seconds / folded.seconds, folded.tokens / folded.rows
    lines = [
        f"{'':<22}{'plain':>10}{'folded':>10}",
        f"{'tokens':<22}{plain.tokens:>10,}{folded.tokens:>10,}",
        f"{'rows computed':<22}{plain.rows:>10,}{folded.rows:>10,}",
        f"{'rows through the head':<22}{plain.head_rows:>10,}{folded.head_rows:>10,}",
        f"{'batches':<22}{plain.batches:>10,}{folded.batches:>10,}",
        f"{'seconds':<22}{plain.seconds:>10.2f}{folded.seconds:>10.2f}",
        f"{'tokens a second':<22}{plain.tokens / plain.seconds:>10,.0f}{folded.tokens / folded.seconds:>10,.0f}",
        "",
        f"padding of the plain run: {plain.rows / plain.tokens - 1:.1%} of its tokens",
        f"speed-up: {speed_up:.2f} times, {speed_up / sharing:.2f} of tokens / rows ({sharing:.2f})",
    ]
    return "\n".join(lines)


def add_parser(commands) -> None:
    command = add_command(commands, "score", "score multiple-choice questions with a language model", SCORE_HELP, score)
    command.add_argument("file", metavar="FILE", help="the questions, JSONL")
    command.add_argument("--model", required=True, metavar="M", help="a local folder, a hub id or a .gguf file")
    command.add_argument("--output", metavar="PATH", help="where the results go (default: standard output)")
    command.add_argument("--overwrite", action="store_true", help="replace what --output holds")
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--plain", action="store_true", help="don't fold: padded batches sorted by length")
    mode.add_argument(
        "--compare",
        action="store_true",
        help="run plain and folded and print both times; results (the folded run's) go to --output only",
    )
    command.add_argument(
        "--token-budget",
        type=positive_int,
        default=scoring.TOKEN_BUDGET,
        metavar="N",
        help="packed tokens of a batch at most (default: %(default)s); a longer sequence is a batch of its own",
    )
    command.add_argument(
        "--truncate-left", action="store_true", help="cut contexts that are too long for the model from their start"
    )
    command.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and computation (default: float32 on the CPU, the model's own elsewhere)",
    )
    command.add_argument("--device", default="cpu", help="as torch names it (default: %(default)s)")
    command.add_argument("--threads", type=positive_int, metavar="N", help="CPU threads (default: torch's)")
