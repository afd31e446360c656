"""`radix-ops score`: multiple-choice questions scored with shared prefixes computed once."""

from __future__ import annotations

import argparse
import functools

import numpy as np
import torch

from ..data.fingerprint import fingerprint
from ..data.records import Records
from ..data.results import key_of_parts
from ..engine import scoring
from ..engine.loading import context_length, load_config, load_runner, load_tokenizer
from . import job
from .arguments import FILE_HELP, add_command, check_output, read_records

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

{job.RESUME_HELP}
It does not pay where nothing long is shared: one choice a line, contexts of a few tokens, contexts that all start
differently. `radix-ops inspect` says how much a file shares, --compare how much time that saves.

{FILE_HELP}
{job.MODEL_HELP}"""


def run(args: argparse.Namespace) -> None:
    check_output(args.output, args.file)
    device = job.find_device(args.device)
    with job.claimed_output(args):
        _run(args, device)


def _run(args: argparse.Namespace, device: torch.device) -> None:
    records = read_records(args.file, scoring.parse_item, scoring.SHAPE)
    if args.threads:
        torch.set_num_threads(args.threads)
    trust = args.trust_remote_code
    config = load_config(args.model, trust_remote_code=trust)
    tokenizer = load_tokenizer(args.model, trust_remote_code=trust)
    lines = job.with_progress(records, "tokenising")
    choices = scoring.encode(lines, tokenizer, context_length(config, tokenizer), args.truncate_left)
    runner = load_runner(args.model, config, "AutoModelForCausalLM", args.dtype, device, trust)
    job.check_runner(args, runner, choices)
    base = fingerprint(runner, "score", "plain" if args.plain else "folded")

    key_of = functools.partial(_key_of, base, records, choices)

    def fields_of(item: int, logprobs: np.ndarray, greedy: np.ndarray) -> dict:
        return scoring.result(records[item], [len(choice) for _, choice in choices[item]], logprobs, greedy)

    execute = functools.partial(scoring.score, runner)
    dtypes = {"logprobs": np.float64, "greedy": bool}
    task = job.ItemJob(args, runner, choices, records, key_of, execute, dtypes, fields_of, "scored")
    if args.compare:
        task.compare("best", "answers", "choice's log-probability", "logprobs")
    else:
        task.run_remaining()


def _key_of(base, records: Records, choices: scoring.Choices, item: int) -> str:
    return key_of_parts(base, records.raw(item), *(ids.tobytes() for pair in choices[item] for ids in pair))


def add_parser(commands) -> None:
    command = add_command(commands, "score", "score multiple-choice questions with a language model", HELP, run)
    command.add_argument("file", metavar="FILE", help="the questions, JSONL")
    job.add_model_arguments(command, "where the results go (default: standard output)")
    command.add_argument(
        "--truncate-left", action="store_true", help="cut contexts that are too long for the model from their start"
    )
