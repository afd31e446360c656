"""Jinja templates of a user's file, rendered with fields of data: in jinja2's sandbox, and with bounded work.

A template may use output, `if`, `for`, `set`, a choice of filters and methods, and no more, so that neither time nor
memory grows without end: each name that is read, each turn of a loop and each piece of text counts as work.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.runtime import StrictUndefined, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import UserError
from .inputs import LONGEST_TEXT, kind_of

_MOST_WORK = 2_000_000  # steps for one text: a name, an element, a turn of a loop, so many characters
_CHARACTERS_A_STEP = 128
_LONGEST_ARGUMENT = 4096  # of a method
_LONGEST_SOURCE = 2**20
_LARGEST_NUMBER = 2**63
_WORK, _COUNTED, _EACH = " work", " counted", " each"  # no names that a template can write
_TOO_LONG = f"a text of more than {LONGEST_TEXT:,} characters"
_HAS = "it may hold output, if, for and set"

_NODES = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.If, nodes.For, nodes.Assign, nodes.Break, nodes.Continue,
    nodes.Name, nodes.Const, nodes.Tuple, nodes.List, nodes.Dict, nodes.Pair, nodes.Keyword, nodes.Getattr,
    nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Call, nodes.Compare, nodes.Operand, nodes.And, nodes.Or,
    nodes.Not, nodes.Neg, nodes.Pos, nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod,
    nodes.Concat, nodes.CondExpr,
)  # fmt: skip
# Each takes a time, and gives a text, in proportion to what it is given.
_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "int", "items", "last", "length",
    "list", "lower", "max", "min", "reverse", "sort", "string", "title", "truncate", "unique", "upper", "wordcount",
)  # fmt: skip
_METHODS = (
    "capitalize", "count", "cycle", "endswith", "find", "get", "index", "items", "keys", "lower", "lstrip",
    "removeprefix", "removesuffix", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "title", "upper",
    "values",
)  # fmt: skip


class TooMuchWork(Exception):
    """A template that would run too long, or make a text that is too large."""


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%"})

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            return _joined([left, right])
        if operator == "+" and isinstance(left, list) and isinstance(right, list):
            return left + right
        for value in (left, right):
            if isinstance(value, Undefined):
                str(value)  # which says what isn't defined
            if not isinstance(value, (int, float)):
                raise TypeError(f"{operator} takes numbers, and this is {kind_of(value)}")
            if abs(value) >= _LARGEST_NUMBER:
                raise TooMuchWork(f"a number of {_LARGEST_NUMBER} or more")
        return super().call_binop(context, operator, left, right)

    def call(self, context, called: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, str) and len(value) > _LONGEST_ARGUMENT for value in (*args, *kwargs.values())):
            raise TypeError(f"an argument of more than {_LONGEST_ARGUMENT:,} characters")
        return super().call(context, called, *args, **kwargs)


def _joined(parts: Iterable[Any], between: str = "") -> str:
    texts, size = [], 0
    for part in parts:
        texts.append(str(_printable(part)))
        size += len(texts[-1]) + len(between)
        if size > LONGEST_TEXT:
            raise TooMuchWork(_TOO_LONG)
    return between.join(texts)


def _printable(value: Any) -> Any:
    """Return a value that a prompt may hold. TypeError for one that Python would spell."""
    if value is None or not isinstance(value, (str, int, float, Undefined)):
        remedy = "" if value is None else "; the filter tojson writes it, join puts a list's texts together"
        raise TypeError(f"{kind_of(value)} can't be put into the text{remedy}")
    return value


@jinja2.pass_context
def _replace(context, text: str, old: str, new: str, count: int | None = None) -> str:
    for value in (text, old, new):
        if not isinstance(value, str):
            raise TypeError(f"replace takes strings, and this is {kind_of(value)}")
    found = text.count(old) if count is None else max(0, min(count, text.count(old)))
    if len(text) + found * (len(new) - len(old)) > LONGEST_TEXT:
        raise TooMuchWork(_TOO_LONG)
    return _counted(context, text.replace(old, new, found))


@jinja2.pass_context
def _join(context, values: Iterable[Any], between: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        values = [context.environment.getitem(value, attribute) for value in values]
    return _counted(context, _joined(values, str(between)))


@jinja2.pass_context
def _tojson(context, value: Any) -> str:
    return json.dumps(_counted(context, value), ensure_ascii=False)


def _trim(text: str) -> str:
    return text.strip()


@jinja2.pass_context
def _range(context, *ends: int) -> range:
    numbers = range(*ends)
    _spend(context, len(numbers))
    return numbers


@jinja2.pass_context
def _each(context, values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(context, 1)
        yield value


@jinja2.pass_context
def _counted(context, value: Any) -> Any:
    """Return the value, counted as work by its size."""
    rest = [value]
    while rest:
        part = rest.pop()
        _spend(context, 1 + len(part) // _CHARACTERS_A_STEP if isinstance(part, str) else 1)
        if isinstance(part, Mapping):
            rest.extend(part.values())
        elif isinstance(part, (list, tuple)):
            rest.extend(part)
    return value


def _spend(context, steps: int) -> None:
    """TooMuchWork as soon as all that was done for a text is more than is allowed."""
    work: list[int] = context.parent[_WORK]
    work[0] += steps
    if work[0] > _MOST_WORK:
        raise TooMuchWork(f"more than {_MOST_WORK:,} steps of work")


_OWN_FILTERS: dict[str, Callable] = {"replace": _replace, "join": _join, "tojson": _tojson, "trim": _trim}


def _environment() -> _Environment:
    environment = _Environment(
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    known = environment.filters
    environment.filters = {name: known[name] for name in _FILTERS} | _OWN_FILTERS
    environment.filters |= {_COUNTED: _counted, _EACH: _each}
    environment.globals = {"range": _range}
    return environment


_ENVIRONMENT = _environment()


class JinjaText:
    """A template that makes a text of a row's fields; `fields` are those that it reads.

    Raises UserError, naming line and reason, for what is no template or uses more than the sandbox has.
    """

    def __init__(self, source: str):
        if len(source) > _LONGEST_SOURCE:
            raise UserError(f"the template has {len(source):,} characters, and the most are {_LONGEST_SOURCE:,}")
        try:
            tree = _ENVIRONMENT.parse(source)
            _check(tree)
            self.fields = frozenset(meta.find_undeclared_variables(tree) - {"range"})
            self._template = _ENVIRONMENT.from_string(_counting(tree))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the template's line {error.lineno} is not Jinja: {error.message}") from error
        except UserError:
            raise
        except Exception as error:  # Python's compiler has limits of its own: nested blocks, the stack
            raise UserError(f"the template can't be compiled: {type(error).__name__}: {error}") from error

    def render(self, fields: Mapping[str, Any], where: str) -> str:
        """Return the text. UserError, which names `where`, for a field that isn't there, an error of the template, and
        more work or text than is allowed."""
        pieces, size = [], 0
        try:
            given = {name: fields[name] for name in self.fields & fields.keys()}
            for piece in self._template.generate(given | {_WORK: [0]}):
                pieces.append(piece)
                size += len(piece)
                if size > LONGEST_TEXT:
                    raise TooMuchWork(_TOO_LONG)
        except TooMuchWork as error:
            raise UserError(f"{where}: the template makes {error}, which is refused") from error
        except jinja2.UndefinedError as error:
            has = ", ".join(f'"{name}"' for name in list(fields)[:8]) or "no keys"
            raise UserError(f"{where}: the template needs what isn't there: {error.message}; it has {has}") from error
        except Exception as error:  # a template may fail in any way that Python knows
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{where}: the template failed: {type(error).__name__}: {reason}") from error
        return "".join(pieces)


def _check(tree: nodes.Template) -> None:
    """UserError for a template that uses more than the sandbox has."""
    for node in [tree, *tree.find_all(nodes.Node)]:
        what = None
        if not isinstance(node, _NODES):
            what = type(node).__name__
        elif isinstance(node, nodes.For) and node.recursive:
            what = "a recursive loop"
        elif isinstance(node, nodes.Name) and node.name == "self":
            what = "self"
        elif isinstance(node, nodes.Filter) and (node.node is None or node.name not in (*_FILTERS, *_OWN_FILTERS)):
            what = f"the filter {node.name}"
        elif isinstance(node, nodes.Call) and (node.dyn_args or node.dyn_kwargs or not _may_be_called(node.node)):
            what = f"a call of {getattr(node.node, 'attr', getattr(node.node, 'name', 'an expression'))}"
        if what is not None:
            raise UserError(f"the template's line {getattr(node, 'lineno', 1)} uses {what}, which it can't: {_HAS}")


def _may_be_called(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Getattr):
        return node.attr in _METHODS
    return isinstance(node, nodes.Name) and node.name == "range"


def _counting(node: Any) -> Any:
    """Return a node of a template with its work counted: names that it reads, turns of its loops, texts it joins."""
    for key, value in list(node.iter_fields()):
        if isinstance(value, list):
            setattr(node, key, [_counting(part) if isinstance(part, nodes.Node) else part for part in value])
        elif isinstance(value, nodes.Node):
            setattr(node, key, _counting(value))
    match node:
        case nodes.Name(ctx="load"):
            return _through(_COUNTED, node)
        case nodes.Const(value=str(text)) if len(text) > _CHARACTERS_A_STEP:
            return _through(_COUNTED, node)
        case nodes.Concat():
            return _through("join", nodes.List(node.nodes, lineno=node.lineno))
        case nodes.For():
            node.iter = _through(_EACH, node.iter)
    return node


def _through(name: str, node: Any) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
