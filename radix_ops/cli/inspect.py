"""`radix-ops inspect` says how much a data set shares, before anything is decided."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from collections.abc import Callable
from typing import Any

from radix_ops_command.errors import printable

from ..data.formats import FormatParser, formats, label_format, packed_arrays
from ..engine.costs import forward_cost
from ..engine.errors import UserError
from ..engine.items import Items
from ..engine.label_prompts import find_label_prompt, is_label_prompt
from ..engine.loading import load_config, load_tokenizer, runs_own_model
from ..engine.messages import Chat
from ..engine.query_reading import QueryReading
from ..engine.recipes import Recipe, find_recipe
from ..plan.budget import Budget
from ..plan.sharing import Sharing, sharing_from_end
from .inspection.plot import check_plot_path, plot
from .inspection.report import to_text
from .inspection.summary import summarise
from .reading import encode, read_records, say_what_is_bad

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
    auto_class = f"AutoModelFor{'SequenceClassification' if _classifies(args) else 'CausalLM'}"
    return not runs_own_model(args.model, config, auto_class, args.trust_remote_code)


def _classifies(args: argparse.Namespace) -> bool:
    """Return whether --model names one with a classification head."""
    if not args.model:
        return False
    config = load_config(args.model, trust_remote_code=args.trust_remote_code)
    return (getattr(config, "architectures", None) or [""])[0].endswith("ForSequenceClassification")


def _read(args: argparse.Namespace, tokenizer) -> tuple[Items, str, object]:
    """Return the sequences, what they are, and the tokenizer: --model's where one is needed and none was given."""
    if len(args.files) == 1 and args.files[0].endswith(".npz") and args.format is None:
        items = packed_arrays(args.files[0])
        if not len(items.store):
            raise UserError(f"{args.files[0]} holds no sequences")
        return items, "packed token ids", tokenizer
    if args.template is not None and is_label_prompt(args.template):
        prompt = find_label_prompt(args.template)
        tokenizer = tokenizer or _tokenizer_of_model(args, f"--template {args.template} makes prompts")
        parser, task = FormatParser([], label_format(prompt, tokenizer)), "prompt"
    else:
        queries = QueryReading(args.template, args.model, args.trust_remote_code)
        recipe = _recipe(args)
        chat = _chat_of(args, recipe)
        known = formats(args.text_key, recipe.prompt, queries, args.letters, _classifies(args), chat)
        parser, task = FormatParser(known), "inspect"
    records = read_records(args, parser, "one JSON object a line", writes_results=False, task=task)
    form = parser.format
    assert form is not None  # a file without records is refused
    if tokenizer is None and form.needs_tokenizer:
        tokenizer = _tokenizer_of_model(args, f"{records.path} holds text")
    items = encode(records, lambda lines: form.encode(lines, tokenizer))
    say_what_is_bad(records)
    lines = f"{len(records):,} {'line' if records.has_lines else 'row'}{'s' * (len(records) != 1)}"
    if records.is_text:
        return items, f"{lines} of text", tokenizer
    return items, f"{lines} of {form.shape}\n{form.meaning}", tokenizer


def _tokenizer_of_model(args: argparse.Namespace, why: str):
    if not args.model:
        raise UserError(f"{why}: --tokenizer must name the tokenizer, a local folder or a hub id")
    return load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)


def _recipe(args: argparse.Namespace) -> Recipe:
    """Return the way from a text to an embedding, as the model's folder says but for --prompt."""
    recipe = Recipe("")
    if args.model:
        with contextlib.suppress(UserError):  # it makes no embeddings of texts
            recipe = find_recipe(args.model)
    return recipe if args.prompt is None else dataclasses.replace(recipe, prompt=args.prompt)


def _chat_of(args: argparse.Namespace, recipe: Recipe) -> Callable[[Any], Recipe] | None:
    """Return how the model's chat template renders texts, by its tokenizer; None where it doesn't."""
    if recipe.messages is None:
        return None
    messages = recipe.messages
    config = load_config(recipe.source, trust_remote_code=args.trust_remote_code)

    def fitted(tokenizer: Any) -> Recipe:
        found = messages.fitted(tokenizer, config.model_type)
        Chat(tokenizer, found, recipe.prompt).check(("user",))
        return dataclasses.replace(recipe, messages=found, max_length=None)

    return fitted


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
