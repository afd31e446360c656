"""schemathesis calls every route of every task with what /openapi.json allows, and with what it doesn't."""

from __future__ import annotations

import hypothesis
import pytest
import requests
import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance

TASKS = ("embedder", "ranker", "classifier", "scorer")
CALLS = 15  # of each route


@pytest.mark.parametrize("task", TASKS)
def test_no_call_is_a_server_error(task, request):
    server = request.getfixturevalue(task)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) > 20
    called = set()

    for operation in operations:

        @hypothesis.settings(
            max_examples=CALLS, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy())
        def call(case):
            case.call_and_validate(checks=[not_a_server_error, content_type_conformance], timeout=60)
            called.add(case.path)

        call()
    assert len(called) > 20
    assert requests.get(f"{server.url}/ready", timeout=10).status_code == 200
