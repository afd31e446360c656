"""Ctrl-C while a model is put back is held until it is as it was."""

from __future__ import annotations

import signal
import threading

import pytest
import torch

from helpers.hf_models import build
from radix_ops import hf
from radix_ops._interrupts import uninterrupted
from radix_ops.engine.runners import TransformersRunner
from radix_ops.hf.forward import StackForward

IDS = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5]])


@pytest.fixture
def ctrl_c_while(monkeypatch):
    """Return a function that lets Ctrl-C come at the start of each call of a method."""

    def arm(owner, name):
        original = getattr(owner, name)

        def stopped(*args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, stopped)

    yield arm
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def check_as_before(model):
    assert "forward" not in vars(model)
    assert "forward" not in vars(model.model)
    assert not hasattr(model, "radix_stats")


def test_disable_is_done_before_the_interrupt(ctrl_c_while):
    model = hf.enable(build())
    ctrl_c_while(StackForward, "remove_owner")
    with pytest.raises(KeyboardInterrupt):
        hf.disable(model)
    check_as_before(model)


def test_folded_puts_back_before_the_interrupt(ctrl_c_while):
    model = build()
    ctrl_c_while(StackForward, "remove_owner")
    with pytest.raises(KeyboardInterrupt), hf.folded(model):
        pass
    check_as_before(model)


def test_folded_puts_back_what_an_interrupt_of_enable_left(ctrl_c_while):
    model = build()
    ctrl_c_while(StackForward, "add_owner")
    with pytest.raises(KeyboardInterrupt), hf.folded(model):
        pytest.fail("the interrupt came too late")
    check_as_before(model)


def test_folded_inside_enabled_restores_its_options_before_the_interrupt(ctrl_c_while):
    model = build()
    hf.enable(model.model, threshold=0)
    ctrl_c_while(StackForward, "remove_owner")
    with pytest.raises(KeyboardInterrupt), hf.folded(model, threshold=1.0):
        pass
    assert "forward" not in vars(model)
    model(IDS)
    assert (model.model.radix_stats.folded, model.model.radix_stats.skipped) == (0, 1)


def test_a_run_leaves_the_config_of_a_loaded_model_as_it_was(monkeypatch):
    model = build()
    before = dict(vars(model.config))
    assert model.config.use_cache

    class Config(type(model.config)):
        def __setattr__(self, name, value):
            if name == "use_cache" and value:
                signal.raise_signal(signal.SIGINT)
            super().__setattr__(name, value)

    runner = TransformersRunner(model)
    with pytest.raises(KeyboardInterrupt), runner.running(folded=False):
        model.config.__class__ = Config
    model.config.__class__ = Config.__base__
    assert vars(model.config) == before


def test_other_threads_and_handlers_keep_their_signals():
    caught = []
    before = signal.signal(signal.SIGINT, lambda *args: caught.append("ours"))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert caught == []
        assert caught == ["ours"]

        def work():
            with uninterrupted():
                caught.append("thread")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert caught == ["ours", "thread"]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
