"""Settles how threads of OpenMP wait for each other, as torch loads them.

A parallel region ends where all threads have arrived, and a forward has hundreds of regions: the fewer rows, the more
of them for the same work. GNU's threads spin there for milliseconds before they sleep. Beside other work that uses up
the share of a processor that the thread which is waited for needs, and a folded run slows more than a plain one. With
20,000 spins, a fraction of a millisecond, both slow by their fair share, and neither takes longer where nothing else
runs (benchmarks/bench_busy_cpu.py).
"""

from __future__ import annotations

import os
import sys

_SPINS = "20000"


def _import_torch() -> None:
    """Import torch with few spins, unless it is imported already or a variable says how threads should wait.

    Raises ImportError where torch is missing.
    """
    is_settled = "torch" in sys.modules or bool({"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys())
    if not is_settled:
        os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        missing = "radix_ops needs torch >= 2.11, which is not installed: pip install 'torch>=2.11'"
        raise ImportError(missing, name="torch") from None
    finally:
        if not is_settled:
            del os.environ["GOMP_SPINCOUNT"]


_import_torch()
