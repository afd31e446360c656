"""Arguments that subcommands share, and their types."""

from __future__ import annotations

import argparse
from typing import Any

from .names import KINDS, LONGEST_LINE, LONGEST_TEXT, SHAPES

FILE_HELP = f"""\
FILE is JSONL, a JSON array, text, CSV, TSV, Parquet, Arrow or a .npz of token ids, plain, gzip or zstd, as its name and
its first bytes say, or --format. "-" is standard input. Several files, and folders of them, are read as one; each
result says then which "file" its line or row is of. Cells of CSV and TSV are texts; arrays stand in them as JSON. Blank
lines are no rows, and lines are counted with them. A row has {LONGEST_LINE:,} bytes at most, and a text in it
{LONGEST_TEXT:,}.
"""
MODEL_HELP = """\
Qwen3 models (safetensors) run on radix_ops.models.qwen3, others on transformers through radix_ops.hf.enable, which
refuses by name what it isn't known to be right for. Without --dtype the model computes in float32 on the CPU and in
its own dtype on CUDA, where one of float32 computes in bfloat16.
"""
RESUME_HELP = """\
The ending of --output decides its format: .jsonl or .ndjson, .csv or .tsv (nested values as JSON), .parquet (lists as
lists); those of text may end in .gz or .zst behind that. An interrupted run leaves complete lines in --output, in the
order in which they were finished; those of a format other than plain .jsonl stand in --output.lines until it is made of
them. The same command then continues behind them: a torn last line is dropped, and a line whose key is not that of this
input, model, dtype and mode (folded or --plain) is an error. So is one that was changed, which a checksum at the end of
its key tells until the file is finished. The finished file is put into the input's order, by way of --output.part. One
run at a time can write to an --output, which it holds by --output.lock. A finished job that is asked for again answers
without a model, by a note in ~/.cache/radix_ops that any change of its files makes void.
"""
MOST_THREADS = 1024
_UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}


def add_command(commands, name: str, summary: str, description: str, run: str) -> argparse.ArgumentParser:
    """Add a parser for the subcommand, whose description keeps its line breaks; `run` names the module of run(args).

    Commands of `radix_ops.cli`, which take their time, can be quiet and read options from a file.
    """
    parser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.set_defaults(run=run)
    if run.startswith("radix_ops."):
        add_flag(parser, "-q", "--quiet", help="no progress, summary or measures on standard error")
        parser.add_argument(
            "--config",
            metavar="TOML",
            help="file of options as keys, like token-budget = 4096; those of one command may stand under its name, "
            f"like [{name}]",
        )
    return parser


def add_input_arguments(parser: argparse.ArgumentParser, what: str, writes_results: bool = True) -> None:
    """Add FILE and how it is read; `what` says what it holds."""
    parser.add_argument("files", metavar="FILE", nargs="+", help=f"{what}: files, folders of them, or - (see above)")
    parser.add_argument(
        "--format",
        choices=KINDS,
        help="format of each FILE; text is one text a line (default: what its name and its first bytes say)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip", "record") if writes_results else ("stop", "skip"),
        default="stop",
        help="what becomes of rows that can't be used: all are listed and nothing runs (stop, the default), they are "
        "left out and listed at the end (skip)" + (', or their results hold an "error" (record)' * writes_results),
    )
    parser.add_argument(
        "--drop", type=names, default=[], metavar="NAME,...", help="columns, or keys, that are not read"
    )
    parser.add_argument(
        "--delimiter", type=one_character, metavar="C", help="character between cells of CSV (default: a comma)"
    )
    parser.add_argument(
        "--header", type=names, metavar="NAME,...", help="columns of a CSV or TSV that has no line with their names"
    )


def add_column_argument(parser: argparse.ArgumentParser, example: str) -> None:
    """Add what says where keys stand in a row; `example` is a value of it."""
    parser.add_argument(
        "--column",
        type=columns,
        action="append",
        default=[],
        metavar="KEY=COLUMN,...",
        help=f"column that stands for a key, as in {example}; dots go into objects, and over those of an array",
    )


def add_shape_arguments(
    parser: argparse.ArgumentParser, command: str, example: str = "query=question,documents=passages.text"
) -> None:
    """Add what says how a row is read; `command` is one that knows rows of the hub, `example` a value of --column."""
    add_column_argument(parser, example)
    parser.add_argument(
        "--shape",
        choices=SHAPES[command],
        metavar="NAME",
        help="shape of all rows, where their keys fit to several (default: what the keys of each say)",
    )


def add_beir_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says which part of a BEIR folder is read."""
    parser.add_argument(
        "--split", metavar="NAME", help="judgements of a BEIR folder, qrels/NAME.tsv (default: test, or the only ones)"
    )
    parser.add_argument(
        "--candidates",
        metavar="RUN",
        help="run file in TREC format that names the documents of each query of a BEIR folder (default: the whole "
        "corpus, where it is small)",
    )


def columns(text: str) -> dict[str, str]:
    """A type for arguments: columns by the keys that they stand for."""
    found: dict[str, str] = {}
    for part in utf8_text(text).split(","):
        key, _, path = (piece.strip() for piece in part.partition("="))
        if not key or not all(path.split(".")) or key in found:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be KEY=COLUMN with commas between them, as in query=question,documents=passages.text, "
                "each key once"
            )
        found[key] = path
    return found


def add_flag(parser: argparse.ArgumentParser, *names: str, help: str, group: Any = None) -> None:
    """Add a flag, to `group` where one is given, and the option that takes it back where the environment or a file sets
    it: --no-plain for --plain, --normalize for --no-normalize. Help and usage leave that out."""
    flag = (group or parser).add_argument(*names, action="store_true", help=help)
    name = names[-1].removeprefix("--")
    back = name.removeprefix("no-") if name.startswith("no-") else f"no-{name}"
    parser.add_argument(f"--{back}", dest=flag.dest, action="store_false", default=flag.default, help=argparse.SUPPRESS)


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    add_flag(
        parser,
        "--trust-remote-code",
        help="permission to run Python code that the model's folder or repository brings along; without it none runs",
    )


def utf8_text(text: str) -> str:
    """A type for arguments: text that a tokenizer reads. Bytes that aren't UTF-8 come as halves of surrogate pairs."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from error
    return text


def names(text: str) -> list[str]:
    """A type for arguments: names with commas between them."""
    found = [part.strip() for part in utf8_text(text).split(",")]
    if not all(found) or len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} must be names with commas between them, each once")
    return found


def one_character(text: str) -> str:
    """A type for arguments: a character that may stand between cells; \\t is a tab."""
    found = "\t" if text == "\\t" else text
    if len(found) != 1 or found in '"\r\n':
        raise argparse.ArgumentTypeError(f"{text!r} must be one character, and no quote or end of a line")
    return found


def positive_int(text: str) -> int:
    """A type for arguments: a whole number from 1."""
    value = int(text) if text.isdecimal() else 0
    if not 1 <= value <= 2**31 - 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {2**31 - 1}")
    return value


def byte_count(text: str) -> int:
    """A type for arguments: a number of bytes from 1, perhaps in units like 16MB."""
    number, unit = text.rstrip("BKMGbkmg"), text.lstrip("0123456789").upper()
    if unit not in _UNITS or not number.isdecimal() or not 1 <= int(number) * _UNITS[unit] < 2**40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes like 1048576, 512KB or 16MB")
    return int(number) * _UNITS[unit]


def seconds(text: str) -> float:
    """A type for arguments: a time in seconds, above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def port(text: str) -> int:
    """A type for arguments: a TCP port; 0 is any that is free."""
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 2**16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port, a whole number from 0 to {2**16 - 1}")
    return value


def thread_count(text: str) -> int:
    """A type for arguments: a number of threads."""
    value = positive_int(text)
    if value > MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r} threads are more than {MOST_THREADS}")
    return value


def add_model_arguments(parser: argparse.ArgumentParser, results: str) -> None:
    """Add the arguments of every command that runs a model; `results` says what goes to --output."""
    parser.add_argument("-m", "--model", required=True, metavar="M", help="a local folder, a hub id or a .gguf file")
    parser.add_argument("-o", "--output", metavar="PATH", help=results)
    add_flag(parser, "--overwrite", help="replacement of what --output holds")
    mode = parser.add_mutually_exclusive_group()
    add_flag(parser, "--plain", help="batches sorted by length and not folded", group=mode)
    add_flag(
        parser,
        "--compare",
        help="a plain run and a folded one by turns, and both times; results (the folded run's) go to --output only",
        group=mode,
    )
    add_engine_arguments(parser)


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what says how a model runs."""
    parser.add_argument(
        "--token-budget",
        type=positive_int,
        metavar="N",
        help="rows of a batch at most, that is tokens that are computed; a batch may unfold 8 times as many, and a "
        "longer sequence is a batch of its own (default: found from the free memory, at most 4,096 on the CPU and "
        "65,536 on CUDA)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype of weights and computation (default: see above)",
    )
    parser.add_argument("--device", help="device, as torch names it (default: cuda where there is one, else cpu)")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's)")
    add_trust_argument(parser)


def add_length_arguments(parser: argparse.ArgumentParser, what: str, cut: str) -> None:
    parser.add_argument(
        "--max-length",
        type=positive_int,
        metavar="N",
        help=f"tokens of a {what} at most, special tokens included (default: as the model and its tokenizer say)",
    )
    add_flag(parser, "--truncate-right", help=f"a cut at the end of {cut} that are too long")
