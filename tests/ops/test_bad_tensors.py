"""Tensors that no op takes, whatever they hold: on other devices, missing, in storages too small or too large."""

from __future__ import annotations

import re

import pytest
import torch

from helpers.small_calls import CALLS, to

RADIX = torch.ops.radix
PYTHON_KERNELS = ("attention",)
each_call = pytest.mark.parametrize(("op", "arguments"), CALLS, ids=[op.name() for op, _ in CALLS])


@each_call
def test_a_build_or_a_torch_without_cuda_refuses_cuda_tensors(op, arguments):
    """The test runs what the dispatcher would run for CUDA tensors."""
    if any(part in op.name() for part in PYTHON_KERNELS):
        return  # they run wherever torch does
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(
        RuntimeError, match=r"^radix::\S+: (a tensor is on a CUDA device, (and this build|but the installed torch)|no)"
    ):
        op.redispatch(cuda, *arguments)


@each_call
def test_tensors_on_two_devices_are_refused(op, arguments):
    if op is RADIX.flash_attention.default:
        with pytest.raises(RuntimeError, match="^radix::flash_attention: tensors must be on a CUDA device"):
            op(*arguments)
        return
    if op is RADIX.unpad.default:
        return  # of one tensor
    for position, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            mixed = [*arguments[:position], argument.to("meta"), *arguments[position + 1 :]]
            with pytest.raises(RuntimeError, match="all tensors must be on one device|must be on the CPU"):
                op(*mixed)


@each_call
def test_none_is_refused(op, arguments, device):
    if any(part in op.name() for part in PYTHON_KERNELS):
        return  # whose schema refuses it
    if op is RADIX.unpad.default:
        return  # without its only tensor there is no device, and the dispatcher finds no kernel
    for position, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            given = to(device, arguments)
            given[position] = None
            with pytest.raises(RuntimeError, match=r"^radix::\S+: \w+ must be a tensor, got None$"):
                op(*given)


def test_a_storage_resized_below_its_tensor_is_refused(device):
    """FSDP frees a parameter's memory so and leaves its shape."""
    for op, arguments in CALLS:
        if op is RADIX.flash_attention.default and device == "cpu":
            continue  # which refuses all tensors there
        for position, argument in enumerate(arguments):
            for left in (0, 1) if isinstance(argument, torch.Tensor) else ():
                given = to(device, arguments)
                # The tensor stands behind an offset, which counts as well.
                given[position] = torch.stack([argument, argument]).to(device)[1]
                size = given[position].untyped_storage().nbytes()
                given[position].untyped_storage().resize_(left * (size - 1))
                message = (
                    f"^radix::[a-z_.]+: \\w+ claims {size} bytes of a storage that holds {left * (size - 1)}; it was"
                )
                with pytest.raises(RuntimeError, match=message):
                    op(*given)


def test_a_row_alone_may_claim_any_stride():
    x = torch.arange(4.0).as_strided((1, 4), (2**62, 1))
    assert RADIX.gather(x, torch.tensor([0, 0])).tolist() == [[0, 1, 2, 3]] * 2
    assert RADIX.scatter_add(x, torch.tensor([1]), 2).tolist() == [[0, 0, 0, 0], [0, 1, 2, 3]]


@pytest.mark.cuda
@each_call
def test_tensors_on_the_cpu_and_on_cuda_are_refused(op, arguments):
    if op is RADIX.unpad.default:
        return  # of one tensor
    for position, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            mixed = to("cuda", arguments)
            mixed[position] = argument
            message = (
                " is on (another device than|cpu and others on|cuda:0 and others on) (cuda:0|cpu); all tensors must"
            )
            with pytest.raises(RuntimeError, match=f"^radix::\\S+: \\w+{message} be on one device$"):
                op(*mixed)


def test_a_tensor_that_memory_does_not_hold_is_an_error():
    with pytest.raises(RuntimeError, match=re.escape("out of memory for a tensor of shape [2147483647, 4194304]")):
        RADIX.scatter_add(torch.zeros(1).expand(1, 2**22), torch.tensor([0]), 2**31 - 1)
