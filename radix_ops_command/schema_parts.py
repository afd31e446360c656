"""The parts that JSON schemas of several commands share."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
BOOLEAN: Schema = {"type": "boolean"}
NUMBER: Schema = {"type": "number"}
COUNT: Schema = {"type": "integer", "minimum": 0}
TEXT: Schema = {"type": "string"}
_FROM_ONE: Schema = {"type": "integer", "minimum": 1}
_ORIGIN: Schema = {
    "line": _FROM_ONE | {"description": "the input line, counted from 1"},
    "row": _FROM_ONE | {"description": "the input row of a table or array, counted from 1"},
    "file": TEXT | {"description": "the input file, where there are several"},
}
_KEY: Schema = TEXT | {"description": "a hash of input, tokens, model, dtype and options, by which a run is continued"}
_ERROR: Schema = {
    "properties": {"error": TEXT | {"description": "why the row can't be used, with --on-error record"}},
    "required": ["error"],
}


def array(items: Schema, description: str, **others: Any) -> Schema:
    """Return the schema of an array whose items have one schema."""
    return {"type": "array", "items": items, "description": description, **others}


def fields(description: str, properties: Schema) -> Schema:
    """Return the schema of an object that has all of these properties and no others."""
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def kind(required: Schema, optional: Schema | None = None) -> Schema:
    """Return the schema of a command's own fields in a line of one kind."""
    return {"properties": required | (optional or {}), "required": list(required)}


def line(command: str, *kinds: Schema) -> Schema:
    """Return the schema of a command's line of one of these kinds, or of an error: where it comes from, and its key;
    other fields are copies of the input's."""
    return {
        "title": f"a line of radix-ops {command}",
        "type": "object",
        "properties": _ORIGIN | {"key": _KEY},
        "required": ["key"],
        "allOf": [{"anyOf": [{"required": ["line"]}, {"required": ["row"]}]}, {"anyOf": [*kinds, _ERROR]}],
    }
