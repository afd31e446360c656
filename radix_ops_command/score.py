"""The arguments of `radix-ops score`."""

from __future__ import annotations

from .arguments import (
    FILE_HELP,
    MODEL_HELP,
    RESUME_HELP,
    add_command,
    add_flag,
    add_input_arguments,
    add_model_arguments,
    add_shape_arguments,
    positive_int,
    utf8_text,
)
from .schema_parts import BOOLEAN, COUNT, NUMBER, array, kind, line

HELP = f"""\
Scores each choice of each question: the log-probability of the choice's tokens behind the context, tokenised as
lm-evaluation-harness does; or whole texts. What sequences of a batch share at their start is computed once.

FILE holds one object a line, of one of these kinds. Other keys are copied to the output.
  {{"context": "Q: ...", "choices": [" yes", " no"]}}  what a model reads is context + choice, so a choice brings its
                                                     leading space along
  {{"question": "...", "choices": ["yes", "no"]}}      asked as "Question: ...\\nAnswer:", or by --letters
  {{"text": "..."}}                                    scored whole, behind BOS, or EOS where there is no BOS; a file of
                                                     text has one a line

The output holds one object a line in the input's order:
  line           the input line, counted from 1, then the input's other keys
  logprobs       the sum over each choice's tokens
  tokens         how many tokens each choice has
  greedy         whether each choice is what greedy decoding would write
  best           the choice with the largest sum (acc), counted from 0
  best_per_char  the same per character, leading white space not counted (acc_norm)
  key            a hash of input line, tokens, model, dtype and mode
and for a text, in place of what choices have:
  logprob        the sum over its tokens
  tokens         how many were scored, and its words and bytes
  perplexity     a token's

"gold" says which choice is right: its index from 0, its letter or its text; in the output it is the index. Where rows
have it, standard error ends with the accuracy by sum, per token and per character, each with its 95% Wilson score
interval; for texts, with the perplexities a token, word and byte. --metrics writes these, too.

  radix-ops score --model Qwen/Qwen3-0.6B --output scores.jsonl questions.jsonl
  radix-ops score --model Qwen/Qwen3-0.6B --letters --chat --metrics metrics.json exam.jsonl
  radix-ops score --model Qwen/Qwen3-0.6B --max-length 2048 --stride 2048 texts.txt

{RESUME_HELP}
It does not pay where nothing long is shared: one choice a line, contexts of a few tokens, contexts that all start
differently. `radix-ops inspect` says how much a file shares, --compare how much time that saves.

Rows of ARC, BoolQ, CommonsenseQA, HellaSwag, MMLU, MMLU-Pro, OpenBookQA, PIQA, SciQ and WinoGrande, as the hub has
them, are known by their keys. {{"context_ids": [...], "choices_ids": [[...], ...]}} are questions of token ids, and
{{"input_ids": [...]}} is a text whose first token is given; they need no tokenizer, and nothing of them is cut.

{FILE_HELP}
{MODEL_HELP}"""

_CHOICES = kind(
    {
        "logprobs": array(NUMBER, "the log-probability of each choice, summed over its tokens", minItems=1),
        "tokens": array(COUNT, "how many tokens each choice has"),
        "greedy": array(BOOLEAN, "whether each choice is what greedy decoding would write"),
        "best": COUNT | {"description": "the choice with the largest sum, counted from 0"},
    },
    {
        "best_per_char": COUNT
        | {"description": "the same per character, leading white space not counted; none where the choices are ids"},
        "gold": {"type": ["integer", "null"], "description": "the right choice, counted from 0"},
    },
)
_TEXT = kind(
    {
        "logprob": NUMBER | {"description": "the log-probability of the text, summed over its tokens"},
        "tokens": COUNT | {"description": "how many tokens were scored"},
        "perplexity": {"type": ["number", "null"], "description": "a token's; null where none was scored"},
    },
    {"words": COUNT, "bytes": COUNT},
)
SCHEMA = line("score", _CHOICES, _TEXT)


def add_parser(commands) -> None:
    command = add_command(
        commands,
        "score",
        "score multiple-choice questions, or whole texts, with a language model",
        HELP,
        "radix_ops.cli.score",
    )
    add_input_arguments(command, "the questions or texts")
    add_shape_arguments(command, "score")
    add_model_arguments(
        command, "file for the results, by its ending lines or a table (default: lines on standard output)"
    )
    add_flag(command, "--letters", help="questions that list their choices, answered by letter")
    add_flag(
        command,
        "--chat",
        help="contexts as the user's messages in the tokenizer's chat template, choices as the assistant's answers",
    )
    command.add_argument("--system", type=utf8_text, metavar="TEXT", help="system's message of each chat")
    command.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help="tokens that the model reads at a time at most (default: as the model and its tokenizer say)",
    )
    add_flag(command, "--truncate-left", help="a cut at the start of contexts that are too long")
    command.add_argument(
        "--stride",
        type=positive_int,
        metavar="N",
        help="windows for texts that are too long, each of which asks for N tokens more",
    )
    command.add_argument("--metrics", metavar="PATH.json", help="file for what all results say together")
    add_flag(
        command,
        "--calibration",
        help="table of the answers by the model's confidence, and how many of them are right",
    )
