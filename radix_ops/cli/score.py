"""`radix-ops score`: questions and texts scored with shared prefixes computed once."""

from __future__ import annotations

import argparse

from ..data.measured import check_metrics
from ..engine import Scorer, scoring
from ..engine.errors import UserError
from ..engine.inputs import Record
from ..engine.measures import Measures
from ..engine.rolling import Text
from ..engine.scoring import Item
from .job import Job, prepared
from .measured import Differences, Measured, fields_of, report
from .progress import say
from .reading import files_read, read_records


def run(args: argparse.Namespace) -> None:
    if args.metrics:
        check_metrics(args.metrics, args.overwrite, *files_read(args), *([args.output] if args.output else []))
    with prepared(args) as options:
        engine = Scorer(
            args.model,
            letters=args.letters,
            chat=args.chat,
            system=args.system,
            max_length=args.max_length,
            truncate_left=args.truncate_left,
            stride=args.stride,
            **options,
        )
        parser = _Parser(engine, args)
        records = read_records(args, parser, scoring.SHAPE, task="score")
        parser.check()
        measured = Measured(args, Measures(args.calibration), fields_of, report)
        Job(args, engine, records, "score", "scored", Differences(measured), measured.add).run()
        measured.finish()


class _Parser:
    """Parses records, which must be of one kind and fit to the options."""

    def __init__(self, engine: Scorer, args: argparse.Namespace):
        self._engine, self._args = engine, args
        self._kind: type | None = None
        self._has_gold = self._has_told = False

    def __call__(self, record: Record) -> Item | Text:
        item = self._engine.parse(record)
        kind = Text if isinstance(item, Text) else Item
        what, others = ("a text", "questions") if kind is Text else ("a question", "texts")
        if self._kind not in (kind, None):
            raise UserError(f"{item.where} holds {what}, and what stands before it {others}; score them apart")
        unfit = ("calibration", "truncate_left") if kind is Text else ("stride",)
        option = next((name for name in unfit if getattr(self._args, name)), None)
        if option:
            raise UserError(f"{item.where} holds {what}; --{option.replace('_', '-')} is for {others}")
        self._kind = kind
        self._has_gold = self._has_gold or item.extra.get("gold") is not None
        if self._args.chat and isinstance(item, Item) and any(choice[0].isspace() for choice in item.choices):
            self._tell_of_spaces(item.where)
        return item

    def _tell_of_spaces(self, where: str) -> None:
        if not self._has_told:
            say(f"{where}: choices begin with white space, so the assistant's answers do, which few chats have")
            self._has_told = True

    def check(self) -> None:
        """UserError where what is asked for needs to know which choices are right, and nothing says it."""
        option = next((name for name in ("calibration", "metrics") if getattr(self._args, name)), None)
        if option and self._kind is not Text and not self._has_gold:
            raise UserError(f'--{option} needs "gold", the right choice, and no row has it')
