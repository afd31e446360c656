"""Guards over every op of torch.ops.radix and radix_losses, by the dispatcher's own list of them.

Each has samples for opcheck, a gradient or a reason, a kernel on each device or a reason, and a graph of its own under
torch.compile. The tables are in `helpers/op_samples.py`.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

from helpers import processes
from helpers.op_samples import (
    CAPABILITIES,
    FOR_TESTS,
    GRADIENTS,
    HALF,
    INTEGERS,
    ONCE,
    PART,
    SAMPLES,
    TWICE,
    WITHOUT_KERNEL,
    check_gradient,
    op_of,
    outputs_of,
    samples_of,
)
from radix_ops.ops import dispatch

NAMES = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith(("radix::", "radix_losses::")) and name not in FOR_TESTS
)
every_op = pytest.mark.parametrize("name", NAMES)


def runnable_samples(name, device, dtype=None, requires_grad=False):
    """Return the op's samples, of which there must be some; skip where the device has no kernel for it."""
    assert name in SAMPLES, f"{name} has no samples in helpers/op_samples.py"
    if (name, device.upper()) in WITHOUT_KERNEL:
        pytest.skip(f"{name} on {device}: {WITHOUT_KERNEL[name, device.upper()]}")
    if device == "cuda" and CAPABILITIES.get(name) not in (None, torch.cuda.get_device_capability()):
        pytest.skip(f"{name} is for another GPU")
    dtype = dtype or (torch.bfloat16 if GRADIENTS.get(name) in (HALF, PART) else torch.float64)
    samples = samples_of(name, device, dtype, requires_grad)
    assert samples, f"{name} has no samples in helpers/op_samples.py"
    return samples


@every_op
def test_opcheck(name, device):
    kind = GRADIENTS.get(name)
    dtypes, needs_gradient, tolerance = [torch.float64], [kind == ONCE], {}
    if kind in (TWICE, ONCE) and name.startswith("radix::"):
        dtypes, needs_gradient = [torch.float64, torch.float32, torch.bfloat16], [False, True]
    elif kind in (HALF, PART):
        dtypes = [torch.bfloat16, torch.float16]
        needs_gradient = [False, kind == HALF and not name.endswith("_backward")]
        tolerance = {"rtol": 1e-2, "atol": 1e-2}  # a backward is not the same bits on every run
    for dtype in dtypes:
        for needed in needs_gradient:
            for arguments in runnable_samples(name, device, dtype=dtype, requires_grad=needed):
                torch.library.opcheck(op_of(name), arguments, **tolerance)


@every_op
def test_gradient(name, device):
    assert name in GRADIENTS, f"{name} has neither a gradient nor a reason in helpers/op_samples.py"
    kind = GRADIENTS[name]
    if kind in (HALF, PART):
        assert name in SAMPLES
        return
    for arguments in runnable_samples(name, device, requires_grad=kind != INTEGERS):
        check_gradient(name, arguments)


@every_op
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_kernel(name, key):
    refuses = (name, key) in dispatch.REFUSALS
    if (name, key) in WITHOUT_KERNEL:
        assert refuses, f"{name} on {key} says no reason to who calls it"
        return
    if refuses and key == "CUDA" and (name in CAPABILITIES or ("radix::gather", "CUDA") in dispatch.REFUSALS):
        pytest.skip("this build of radix_ops has no kernels in C++ for CUDA, or for this GPU")
    has_kernel = any(map(op_of(name).has_kernel_for_dispatch_key, (key, "CompositeExplicitAutograd")))
    computes = has_kernel and not refuses
    assert computes, f"{name} has neither a kernel on {key} nor a reason in helpers/op_samples.py"


@every_op
def test_compiles_as_one_graph(name, device):
    """Sizes are dynamic, forward and, where there is one, backward; opcheck traces what is below dynamo."""
    needs_gradient = GRADIENTS.get(name) in (TWICE, ONCE)
    op = op_of(name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: op(*arguments), backend="aot_eager", fullgraph=True, dynamic=True)
    for arguments in runnable_samples(name, device, requires_grad=needs_gradient)[:3]:
        got, want = (outputs_of(function, arguments) for function in (compiled, op))
        if GRADIENTS.get(name) in (HALF, PART):  # no kernel writes the logsumexp of padding rows
            got, want = ([x for x in y if x.dtype != torch.float32] for y in (got, want))
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)
            continue
        torch.testing.assert_close(got, want)
        if needs_gradient:
            inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
            losses = got[0].square().sum(), want[0].square().sum()
            torch.testing.assert_close(*(torch.autograd.grad(x, inputs, allow_unused=True) for x in losses))


def test_an_op_that_lacks_them_fails_every_guard():
    run = processes.run_python(__file__)
    failed = dict(re.findall(r"^FAILED \S+?::(\S+) - AssertionError: (.*)$", run.stdout, re.MULTILINE))
    no_samples = "has no samples in helpers/op_samples.py"
    no_gradient = "has neither a gradient nor a reason in helpers/op_samples.py"

    def no_kernel(key):
        return f"has neither a kernel on {key} nor a reason in helpers/op_samples.py"

    want = (
        {f"test_opcheck[cpu-{name}]": f"{name} {no_samples}" for name in BARE}
        | {f"test_gradient[cpu-{name}]": f"{name} {no_gradient}" for name in BARE}
        | {f"test_compiles_as_one_graph[cpu-{name}]": f"{name} {no_samples}" for name in BARE}
        | {f"test_kernel[{key}-radix::bare]": f"radix::bare {no_kernel(key)}" for key in ("CPU", "CUDA")}
        | {"test_kernel[CUDA-radix::half_done]": f"radix::half_done {no_kernel('CUDA')}"}
    )
    assert failed == want, run.stdout + run.stderr


BARE = "radix::bare", "radix::half_done"


def run_with_bare_ops():
    """Run the guards of an op that has a schema alone, and of one that has a kernel on the CPU too."""
    library = torch.library.Library("radix", "FRAGMENT")
    for name in BARE:
        library.define(f"{name.partition('::')[2]}(Tensor x) -> Tensor")
    library.impl("half_done", torch.clone, "CPU")
    options = "-q", "-p", "no:cacheprovider", "-m", "not cuda", "-k", "bare or half_done", "--tb=no"
    os.environ["COLUMNS"] = "1000"  # reasons are cut where a line ends
    pytest.main([__file__, *options])


if __name__ == "__main__":
    run_with_bare_ops()
