"""`radix-ops inspect` says how much a data set shares, before anything is decided."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable

from radix_ops_command.errors import printable

from ..data.formats import PAIRS, FormatParser, formats, packed_arrays
from ..engine.costs import forward_cost
from ..engine.cross_encoders import find_cross_encoder
from ..engine.errors import UserError
from ..engine.items import Items
from ..engine.loading import load_config, load_tokenizer, runs_own_model
from ..engine.recipes import find_recipe
from ..plan.budget import Budget
from ..plan.sharing import Sharing, sharing_from_end
from .inspection.plot import check_plot_path, plot
from .inspection.report import to_text
from .inspection.summary import summarise
from .reading import encode, read_records, say_what_is_bad

_logger = logging.getLogger(__name__)

_SHOWN_START, _SHOWN_END = 64, 28  # characters of a shared prefix
_DECODED_TOKENS = 100  # at its start and at its end


def run(args: argparse.Namespace) -> None:
    if args.plot is not None:
        check_plot_path(args.plot, *args.files)
    trust = args.trust_remote_code
    tokenizer = load_tokenizer(args.tokenizer, "--tokenizer", trust) if args.tokenizer else None
    cost = forward_cost(args.model, trust) if args.model else None
    items, meaning, tokenizer = _read(args, tokenizer)
    if not len(items.store):
        raise UserError(f"{', '.join(args.files)}: no sequences, so there is nothing to share")
    name = printable(", ".join(args.files))
    lengths = items.lengths
    sharing = Sharing(items.store, lengths)
    summary = {"file": name, "meaning": meaning, "model": args.model}
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
        print(f"{name}: {meaning}\n\n{to_text(summary)}")
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
    if len(args.files) == 1 and args.files[0].endswith(".npz") and args.format is None:
        items = packed_arrays(args.files[0])
        if not len(items.store):
            raise UserError(f"{args.files[0]} holds no sequences")
        return items, "packed token ids", tokenizer
    prompt, pair_prompt = _prompts(args)
    parser = FormatParser(formats(args.text_key, prompt, args.template, pair_prompt, args.letters))
    records = read_records(args, parser, "one JSON object a line", writes_results=False, task="inspect")
    form = parser.format
    assert form is not None  # a file without records is refused
    if tokenizer is None and form.needs_tokenizer:
        if not args.model:
            raise UserError(
                f"{records.path} holds text: --tokenizer must name the tokenizer, a local folder or a hub id"
            )
        tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    items = encode(records, lambda lines: form.encode(lines, tokenizer))
    say_what_is_bad(records)
    lines = f"{len(records):,} {'line' if records.has_lines else 'row'}{'s' * (len(records) != 1)}"
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
