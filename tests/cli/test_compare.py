"""--compare: ways that take turns, notes where times can't be relied on; and data that does not share."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.commands import read_jsonl, score, write_jsonl
from helpers.language_models import needs_hf
from helpers.processes import run_python
from radix_ops.cli.compare import notes
from radix_ops.cli.timing import Timing, measure
from radix_ops.engine.batches import RunStats

pytest.importorskip("transformers")


class Machine:
    """A clock that goes on with the work, more slowly or faster by the time of day."""

    def __init__(self, slowness):
        self.now, self.slowness, self.log, self.progress = 0.0, slowness, [], []

    def work(self, folded, seconds):
        took = seconds * self.slowness(self.now)
        self.now += took
        self.log.append((folded, took))
        return took


class Way:
    """A Pass of so many batches, of which each takes so many seconds on a quiet machine."""

    def __init__(self, machine, folded, batches, seconds):
        self.machine, self.folded, self.batches, self.seconds = machine, folded, batches, seconds
        self.stats, self.gone, self.is_warm = RunStats(), 0, False

    def warm_up(self):
        self.is_warm = True

    def advance(self, on_batch, *, share=1.0, seconds=float("inf")):
        assert self.is_warm
        stretch, before = [], self.stats.seconds
        while self.gone < share * self.batches:
            if stretch and self.stats.seconds - before >= seconds:
                break
            self.stats.seconds += self.machine.work(self.folded, self.seconds)
            stretch.append(np.array([self.gone]))
            on_batch(stretch[-1], ())
            self.gone += 1
            self.machine.progress.append((self.folded, self.gone / self.batches))
        return stretch

    def repeat(self, batches):
        assert [int(batch[0]) for batch in batches] == list(range(len(batches)))
        return RunStats(seconds=sum(self.machine.work(self.folded, self.seconds) for _ in batches))


def timed(slowness, plain=(600, 5.0), folded=(150, 2.0)):
    machine = Machine(slowness)
    ways = {False: Way(machine, False, *plain), True: Way(machine, True, *folded)}
    done = {False: [], True: []}
    timing = measure(ways, {mode: lambda indices, found, mode=mode: done[mode].extend(indices) for mode in done})
    assert done == {False: list(range(plain[0])), True: list(range(folded[0]))}
    return timing, machine


def speed_up(timing):
    return timing.stats[False].seconds / timing.stats[True].seconds


@pytest.mark.parametrize(
    "slowness",
    [lambda now: 1, lambda now: 1 + now / 4000, lambda now: 3 if now > 1800 else 1, lambda now: 3 if now < 1500 else 1],
    ids=["quiet", "slower and slower", "busy at the end", "busy at the start"],
)
def test_a_machine_that_slows_down_slows_both_ways(slowness):
    timing, machine = timed(slowness)
    assert speed_up(timing) == pytest.approx(10, rel=0.05)
    assert len(timing.rounds) == 5
    assert all(ratio == pytest.approx(2.5, rel=0.05) for ratio in timing.ratios)
    # Whole runs, one behind the other, would be off by much.
    if slowness(10**6) != 1:
        first_half = sum(took for folded, took in machine.log[: len(machine.log) // 2])
        assert first_half != pytest.approx(sum(took for _, took in machine.log) / 2, rel=0.2)


@pytest.mark.parametrize(("plain", "folded"), [((11, 5.2), (3, 2.2)), ((3, 2.2), (11, 5.2)), ((500, 2.0), (2, 60.0))])
def test_the_ways_stay_beside_each_other(plain, folded):
    _, machine = timed(lambda now: 1, plain, folded)
    done = {False: 0.0, True: 0.0}
    for mode, share in machine.progress:
        done[mode] = share
        # Each is ahead by a part and a batch at most.
        assert abs(done[False] - done[True]) <= 1 / 64 + max(1 / plain[0], 1 / folded[0])


def test_short_input_is_measured_whole_in_every_round():
    timing, machine = timed(lambda now: 1, plain=(2, 0.5), folded=(1, 0.3))
    assert [folded for folded, _ in machine.log] == [False, False, True] + [True, False, False, False, False, True] * 2
    assert speed_up(timing) == pytest.approx(1 / 0.3)


def test_a_round_that_was_disturbed_does_not_count():
    disturbed = iter([9.0, 1.0, 1.0])
    timing, _ = timed(lambda now: next(disturbed, 1.0), plain=(2, 0.5), folded=(1, 0.3))
    assert speed_up(timing) == pytest.approx(1 / 0.3)
    assert len(timing.rounds) == 5
    assert notes(replace(timing, waiting=0.0)) == []


def test_rounds_take_a_bounded_time():
    timing, machine = timed(lambda now: 1, plain=(100, 600.0), folded=(25, 60.0))
    assert len(timing.rounds) == 2
    assert machine.now == 100 * 600 + 25 * 60 + 660


def times(*ratios, seconds=3.0):
    rounds = [{False: RunStats(seconds=ratio * seconds), True: RunStats(seconds=seconds)} for ratio in ratios]
    return {"stats": {}, "rounds": rounds}


def test_notes_say_why_times_cannot_be_relied_on():
    assert notes(Timing(**times(8.0, 8.5, 7.6), waiting=0.02)) == []
    (busy,) = notes(Timing(**times(8.0, 8.5, 7.6), waiting=0.48))
    assert busy.startswith("note: threads waited 48% of their time for a processor: other work runs here")
    (apart,) = notes(Timing(**times(8.0, 8.5, 7.0), waiting=0.02))
    assert apart.startswith("note: rounds of the same work differ by 21%. Compare again where it is quiet")
    assert notes(Timing(**times(8.0, 8.5, 7.6, 8.1, 3.0), waiting=0.02)) == []
    (apart,) = notes(Timing(**times(8.0, 7.0, 8.1, 3.0, 9.0), waiting=0.02))
    assert apart.startswith("note: rounds of the same work differ by 16%")
    (short,) = notes(Timing(**times(8.0, 3.0, seconds=0.001), waiting=0.5))
    assert short == "note: these runs are too short to compare their times; more input makes them longer"


WAIT = """
import json, os, subprocess, sys, time
from radix_ops.cli.contention import Contention
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
busy = "import time; end = time.time() + 60; all(time.time() < end for _ in iter(int, 1))"
others = [subprocess.Popen([sys.executable, "-c", busy]) for _ in range(2)]
contention = Contention()
with contention.measured():
    end = time.process_time() + 0.5
    while time.process_time() < end: pass
for other in others: other.kill()
print(json.dumps(contention.share))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not Path("/proc/self/schedstat").exists(), reason="the kernel counts no waiting"
)
def test_waiting_for_a_processor_that_others_hold_is_seen():
    # Three processes share one processor, two of which only hold it.
    assert len(os.sched_getaffinity(0)) > 0
    assert 0.3 < json.loads(run_python("-c", WAIT).stdout) < 1


# They share the token that the tokenizer puts before each.
STRANGERS = [
    {"context": f"{word} is a river, and so on, " * 8, "choices": [" old"]} for word in ("one", "Seine", "two")
]


def test_data_that_does_not_share_runs_plain_and_resumes(model_folder, tmp_path, capsys):
    needs_hf()
    questions, output, plain = (tmp_path / name for name in ("questions.jsonl", "scores.jsonl", "plain.jsonl"))
    write_jsonl(questions, STRANGERS)
    assert score(model_folder, "--output", output, questions) == 0
    said = capsys.readouterr().err
    ratio = re.search(
        r"^(1\.0\d) tokens a row: folding can't pay here, so batches run plain; `radix-ops inspect` says more$",
        said,
        re.MULTILINE,
    )
    assert ratio
    assert score(model_folder, "--plain", "--output", plain, questions) == 0
    assert "tokens a row" not in capsys.readouterr().err
    assert output.read_bytes() == plain.read_bytes()

    # A run that was stopped behind its first line goes on.
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[0])
    assert score(model_folder, "--output", output, questions) == 0
    assert "holds 1 of 3 results already" in capsys.readouterr().err
    assert output.read_bytes() == whole

    # A comparison runs both, and leaves what a run would.
    output.unlink()
    assert score(model_folder, "--compare", "--output", output, questions) == 0
    out, said = capsys.readouterr()
    assert f"{ratio[1]} tokens a row: folding can't pay here; `radix-ops inspect` says more" in said
    assert re.search(r"^rows computed +\d+ +\d+$", out, re.MULTILINE)
    assert [line["key"] for line in read_jsonl(output)] == [line["key"] for line in read_jsonl(plain)]


def test_a_comparison_of_data_that_shares_leaves_what_a_run_would(model_folder, tmp_path, capsys):
    needs_hf()
    questions, compared, scored = (tmp_path / name for name in ("questions.jsonl", "compared.jsonl", "scored.jsonl"))
    write_jsonl(questions, [{"context": "the river flows through Paris", "choices": [" on", " to the sea"]}])
    assert score(model_folder, "--compare", "--output", compared, questions) == 0
    assert score(model_folder, "--output", scored, questions) == 0
    assert "tokens a row" not in capsys.readouterr().err
    assert [line["key"] for line in read_jsonl(compared)] == [line["key"] for line in read_jsonl(scored)]
