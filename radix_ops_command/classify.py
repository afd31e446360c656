"""The arguments of `radix-ops classify`."""

from __future__ import annotations

import argparse

from .arguments import (
    FILE_HELP,
    MODEL_HELP,
    RESUME_HELP,
    add_command,
    add_input_arguments,
    add_length_arguments,
    add_model_arguments,
    add_shape_arguments,
    positive_int,
)
from .names import LABEL_PROMPTS, PROBLEMS
from .schema_parts import NUMBER, TEXT, array, kind, line

HELP = f"""\
Labels each line, by a model's classification head or by a prompt that a language model answers. What lines of a batch
share at their start, such as the prompt before a text, is computed once.

For a head, FILE holds one text a line, or JSON objects like {{"text": "..."}}, perhaps with a "text_pair". The scores
are the softmax of the logits; their sigmoids where the model's config says that several labels may hold at once, or
has one label; the logits themselves of a regression. A text that is too long is an error, unless --truncate-right.

For a language model, --template names a prompt ({", ".join(LABEL_PROMPTS)}) or a JSON or TOML file of one:
  {{"template": "Review: {{{{ text|trim }}}}\\nThe film was", "labels": {{"good": [" good", " great"], "bad": " bad"}}}}
template is Jinja, in a sandbox, that makes a text of the line's fields; a field that a line lacks is an error. labels
are the words that answer for each label: texts with the space that they start with, token ids or arrays of them. The
score of a label is the probability of its words behind the prompt against that of all labels' words ("score":
"probability" leaves out the others). The tokenizer puts BOS before a prompt, if it does so before texts. "chat": true
makes the prompt the user's message, perhaps behind a "system" message, which the tokenizer's chat template renders with
"chat_arguments"; without a template, that renders each line's "text" or "messages", as guards want it.

Other keys are copied to the output, which holds one object a line in the input's order:
  line       the input line, counted from 1, then the input's other keys
  labels     the labels by score, the best first
  scores     of these
  best       the first of them (not of a regression)
  predicted  the labels of at least --threshold, where several may hold at once
  key        a hash of input line, tokens, model, dtype, mode and labels

"gold", or else "label", says which label is right: its name, in any case, or its index from 0 as the model counts; an
array of them where several may hold at once; in the output "gold" is the name. -1 and null say nothing. Where lines
have it, standard error ends with the accuracy, its 95% Wilson score interval, and each label's precision, recall and F1
with their means over the labels (macro). --metrics writes these, too.

  radix-ops classify --model FOLDER_OR_HUB_ID --output labels.jsonl reviews.jsonl
  radix-ops classify --model Qwen/Qwen3Guard-Gen-0.6B --template qwen3guard --output safe.jsonl chats.jsonl

{RESUME_HELP}
It does not pay where lines start differently: texts without a prompt before them, or a short one.
`radix-ops inspect` says how much a file shares, --compare how much time that saves.

To a head, rows of GLUE, SNLI, MNLI and such as the hub has them are known by their keys: "sentence", or pairs under
"sentence1", "premise", "text_a", "text1", "question1" or "question" and the keys that go with these.

{FILE_HELP}
{MODEL_HELP}"""

_LABELLED = kind(
    {
        "labels": array(TEXT, "the labels by score, the best first", minItems=1),
        "scores": array(NUMBER, "of these", minItems=1),
    },
    {
        "best": TEXT | {"description": "the first of the labels; not of a regression"},
        "predicted": array(TEXT, "the labels of at least --threshold, where several may hold at once"),
        "gold": {"type": ["string", "array", "null"], "items": TEXT, "description": "the right label, or labels"},
    },
)
SCHEMA = line("classify", _LABELLED)


def add_parser(commands) -> None:
    command = add_command(
        commands, "classify", "label texts by a model's head or by a prompt", HELP, "radix_ops.cli.classify"
    )
    add_input_arguments(command, "the texts, or what the template reads")
    add_shape_arguments(command, "classify", "text=review,gold=stars")
    add_model_arguments(
        command, "file for the results, by its ending lines or a table (default: lines on standard output)"
    )
    command.add_argument(
        "--template",
        metavar="T",
        help=f"prompt for a language model: {' or '.join(LABEL_PROMPTS)}, or a JSON or TOML file, see above",
    )
    command.add_argument(
        "--problem-type", choices=PROBLEMS, help="problem that a head solves (default: as its config says)"
    )
    command.add_argument(
        "--top-k", type=positive_int, metavar="K", help="labels that are kept, the best K (default: all)"
    )
    command.add_argument(
        "--threshold",
        type=share,
        metavar="P",
        help="least score of a label that holds, where several may hold at once (default: 0.5)",
    )
    add_length_arguments(command, "text or a pair", "texts")
    command.add_argument("--metrics", metavar="PATH.json", help="file for what all results say together")


def share(text: str) -> float:
    """A type for arguments: a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return value
