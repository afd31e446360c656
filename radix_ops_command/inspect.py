"""The arguments of `radix-ops inspect`."""

from __future__ import annotations

from .arguments import (
    FILE_HELP,
    add_beir_arguments,
    add_command,
    add_flag,
    add_input_arguments,
    add_shape_arguments,
    add_trust_argument,
    positive_int,
    utf8_text,
)
from .names import LABEL_PROMPTS, READINGS, SEED, TEMPLATES
from .schema_parts import BOOLEAN, COUNT, NUMBER, TEXT, Schema, array, fields

BATCH_SIZES = (8, 32, 128, 512)
MAX_ROWS = 16_384

HELP = f"""\
Says how much the sequences of a file share, and what folding could save: the first thing to run before deciding. No
model runs, and no weights are read.

FILE holds one text a line (.txt), or one JSON object a line, of which the first line's keys tell the format:
  {{"text": ...}}                            texts; --text-key names another key, --prompt what stands before each
  {{"context": ..., "choices": [...]}}       questions as `radix-ops score` reads them
  {{"query": ..., "documents": [...]}}       queries as `radix-ops rerank` reads them
  {{"text": ..., "text_pair": ...}}          pairs as `radix-ops classify` reads them with a classification head
  {{"messages": [...]}}                      conversations, by the tokenizer's chat template
  {{"prompt": ..., "completion": ...}}       training data; strings, or arrays of messages
  {{"prompt": ..., "chosen": ..., "rejected": ...}}
  {{"input_ids": [...]}}                     token ids, which need no tokenizer
  {{"input_ids": [[...], ...]}}              the same of several prompts, as `radix-ops rerank` reads them
  {{"context_ids": [...], "choices_ids": [[...], ...]}}   the same of questions, as `radix-ops score` reads them
Queries are read as the folder of --model says, or in a --template. With a --template of `radix-ops classify`, lines
hold what that reads, and are counted with what must be read for its labels' words.
Rows of the hub and folders of BEIR that the other commands know are read as they read them. A .npz file of two arrays,
input_ids [N] end to end and cu_seqlens [B + 1], holds token ids, too.

{FILE_HELP}
  radix-ops inspect --tokenizer Qwen/Qwen3-0.6B --plot sharing.png questions.jsonl

Tokens that two sequences of a batch have in common at their starts are computed once, as one row. The report says
which prefixes are shared and how many sequences share them, then counts, exactly, the rows of batches of several sizes:
in the order given, shuffled one by one (seed {SEED}), and as the planner of the other commands puts them together, for
a transformers model or, where --model names a Qwen3, for that.

The speed-up is at most rows before over rows after. With --model, a model's name, it is that of FLOPs, read off its
config: a row costs 2 for each weight of the layers' products (of experts those that a token visits), and in each layer
2 * heads * (width of a query + width of a value) for each key that it attends to. "Packed" batches compute each token,
"padded" ones each position of batches sorted by length. The embedding, the output head, moving data and launching
kernels are not counted; `--compare` of the other commands measures the time.

--json prints the numbers as one JSON object. --plot draws tokens / rows by batch size and order, and the trie.
"""

_ORDER = fields(
    "batches in one order; the speed-up is over packed batches",
    {"batches": COUNT, "rows": COUNT, "tokens_per_row": NUMBER, "speed_up": NUMBER},
)
_BATCHES: Schema = {
    "type": "object",
    "description": "rows of batches of so many sequences, or within so many rows",
    "properties": {
        "max_sequences": COUNT,
        "max_rows": COUNT,
        "given": _ORDER,
        "shuffled": _ORDER,
        "planned": _ORDER,
        "padded": fields(
            "batches padded by length, and the speed-up of planned ones over them",
            {"batches": COUNT, "positions": COUNT, "speed_up": NUMBER},
        ),
    },
    "required": ["given", "shuffled", "planned", "padded"],
    "oneOf": [{"required": ["max_sequences"]}, {"required": ["max_rows"]}],
    "additionalProperties": False,
}
_PREFIX = fields(
    "tokens [start, stop) of a prefix, beyond the next shorter one that is shared",
    {"sequences": COUNT, "start": COUNT, "stop": COUNT, "saved": COUNT, "text": TEXT},
)
_SHARERS = fields(
    "what prefixes save that between least and most sequences share",
    {"least": COUNT, "most": {"type": ["integer", "null"]}, "prefixes": COUNT, "saved": COUNT},
)
SCHEMA = {"title": "the object of radix-ops inspect --json"} | fields(
    "how much a file shares",
    {
        "file": TEXT,
        "meaning": TEXT | {"description": "what the sequences are"},
        "model": {"type": ["string", "null"]},
        "sequences": COUNT,
        "tokens": COUNT,
        "lengths": fields("tokens of a sequence", {"min": COUNT, "median": NUMBER, "p90": NUMBER, "max": COUNT}),
        "rows": COUNT | {"description": "of one trie of all sequences"},
        "tokens_per_row": NUMBER,
        "common_prefix": COUNT | {"description": "tokens that all sequences start with"},
        "duplicates": COUNT,
        "strict_prefixes": COUNT | {"description": "sequences that others go on from"},
        "empty": COUNT,
        "prefixes": array(_PREFIX, "the prefixes that save most"),
        "saved_by_sharers": array(_SHARERS, "saved tokens by how many sequences share them"),
        "batches": array(_BATCHES, "rows of batches of several sizes"),
        "sample": fields(
            "tokens / rows of the first sequences, read from either end",
            {"sequences": COUNT, "from_start": NUMBER, "from_end": NUMBER},
        ),
        "verdict": fields("whether folding pays", {"pays": BOOLEAN, "text": array(TEXT, "why, in sentences")}),
    },
)


def _sizes(text: str) -> list[int]:
    return [positive_int(part.strip()) for part in text.split(",")]


def add_parser(commands) -> None:
    command = add_command(
        commands, "inspect", "how much a data set shares, and what folding could save", HELP, "radix_ops.cli.inspect"
    )
    add_input_arguments(command, "the data", writes_results=False)
    add_shape_arguments(command, "inspect")
    add_beir_arguments(command)
    command.add_argument(
        "--tokenizer", metavar="T", help="a local folder, a hub id or a .gguf file (default: that of --model)"
    )
    command.add_argument(
        "-m", "--model", metavar="M", help="model whose config gives speed-ups in FLOPs; no weights are read"
    )
    command.add_argument(
        "--text-key", type=utf8_text, default="text", metavar="KEY", help="key of the texts (default: %(default)s)"
    )
    command.add_argument(
        "--prompt",
        type=utf8_text,
        metavar="TEXT",
        help="text before each of the texts (default: that of --model's folder)",
    )
    command.add_argument(
        "--template",
        metavar="T",
        help=f"template for queries with documents: {' or '.join(TEMPLATES)}, a JSON file as for `radix-ops rerank`, "
        f"or {' or '.join(READINGS)} for a cross-encoder (default: as --model's folder says); or a prompt of "
        f"`radix-ops classify`: {' or '.join(LABEL_PROMPTS)}, or its file",
    )
    add_flag(command, "--letters", help="questions that list their choices, answered by letter")
    command.add_argument(
        "--batch-sizes",
        type=_sizes,
        default=list(BATCH_SIZES),
        metavar="N,N,...",
        help=f"sequences of a batch to count rows of (default: {','.join(map(str, BATCH_SIZES))})",
    )
    command.add_argument(
        "--token-budget",
        type=positive_int,
        default=MAX_ROWS,
        metavar="N",
        help="rows of a batch that the verdict goes by (default: %(default)s; the other commands take at most 4,096 on "
        "the CPU and 65,536 on CUDA)",
    )
    add_trust_argument(command)
    command.add_argument("--plot", metavar="FILE", help="file for a picture: .png, .svg or .pdf")
    add_flag(command, "--json", help="one JSON object in place of the report")
