"""radix_ops.hf while torch traces or transforms a computation, under its modes and with other parameters."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, stack_module_state
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from helpers.hf_models import TREE, Witness, assert_same, build, error, pad
from radix_ops import hf

IDS, MASK = pad(TREE, "right")
REAL = MASK.bool()
TRANSFORM = "vmap, jvp or another transform is at work"
UNCACHED = {"use_cache": False}

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled"),
]


@pytest.fixture
def models():
    return build(attention="eager"), hf.enable(build(attention="eager"), threshold=1.0)


class Logits(torch.nn.Module):
    """Leads from one tensor to another, as tracers want it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, mask):
        return self.model(ids, mask, use_cache=False).logits


def test_exported_program_is_the_plain_models(models):
    plain, model = models
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "radix_ops")
        program = torch.export.export(Logits(model), (IDS, MASK), strict=False).module()
    other = (IDS + 1) % 60, MASK.roll(1, 0)
    torch.testing.assert_close(program(*other), plain(*other).logits)
    assert (model.radix_stats.folded, model.radix_stats.skipped) == (0, 0)
    model(IDS, MASK)
    assert model.radix_stats.folded == 1


def test_compiling_the_full_graph_and_strict_export_say_what_to_do(models):
    whole = torch.compile(models[1], fullgraph=True, backend="eager")
    message = r"compile with fullgraph=False, export with strict=False, or call radix_ops\.hf\.disable\(model\) before"
    with pytest.raises(Exception, match=message):
        whole(IDS, MASK)
    with pytest.raises(Exception, match=message):
        torch.export.export(Logits(models[1]), (IDS, MASK), strict=True)
    hf.disable(models[1])
    with torch.no_grad():
        got, want = whole(IDS, MASK, **UNCACHED).logits, models[0](IDS, MASK).logits
    torch.testing.assert_close(got, want)


@torch.no_grad()
@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        (lambda model: torch.jit.trace(Logits(model), (IDS, MASK), check_trace=False), "torch.jit traces the model"),
        (lambda model: make_fx(Logits(model))(IDS, MASK), "ProxyTorchDispatchMode is at work"),
    ],
    ids=["torch.jit", "make_fx"],
)
def test_traced_program_is_the_plain_models(models, trace, reason):
    plain, model = models
    with pytest.warns(UserWarning, match=f"a batch runs unfolded because {reason}"):
        program = trace(model)
    other = (IDS + 1) % 60, MASK
    torch.testing.assert_close(program(*other)[REAL], plain(*other).logits[REAL])
    assert model.radix_stats.folded == 0


def test_fake_tensors_run_unfolded(models):
    plain, model = models
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids, mask = mode.from_tensor(IDS), mode.from_tensor(MASK)
        with pytest.warns(UserWarning, match="FakeTensorMode is at work"):
            got = model(ids, mask)
        assert got.keys() == plain(ids, mask).keys()
    with pytest.warns(UserWarning, match="input_ids is a FakeTensor"):
        assert model(ids, mask).logits.shape == got.logits.shape
    assert model.radix_stats == hf.RadixStats(tokens=2 * IDS.numel(), rows=2 * IDS.numel(), skipped=2)


def test_model_of_fake_tensors_is_refused():
    model = build()
    with FakeTensorMode():
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(60, 32))
    with pytest.raises(ValueError, match="lm_head.weight is a torch._subclasses.fake_tensor.FakeTensor"):
        hf.enable(model)


class Named(torch.Tensor):
    """Does nothing of its own."""


@torch.no_grad()
@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "position_ids"])
def test_input_of_another_kind_of_tensor_runs_unfolded(models, name):
    plain, model = models
    given = {"input_ids": IDS, "attention_mask": MASK, "position_ids": torch.arange(IDS.shape[1])[None]}
    given[name] = given[name].as_subclass(Named)
    with pytest.warns(UserWarning, match=f"a batch runs unfolded because {name} is a Named"):
        got = model(**given).logits
    assert_same(got.as_subclass(torch.Tensor), plain(**given).logits.as_subclass(torch.Tensor))


def test_flops_are_counted_of_what_runs(models):
    counts = []
    for model in models:
        with FlopCounterMode(display=False) as counter, contextlib.ExitStack() as expected:
            if model is models[1]:
                expected.enter_context(pytest.warns(UserWarning, match="a hook on all modules would see rows"))
            model(IDS, MASK).logits.sum().backward()
        counts.append(counter.get_flop_counts())
    assert counts[0] == counts[1]


class PassOn(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "mode",
    [
        Witness,
        PassOn,
        deterministic,
        lambda: torch.device("meta"),  # tensors are made there by default
        torch.autograd.detect_anomaly,
        torch.autograd.graph.save_on_cpu,
    ],
    ids=["dispatch mode", "function mode", "deterministic", "default device", "anomalies", "saved on the CPU"],
)
def test_modes_in_which_batches_fold(models, mode):
    def results(model):
        with mode():
            out = model(IDS, MASK, labels=IDS.masked_fill(~REAL, -100))
            return [out.logits[REAL], *torch.autograd.grad(out.loss, list(model.parameters()))]

    with warnings.catch_warnings():
        warnings.filterwarnings("error", "radix_ops")
        got = results(models[1])
    assert models[1].radix_stats.folded == 1
    for ours, theirs in zip(got, results(models[0]), strict=True):
        assert error(ours, theirs.double()) < 1e-5


def test_inference_mode(models):
    with torch.inference_mode():
        got, want = (model(IDS, MASK).logits[REAL] for model in reversed(models))
        assert got.is_inference()
        torch.testing.assert_close(got, want)
    assert models[1].radix_stats.folded == 1


def called(model, parameters, *arguments):
    return functional_call(model, parameters, arguments, UNCACHED).logits


def _stacked(model):
    """Return the logits of three models at once."""
    members = [build(attention="eager") for _ in range(3)]
    for factor, member in enumerate(members):
        member.requires_grad_(False)
        for parameter in member.parameters():
            parameter *= 1 + factor / 10
    parameters, buffers = stack_module_state(members)
    return torch.func.vmap(lambda p, b: called(model, (p, b), IDS))(parameters, buffers)


def _gradients(model):
    parameters = dict(model.named_parameters())
    return torch.func.grad(lambda p: called(model, p, IDS, MASK)[REAL].square().mean())(parameters)


def _per_sample_gradients(model):
    def loss(parameters, ids):
        return called(model, parameters, ids[None]).square().mean()

    parameters = {"model.norm.weight": model.model.norm.weight}
    return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, IDS)


def _tangents(model):
    parameters = dict(model.named_parameters())
    ones = {name: torch.ones_like(parameter) for name, parameter in parameters.items()}
    return torch.func.jvp(lambda p: called(model, p, IDS), (parameters,), (ones,))


def _jacobian(transform):
    def jacobian(model):
        parameters = {"model.norm.weight": model.model.norm.weight}
        return transform(lambda p: called(model, p, IDS)[:, :3, 0])(parameters)

    return jacobian


@pytest.mark.parametrize(
    "transform",
    [
        _stacked,
        _gradients,
        _per_sample_gradients,
        _tangents,
        _jacobian(torch.func.jacrev),
        _jacobian(torch.func.jacfwd),
    ],
    ids=["vmap of parameters", "grad", "vmap of grad", "jvp", "jacrev", "jacfwd"],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_over_parameters_run_unfolded(models, transform):
    plain, model = models
    want = transform(plain)
    with pytest.warns(UserWarning, match=TRANSFORM):
        got = transform(model)
    torch.testing.assert_close(got, want)
    assert model.radix_stats.folded == 0


def test_functional_call_folds_with_the_parameters_that_it_is_given(models):
    plain, model = models
    model(IDS, MASK)  # it is verified, with the model's own parameters
    results = []
    for each in (plain, model):
        parameters = {name: (1.5 * p.detach()).requires_grad_() for name, p in plain.named_parameters()}
        logits = called(each, parameters, IDS, MASK)[REAL]
        results.append([logits, *torch.autograd.grad(logits.square().mean(), list(parameters.values()))])
    assert model.radix_stats.folded == 2
    for want, got in zip(*results, strict=True):
        assert error(got, want.double()) < 1e-5
