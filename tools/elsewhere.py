"""Run the tests as other machines would: `make test-elsewhere`, or in some environments and some of them by

    tools/elsewhere.py avx2 scalar+threads busy -- -n 2 tests/ops

An environment is one of those below, or several joined by +. Arguments behind -- are pytest's. The output of each
run goes to build/elsewhere/; a table says how many tests passed and failed where. The exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from busy import busy_processors

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "elsewhere"
LONGEST_RUN = 3 * 3600  # seconds
FEW_FILES = 256


class Environment(NamedTuple):
    meaning: str
    variables: dict[str, str] = {}  # noqa: RUF012  (never changed)
    arguments: tuple[str, ...] = ()


ENVIRONMENTS = {
    "scalar": Environment("a CPU without AVX2, to torch's kernels and ours", {"ATEN_CPU_CAPABILITY": "default"}),
    "avx2": Environment("a CPU without AVX-512, to torch's kernels and ours", {"ATEN_CPU_CAPABILITY": "avx2"}),
    "onednn-sse41": Environment("a CPU without AVX, to oneDNN", {"ONEDNN_MAX_CPU_ISA": "SSE41"}),
    "onednn-avx2": Environment("a CPU without AVX-512, to oneDNN", {"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    "mkl-compatible": Environment("any CPU, to MKL, which multiplies float32 otherwise", {"MKL_CBWR": "COMPATIBLE"}),
    # They sleep while they wait: with more of them than cores, spinning would take most of the time.
    "threads": Environment(
        "four threads", {"RADIX_TEST_THREADS": "4", "OMP_NUM_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"}
    ),
    "random": Environment("a random order, dealt out in another way", {}, ("-p", "randomly", "--dist", "worksteal")),
    "busy": Environment("a loop that spins on each core beside it"),
    "bare": Environment(
        "an empty HOME and TMPDIR, no hub, few open files, another locale, time zone and width of the terminal",
        {"LC_ALL": "C", "TZ": "Pacific/Kiritimati", "COLUMNS": "40", "HF_HUB_OFFLINE": "1"},
    ),
}
PROCESSORS = ("scalar", "avx2", "onednn-sse41", "onednn-avx2", "mkl-compatible")
ALL = (*PROCESSORS, *(f"{name}+threads" for name in PROCESSORS), "random", "busy", "bare")


class Result(NamedTuple):
    name: str
    passed: int
    failed: int
    seconds: float


@contextlib.contextmanager
def new_home() -> Iterator[dict[str, str]]:
    """Yield variables that name empty folders, which are gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="radix-home-"))
    (home / "tmp").mkdir()
    try:
        caches = {f"XDG_{kind}_HOME": str(home / kind.lower()) for kind in ("CACHE", "CONFIG", "DATA", "STATE")}
        yield {"HOME": str(home), "TMPDIR": str(home / "tmp"), **caches}
    finally:
        shutil.rmtree(home, ignore_errors=True)


def open_few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def run_command(command: list[str], variables: dict[str, str], log: Path, few_files: bool) -> int:
    """Return the exit status. All processes are gone afterwards, those of pytest-xdist too."""
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | variables, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=open_few_files if few_files else None,
        )  # fmt: skip
        try:
            return process.wait(LONGEST_RUN)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_tests(name: str, arguments: list[str]) -> Result:
    parts = name.split("+")
    report = LOGS / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
    # From a cache that environments share, inductor would take code that it wrote for other vector instructions.
    variables = {"TORCHINDUCTOR_CACHE_DIR": str(LOGS / f"{name}.inductor")}
    with contextlib.ExitStack() as stack:
        for part in parts:
            variables |= ENVIRONMENTS[part].variables
            command += ENVIRONMENTS[part].arguments
        if "random" in parts:
            command.append(f"--randomly-seed={random.randrange(2**32)}")
            print(f"{name}: {command[-1]}", flush=True)
        if "bare" in parts:
            variables |= stack.enter_context(new_home())
        if "busy" in parts:
            stack.enter_context(busy_processors())
        start = time.monotonic()
        status = run_command(command + arguments, variables, LOGS / f"{name}.log", few_files="bare" in parts)
        seconds = time.monotonic() - start
    counts = ElementTree.parse(report).find("testsuite").attrib if report.exists() else {}
    total, skipped, failures, errors = (int(counts.get(k, 0)) for k in ("tests", "skipped", "failures", "errors"))
    failed = failures + errors
    # Pytest that was stopped, or that found no test, is no success.
    return Result(name, total - skipped - failed, failed or int(status != 0), seconds)


def print_failures(name: str) -> None:
    log = LOGS / f"{name}.log"
    lines = log.read_text(errors="replace").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    print("\n".join(failed or lines[-20:]) + f"\n{log}", flush=True)


def environment(name: str) -> str:
    for part in name.split("+"):
        if part not in ENVIRONMENTS:
            raise argparse.ArgumentTypeError(f"{part!r} is none of {', '.join(ENVIRONMENTS)}")
    return name


def main() -> int:
    meanings = "\n".join(f"  {name:<16}{given.meaning}" for name, given in ENVIRONMENTS.items())
    parser = argparse.ArgumentParser(
        usage="%(prog)s [ENVIRONMENT ...] [-- PYTEST_ARGUMENT ...]", description=__doc__, epilog=meanings,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("environments", nargs="*", type=environment, help=f"all by default: {' '.join(ALL)}")
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    names = parser.parse_args(given[:end]).environments or ALL

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    LOGS.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    try:
        for name in names:
            results.append(run_tests(name, given[end + 1 :]))
            if results[-1].failed:
                print_failures(name)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        print(f"{'environment':<24}{'passed':>8}{'failed':>8}{'seconds':>9}")
        for name, passed, failed, seconds in results:
            print(f"{name:<24}{passed:>8,}{failed:>8,}{seconds:>9,.0f}")
    return int(any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
