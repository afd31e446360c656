"""Threads of OpenMP wait as radix_ops sets it, which OpenMP itself reports."""

from __future__ import annotations

import re

import pytest

from helpers import processes

AFTERWARDS = "import os; assert ('GOMP_SPINCOUNT' in os.environ) == {}"


def spins(code: str, monkeypatch, **variables: str) -> list[str]:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    run = processes.run_python("-c", code, OMP_DISPLAY_ENV="VERBOSE", **variables)
    assert run.returncode == 0, run.stderr
    found = re.findall("GOMP_SPINCOUNT = '(.*)'", run.stderr)
    if not found:
        pytest.skip("torch's threads are not those of GNU's OpenMP")
    return found


def test_threads_that_come_with_radix_ops_spin_shortly(monkeypatch):
    assert spins("import radix_ops; " + AFTERWARDS.format(False), monkeypatch) == ["20000"]


@pytest.mark.parametrize("variables", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "PASSIVE"}])
def test_what_a_variable_asks_for_is_left_as_it_is(variables, monkeypatch):
    asked = spins("import torch", monkeypatch, **variables)
    assert len(asked) == 1
    assert (
        spins("import radix_ops; " + AFTERWARDS.format("GOMP_SPINCOUNT" in variables), monkeypatch, **variables)
        == asked
    )


def test_a_torch_that_was_there_before_is_left_as_it_is(monkeypatch):
    alone = spins("import torch", monkeypatch)
    assert spins("import torch, radix_ops; " + AFTERWARDS.format(False), monkeypatch) == alone
