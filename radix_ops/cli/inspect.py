"""`radix-ops inspect` says how much a data set shares, before anything is decided."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable

from ..data.formats import PAIRS, FormatParser, formats, packed_arrays
from ..engine.costs import forward_cost
from ..engine.cross_encoders import find_cross_encoder
from ..engine.errors import UserError
from ..engine.items import Items
from ..engine.loading import load_config, load_tokenizer, runs_own_model
from ..engine.recipes import find_recipe
from ..engine.templates import TEMPLATES
from ..plan.budget import Budget
from ..plan.sharing import SEED, Sharing, sharing_from_end
from .arguments import (
    FILE_HELP,
    add_command,
    add_format_argument,
    add_trust_argument,
    positive_int,
    printable,
    read_records,
    utf8_text,
)
from .inspection.plot import check_plot_path, plot
from .inspection.report import to_text
from .inspection.summary import summarise
from .job import with_progress

_logger = logging.getLogger(__name__)

BATCH_SIZES = (8, 32, 128, 512)
MAX_ROWS = 16_384
_SHOWN_START, _SHOWN_END = 64, 28  # characters of a shared prefix
_DECODED_TOKENS = 100  # at its start and at its end

HELP = f"""\
Says how much the sequences of a file share, and what folding could save: the first thing to run before deciding. No
model runs, and no weights are read.

FILE holds one text a line (.txt), or one JSON object a line, of which the first line's keys tell the format:
  {{"text": ...}}                            texts; --text-key names another key, --prompt what stands before each
  {{"context": ..., "choices": [...]}}       questions as `radix-ops score` reads them
  {{"query": ..., "documents": [...]}}       queries as `radix-ops rerank` reads them, in a --template
  {{"messages": [...]}}                      conversations, by the tokenizer's chat template
  {{"prompt": ..., "completion": ...}}       training data; strings, or arrays of messages
  {{"prompt": ..., "chosen": ..., "rejected": ...}}
  {{"input_ids": [...]}}                     token ids, which need no tokenizer
or it is a .npz file of two arrays, input_ids [N] end to end and cu_seqlens [B + 1].

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


def run(args: argparse.Namespace) -> None:
    if args.plot is not None:
        check_plot_path(args.plot, args.file)
    trust = args.trust_remote_code
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", trust) if args.tokenizer else None
    cost = forward_cost(args.model, trust) if args.model else None
    items, meaning, tokenizer = _read(args, tokenizer)
    lengths = items.lengths
    sharing = Sharing(items.store, lengths)
    summary = {"file": printable(args.file), "meaning": meaning, "model": args.model}
    summary |= summarise(
        sharing,
        sorted(set(args.batch_sizes)),
        Budget(args.token_budget).limits(pads_states=_pads_states(args)),
        _shower(items, tokenizer),
        sharing_from_end(items.store, lengths),
        cost,
    )
    if args.plot is not None:
        plot(sharing, summary, args.plot)
    if args.json:
        print(json.dumps(summary))
    else:
        print(f"{printable(args.file)}: {meaning}\n\n{to_text(summary)}")
        if args.plot is not None:
            print(f"\nThe picture is {printable(args.plot)}.")


def _pads_states(args: argparse.Namespace) -> bool:
    """Return whether the other commands would run the model on transformers; without a name most are."""
    if not args.model:
        return True
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    classifies = (getattr(config, "architectures", None) or [""])[0].endswith("ForSequenceClassification")
    auto_class = f"AutoModelFor{'SequenceClassification' if classifies else 'CausalLM'}"
    return not runs_own_model(args.model, config, auto_class, args.trust_remote_code)


def _read(args: argparse.Namespace, tokenizer) -> tuple[Items, str, object]:
    """Return the sequences, what they are, and the tokenizer: --model's where one is needed and none was given."""
    if args.file.endswith(".npz") and args.format is None:
        items = packed_arrays(args.file)
        if not len(items.store):
            raise UserError(f"{args.file} holds no sequences")
        return items, "packed token ids", tokenizer
    prompt, pair_prompt = _prompts(args)
    parser = FormatParser(formats(args.text_key, prompt, args.template, pair_prompt))
    records = read_records(args.file, parser, "one JSON object a line", args.format)
    form = parser.format
    assert form is not None  # a file without records is refused
    if tokenizer is None and form.needs_tokenizer:
        if not args.model:
            raise UserError(f"{args.file} holds text: --tokenizer must name the tokenizer, a local folder or a hub id")
        tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    items = form.encode(with_progress(records, "tokenising"), tokenizer)
    lines = f"{len(records):,} line{'s' * (len(records) != 1)}"
    if records.is_text:
        return items, f"{lines} of text", tokenizer
    return items, f"{lines} of {form.shape}\n{form.meaning}", tokenizer


def _prompts(args: argparse.Namespace) -> tuple[str, str]:
    """Return what stands before each text, by default as the model's folder says, and before each query of a pair."""
    of_text, of_pair = args.prompt, ""
    if args.model and args.template == PAIRS:
        config = load_config(args.model, trust_remote_code=args.trust_remote_code)
        encoder = find_cross_encoder(args.model, config)
        if encoder is not None and encoder.messages is not None:
            raise UserError(
                f"--model {args.model} reads a query and a document by its chat template, whose sequences "
                f"radix-ops inspect can't count; with --tokenizer in place of --model it counts --template {PAIRS}"
            )
        of_pair = "" if encoder is None else encoder.prompt
    if args.model and of_text is None:
        try:
            recipe = find_recipe(args.model)
        except UserError:  # it makes no embeddings of texts
            return "", of_pair
        of_text = recipe.prompt
        if recipe.messages is not None:
            _logger.warning(
                f"{args.model} reads texts by its chat template; what that writes around each of them is not counted"
            )
    return of_text or "", of_pair


def _shower(items: Items, tokenizer) -> Callable[[int, int, int], str]:
    """Return a function of (sequence, start, stop) that shows these tokens on one line, a long piece by its ends."""

    def show(sequence: int, start: int, stop: int) -> str:
        ids = items.store[sequence][start:stop].tolist()
        if tokenizer is None:
            return f"[{', '.join(map(str, ids if len(ids) <= 8 else [*ids[:5], '...', *ids[-2:]]))}]"
        if len(ids) <= 2 * _DECODED_TOKENS:
            return _shortened(printable(tokenizer.decode(ids)))
        ends = (tokenizer.decode(part) for part in (ids[:_DECODED_TOKENS], ids[-_DECODED_TOKENS:]))
        return _shortened(*map(printable, ends))

    return show


def _shortened(start: str, end: str | None = None) -> str:
    if end is None and len(start) <= _SHOWN_START + _SHOWN_END + 5:
        return f'"{start}"'
    return f'"{start[:_SHOWN_START]} ... {(start if end is None else end)[-_SHOWN_END:]}"'


def _sizes(text: str) -> list[int]:
    return [positive_int(part.strip()) for part in text.split(",")]


def add_parser(commands) -> None:
    command = add_command(commands, "inspect", "how much a data set shares, and what folding could save", HELP, run)
    command.add_argument("file", metavar="FILE", help="the data, JSONL, text or .npz")
    command.add_argument(
        "--tokenizer", metavar="T", help="a local folder, a hub id or a .gguf file (default: that of --model)"
    )
    command.add_argument(
        "--model", metavar="M", help="model whose config gives speed-ups in FLOPs; no weights are read"
    )
    add_format_argument(command)
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
        f"or {PAIRS} as a cross-encoder reads them",
    )
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
    command.add_argument("--json", action="store_true", help="one JSON object in place of the report")
