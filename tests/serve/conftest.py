import faulthandler
import signal
import sys

import pytest

LIMIT = 60  # seconds of a test; one that waits for a thread that waits for it would wait for ever


@pytest.fixture(autouse=True)
def _time_limit():
    def give_up(number, frame):
        faulthandler.dump_traceback(sys.__stderr__)
        raise TimeoutError(f"the test took more than {LIMIT} s; all stacks are above")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
