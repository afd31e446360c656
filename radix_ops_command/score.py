"""The arguments of `radix-ops score`."""

from __future__ import annotations

from .arguments import FILE_HELP, MODEL_HELP, RESUME_HELP, add_command, add_model_arguments

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

{RESUME_HELP}
It does not pay where nothing long is shared: one choice a line, contexts of a few tokens, contexts that all start
differently. `radix-ops inspect` says how much a file shares, --compare how much time that saves.

{FILE_HELP}
{MODEL_HELP}"""


def add_parser(commands) -> None:
    command = add_command(
        commands, "score", "score multiple-choice questions with a language model", HELP, "radix_ops.cli.score"
    )
    command.add_argument("file", metavar="FILE", help="the questions, JSONL")
    add_model_arguments(command, "file for the results (default: standard output)")
    command.add_argument(
        "--truncate-left", action="store_true", help="a cut at the start of contexts that are too long"
    )
