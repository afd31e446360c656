"""Which flash attention runs, by packages that are not there: fakes that compute on the CPU, right or wrong."""

from __future__ import annotations

import importlib.metadata
import warnings

import pytest
import torch

import radix_ops
from radix_ops import activate_flash_attention, current_flash_attention, reference
from radix_ops.graphs.circumstances import settings
from radix_ops.ops import flash, flash_packages, varlen
from radix_ops.ops.flash_calls import Calls

CU_Q, CU_K = torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 3, 7], dtype=torch.int32)
FA3, FA4 = "fa3-fwd", "flash-attn-4"
VERSIONS = {FA3: "0.0.3", FA4: "4.0.0b36"}


class Fake:
    """Attention in float64, rounded, with the logsumexp that its backward checks; `spoil` changes what it returns."""

    def __init__(self, name: str, spoil_forward=None, spoil_backward=None):
        self.name, self.count = name, {"forward": 0, "backward": 0}
        self.spoil = {"forward": spoil_forward or (lambda *x: x), "backward": spoil_backward or (lambda *x: x)}
        self.error: Exception | None = None

    def _returned(self, part: str, *results):
        self.count[part] += 1
        if self.error is not None:
            raise self.error
        return self.spoil[part](*results)

    def forward(self, q, k, v, runs):
        tables = runs.cu_seqlens_q, runs.cu_seqlens_k, runs.scale, runs.window
        out = varlen.varlen_attention(q.double(), k.double(), v.double(), *tables)
        return self._returned("forward", out.to(q.dtype), torch.zeros(q.shape[1], q.shape[0]))

    def backward(self, grad_out, q, k, v, out, logsumexp, runs):
        exact = (x.double() * (1 + float(logsumexp.sum())) for x in (grad_out, q, k, v))
        tables = runs.cu_seqlens_q, runs.cu_seqlens_k, runs.scale, runs.window
        gradients = varlen.varlen_attention_backward(*exact, *tables)
        return self._returned("backward", *(x.to(q.dtype) for x in gradients))

    def calls(self) -> Calls:
        return Calls(self.forward, self.backward)


@pytest.fixture
def fakes(monkeypatch):
    """Install a fake of each package, and of torch's kernels, on a GPU that is Hopper's."""
    fakes = {name: Fake(name) for name in ("torch", FA3, FA4)}
    packages = {name: package._replace(load=fakes[name].calls) for name, package in flash_packages._PACKAGES.items()}
    monkeypatch.setattr(flash_packages, "_PACKAGES", packages)
    monkeypatch.setattr(flash_packages, "TORCH", fakes["torch"].calls())
    monkeypatch.setattr(flash_packages, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)  # a torch for the CPU has none
    monkeypatch.setattr(flash_packages, "_active", None)
    monkeypatch.setattr(flash_packages, "_loaded", {})
    monkeypatch.setattr(flash_packages, "_is_right", {})
    monkeypatch.delenv("RADIX_OPS_FLASH_ATTENTION", raising=False)
    monkeypatch.setattr(importlib.metadata, "version", VERSIONS.__getitem__)
    return fakes


def inputs(heads=4, kv_heads=2, dim=32, dtype=torch.bfloat16):
    return [torch.randn(rows, h, dim, dtype=dtype) for rows, h in ((3, heads), (7, kv_heads), (7, kv_heads))]


def attend(q, k, v, window=0, scale=0.2):
    return flash.flash_attention(q, k, v, CU_Q, CU_K, 3, 2, 4, scale, window)


def differentiate(q, k, v, window=0):
    out, logsumexp = attend(q, k, v, window)
    return flash.flash_attention_backward(out, q, k, v, out, logsumexp, CU_Q, CU_K, 3, 2, 4, 0.2, window)


def runs_of(fakes, function, *arguments, **options) -> dict[str, tuple[int, int]]:
    """Return who ran a forward and a backward in a call, behind the comparison of its kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(*arguments, **options)
    for fake in fakes.values():
        fake.count = {"forward": 0, "backward": 0}
    function(*arguments, **options)
    return {name: tuple(fake.count.values()) for name, fake in fakes.items() if any(fake.count.values())}


def test_torchs_runs_until_a_package_is_activated(fakes):
    assert current_flash_attention() == "torch"
    assert runs_of(fakes, attend, *inputs()) == {"torch": (1, 0)}
    activate_flash_attention(FA3)
    assert current_flash_attention() == FA3
    assert runs_of(fakes, attend, *inputs()) == {FA3: (1, 0)}
    activate_flash_attention("torch")
    assert runs_of(fakes, attend, *inputs()) == {"torch": (1, 0)}


def test_torchs_own_switch_stays_as_it_is(fakes, monkeypatch):
    monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl", None)
    activate_flash_attention(FA4)
    attend(*inputs())
    assert torch.nn.attention.current_flash_attention_impl() is None


@pytest.mark.parametrize("name", [FA3, FA4])
def test_results_are_those_of_attention(fakes, name):
    activate_flash_attention(name)
    q, k, v = inputs()
    want = reference.varlen_attention(q.double(), k.double(), v.double(), CU_Q, CU_K, 0.2)
    torch.testing.assert_close(attend(q, k, v)[0].double(), want, rtol=1e-2, atol=1e-2)


def test_gradients_are_the_packages_where_it_has_a_backward(fakes):
    activate_flash_attention(FA3)
    assert runs_of(fakes, differentiate, *inputs()) == {FA3: (1, 0), "torch": (0, 1)}
    activate_flash_attention(FA4)
    assert runs_of(fakes, differentiate, *inputs()) == {FA4: (1, 1)}


def test_a_forward_is_the_same_with_and_without_gradients(fakes):
    """Whether a backward follows must not choose the kernel, nor may a backward that is refused."""
    fakes[FA4].spoil["backward"] = lambda *gradients: [2 * x for x in gradients]
    activate_flash_attention(FA4)
    assert runs_of(fakes, attend, *inputs()) == {FA4: (1, 0)}
    with pytest.warns(UserWarning, match="the backward of flash-attn-4"):
        differentiate(*inputs())
    assert runs_of(fakes, attend, *inputs()) == {FA4: (1, 0)}
    assert runs_of(fakes, differentiate, *inputs()) == {FA4: (1, 0), "torch": (0, 1)}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (FA3, {"dtype": torch.float16}),
        (FA3, {"window": 2}),
        (FA4, {"dim": 24}),
        (FA4, {"dim": 80}),
        (FA4, {"dim": 160}),
        (FA3, {"scale": 0.0}),
        (FA4, {"scale": -0.2}),
    ],
)
def test_what_was_not_tried_is_torchs(fakes, name, how):
    activate_flash_attention(name)
    options = {key: how[key] for key in ("window", "scale") if key in how}
    shape = {key: how[key] for key in ("dim", "dtype") if key in how}
    assert runs_of(fakes, attend, *inputs(**shape), **options) == {"torch": (1, 0)}


@pytest.mark.parametrize("how", [{"dtype": torch.float16}, {"dim": 256}, {"window": 2}, {"dim": 30}])
def test_flash_attention_4_takes_what_was_tried(fakes, how):
    activate_flash_attention(FA4)
    options = {"window": how.pop("window", 0)}
    assert runs_of(fakes, differentiate, *inputs(**how), **options) == {FA4: (1, 1)}


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_another_gpu_runs_torchs(fakes, monkeypatch, capability):
    monkeypatch.setattr(flash_packages, "_capability", lambda device: capability)
    activate_flash_attention(FA4)
    assert runs_of(fakes, attend, *inputs()) == {"torch": (1, 0)}


def test_a_kind_is_compared_once(fakes):
    activate_flash_attention(FA4)
    attend(*inputs())
    first = fakes["torch"].count["forward"]
    assert first > 0
    for _ in range(3):
        attend(*inputs())
    assert fakes["torch"].count["forward"] == first
    attend(*inputs(heads=6))
    assert fakes["torch"].count["forward"] == 2 * first


WRONG = {
    "an output": lambda out, logsumexp: (out * 1.01, logsumexp),
    "one head": lambda out, logsumexp: (out.index_fill(1, torch.tensor([1]), 0), logsumexp),
    "no number": lambda out, logsumexp: (out * float("nan"), logsumexp),
    "a logsumexp": lambda out, logsumexp: (out, logsumexp + 0.1),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_kind_that_is_wrong_stays_with_torchs(fakes, wrong):
    fakes[FA3].spoil["forward"] = WRONG[wrong]
    activate_flash_attention(FA3)
    named = "the gradient of" if wrong == "a logsumexp" else "the output"
    with pytest.warns(UserWarning, match=f"^radix_ops: the forward of fa3-fwd .* is not used: {named}") as seen:
        attend(*inputs())
    assert len(seen) == 1
    assert runs_of(fakes, attend, *inputs()) == {"torch": (1, 0)}
    fakes[FA3].spoil["forward"] = lambda *results: results
    assert runs_of(fakes, attend, *inputs(heads=6)) == {FA3: (1, 0)}


def test_a_package_that_raises_stays_with_torchs(fakes):
    fakes[FA4].error = RuntimeError("no kernel")
    activate_flash_attention(FA4)
    with pytest.warns(UserWarning, match="can't run, and torch's runs in its place: RuntimeError: no kernel") as seen:
        attend(*inputs())
    assert len(seen) == 1
    assert runs_of(fakes, attend, *inputs()) == {"torch": (1, 0)}


def test_deterministic_algorithms_refuse_a_backward_that_is_not(fakes):
    activate_flash_attention(FA4)
    torch.use_deterministic_algorithms(True)
    try:
        assert runs_of(fakes, differentiate, *inputs()) == {FA4: (1, 0), "torch": (0, 1)}
    finally:
        torch.use_deterministic_algorithms(False)
    assert runs_of(fakes, differentiate, *inputs()) == {FA4: (1, 1)}


def test_a_kind_is_not_compared_in_a_capture(fakes, monkeypatch):
    """The host would have to wait there."""
    activate_flash_attention(FA3)
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with pytest.warns(UserWarning, match="was not compared before a CUDA graph's capture"):
            attend(*inputs())
        assert fakes[FA3].count["forward"] == 0
    attend(*inputs())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runs_of(fakes, attend, *inputs()) == {FA3: (1, 0)}


def test_a_package_that_was_not_tried_in_graphs_is_not_captured(fakes, monkeypatch):
    activate_flash_attention(FA4)
    attend(*inputs())
    assert not flash_packages.may_be_captured()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="^flash-attn-4 was not tried in CUDA graphs: activate_flash_attention"):
        attend(*inputs())
    for name in ("torch", FA3):
        activate_flash_attention(name)
        assert flash_packages.may_be_captured()


def test_graphs_of_one_implementation_do_not_serve_another(fakes):
    keys = []
    for name in ("torch", FA3, FA4):
        activate_flash_attention(name)
        keys.append(settings())
    assert len(set(keys)) == 3


@pytest.mark.parametrize("name", ["fa3", "", "FA3", None, 3])
def test_another_name_is_refused(fakes, name):
    activate_flash_attention(FA3)
    with pytest.raises(ValueError, match="flash attention must be one of 'torch', 'fa3-fwd', 'flash-attn-4', got"):
        activate_flash_attention(name)
    assert current_flash_attention() == FA3


def test_a_package_that_is_missing_is_refused(fakes, monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(RuntimeError, match=r"^the package fa3-fwd is not installed: pip install fa3-fwd==0\.0\.3$"):
        activate_flash_attention(FA3)
    assert current_flash_attention() == "torch"


@pytest.mark.parametrize("version", ["0.0.4", "0.0.3.post1", "3.0.0"])
def test_a_version_that_was_not_tried_is_refused(fakes, monkeypatch, version):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(RuntimeError, match=f"^fa3-fwd {version} is installed, and radix_ops was tried with 0.0.3: "):
        activate_flash_attention(FA3)


def test_a_package_that_does_not_load_is_refused(fakes, monkeypatch):
    def load():
        raise ImportError("undefined symbol")

    packages = {FA3: flash_packages._PACKAGES[FA3]._replace(load=load)}
    monkeypatch.setattr(flash_packages, "_PACKAGES", packages)
    with pytest.raises(RuntimeError, match=r"^fa3-fwd 0\.0\.3 does not load beside torch .*: undefined symbol$"):
        activate_flash_attention(FA3)


def test_the_environment_chooses(fakes, monkeypatch):
    monkeypatch.setenv("RADIX_OPS_FLASH_ATTENTION", FA4)
    assert radix_ops.current_flash_attention() == FA4
    assert runs_of(fakes, attend, *inputs()) == {FA4: (1, 0)}
    activate_flash_attention("torch")
    assert current_flash_attention() == "torch"


def test_an_empty_variable_chooses_nothing(fakes, monkeypatch):
    monkeypatch.setenv("RADIX_OPS_FLASH_ATTENTION", "")
    assert current_flash_attention() == "torch"


def test_an_error_of_the_environment_names_the_variable(fakes, monkeypatch):
    monkeypatch.setenv("RADIX_OPS_FLASH_ATTENTION", "fa2")
    for _ in range(2):  # it is not forgotten
        with pytest.raises(
            ValueError, match="^the environment has RADIX_OPS_FLASH_ATTENTION=fa2: flash attention must"
        ):
            attend(*inputs())
    monkeypatch.setenv("RADIX_OPS_FLASH_ATTENTION", FA3)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
    with pytest.raises(RuntimeError, match="^the environment has RADIX_OPS_FLASH_ATTENTION=fa3-fwd: fa3-fwd 1 is"):
        attend(*inputs())
