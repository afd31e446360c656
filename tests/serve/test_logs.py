"""The log's lines, and that no prompt is in them."""

from __future__ import annotations

import json
import logging

import pytest

from helpers.served import POISON, Gate, serving, submit
from radix_ops.serve.logs import JsonFormatter, json_logs
from radix_ops.serve.refusals import Failed


def test_lines_are_json_with_the_fields_of_their_records(capsys):
    with json_logs():
        logging.getLogger("radix_ops.serve.access").info(
            "request", extra={"fields": {"route": "/embed", "status": 200, "seconds": 0.5}}
        )
        logging.getLogger("uvicorn.error").warning('a "quoted"\nwarning')
        logging.getLogger("uvicorn.error").info("started")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "level": "info",
        "logger": "radix_ops.serve.access",
        "message": "request",
        "route": "/embed",
        "status": 200,
        "seconds": 0.5,
    }
    assert (second["level"], second["message"]) == ("warning", 'a "quoted"\nwarning')


def test_a_quiet_log_has_warnings_alone(capsys):
    with json_logs(quiet=True):
        logging.getLogger("radix_ops.serve.access").info("request")
        logging.getLogger("radix_ops.serve").warning("warning")
    assert [json.loads(line)["message"] for line in capsys.readouterr().err.splitlines()] == ["warning"]


def test_loggers_are_put_back(capsys):
    loggers = [logging.getLogger(name) for name in ("radix_ops.serve", "uvicorn.error")]
    before = [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers]
    with pytest.raises(RuntimeError), json_logs():
        raise RuntimeError
    assert [(logger.level, logger.propagate, logger.handlers[:]) for logger in loggers] == before


def test_an_exception_is_told_without_its_messages():
    try:
        try:
            raise ValueError("the secret prompt")
        except ValueError as error:
            raise KeyError("the secret text") from error
    except KeyError as error:
        record = logging.LogRecord("x", logging.ERROR, "", 0, "failed", (), (type(error), error, error.__traceback__))
    line = JsonFormatter().format(record)
    assert "secret" not in line
    assert [found["type"] for found in json.loads(line)["exception"]] == ["KeyError", "ValueError"]
    assert "test_an_exception_is_told" in line


def test_a_failure_s_message_is_not_logged(capsys):
    class Quoting(Gate):
        def __call__(self, sequences, extras):
            try:
                return super().__call__(sequences, extras)
            except ValueError as error:
                raise ValueError("the secret prompt") from error

    with json_logs():
        with serving(Quoting()) as batcher, pytest.raises(Failed):
            submit(batcher, [POISON], [1]).result(20)
        gate = Quoting()
        gate.error = SystemExit
        with serving(gate) as batcher, pytest.raises(Exception, match="the server's engine has stopped"):
            submit(batcher, [POISON]).result(20)
    lines = capsys.readouterr().err
    assert "ValueError" in lines
    assert "SystemExit" in lines
    assert "secret" not in lines
