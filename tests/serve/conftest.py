import faulthandler

import pytest

LIMIT = 60  # seconds of a test: one that waits for a thread that waits for it ends the run with all stacks


@pytest.fixture(autouse=True)
def _time_limit():
    faulthandler.dump_traceback_later(LIMIT, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()
