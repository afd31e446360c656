"""Gradients on a torch without the private parts that kernels of our own need: torch.library's, and the same results.

A process of its own imports radix_ops while one of the parts is missing.
"""

from __future__ import annotations

import sys

import pytest
import torch
import torch._dynamo
import torch._functorch.autograd_function  # both take the part away before it is missing

from helpers import processes

PARTS = [
    ("torch._functorch.utils", "enable_single_level_autograd_function"),
    ("torch.autograd.function", "_SingleLevelFunction"),
    ("torch.autograd.forward_ad", "_current_level"),
    ("torch._C", "_AutoDispatchBelowAutograd"),
    ("torch._C", "_after_autograd_keyset"),
    ("torch._C.DispatchKeySet", "from_raw_repr"),
]


@pytest.mark.parametrize(("owner", "name"), PARTS)
def test_each_part_that_is_gone_is_noticed(owner, name, monkeypatch):
    from radix_ops.ops.autograd_kernels import _SingleLevel

    assert _SingleLevel.find() is not None
    monkeypatch.delattr(f"{owner}.{name}")
    assert _SingleLevel.find() is None


def results():
    """Return outputs and gradients of every op that has any, those of second order too, then of a compiled function."""
    from helpers.op_samples import GRADIENTS, ONCE, TWICE, op_of, outputs_of, samples_of, with_gradient

    torch.manual_seed(0)
    for name, kind in GRADIENTS.items():
        if not name.startswith("radix::") or kind not in (TWICE, ONCE):
            continue
        for arguments in samples_of(name, requires_grad=True):
            with torch.no_grad():
                yield from outputs_of(op_of(name), arguments)
            function, inputs = with_gradient(name, arguments)
            loss = sum(x.sin().sum() for x in function(*inputs))
            grads = torch.autograd.grad(loss, inputs, create_graph=kind == TWICE)
            yield from grads
            if kind == TWICE:
                yield from torch.autograd.grad(sum(x.sin().sum() for x in grads), inputs)
    yield from compiled_results()


def compiled_results():
    """Return those of one graph for two batches, forward and backward; recompiles are errors."""
    import radix_ops

    def function(table, batch):
        q = table[batch.input_ids].unflatten(-1, (4, 6))
        return batch.unfold(radix_ops.attention(q, q[:, :2], q[:, 2:], batch).flatten(1).sin())

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    table = torch.randn(31, 24, dtype=torch.float64, requires_grad=True)
    batches = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6], [8, 9], [1, 2]], [[*range(20), i] for i in range(20, 24)]
    torch._dynamo.reset()
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        torch.fx.experimental._config.patch(use_duck_shape=False),
    ):
        for sequences in batches:
            batch = radix_ops.FoldedBatch.from_sequences(sequences, pad_multiple_of=8)
            got, want = compiled(table, batch), function(table, batch)
            grads = [torch.autograd.grad(x.square().sum(), table)[0] for x in (got, want)]
            torch.testing.assert_close((got, grads[0]), (want, grads[1]))
            yield from (want, grads[1])


def test_results_are_the_same_bits(tmp_path):
    run = processes.run_python(__file__, tmp_path / "results.pt")
    assert run.returncode == 0, run.stderr
    got, want = torch.load(tmp_path / "results.pt"), [x.detach() for x in results()]
    assert len(got) == len(want) > 50
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def import_without_a_part():
    """Import radix_ops as torch without the part has it; torch is whole again behind that."""
    part = torch.autograd.function._SingleLevelFunction
    del torch.autograd.function._SingleLevelFunction
    from radix_ops.ops import autograd_kernels

    torch.autograd.function._SingleLevelFunction = part
    assert autograd_kernels._single_level is None


def check_gradients():
    from helpers.op_samples import GRADIENTS, TWICE, WITHOUT_KERNEL, check_gradient, op_of, samples_of

    for name, kind in GRADIENTS.items():
        if name.startswith("radix::") and (name, "CPU") not in WITHOUT_KERNEL:
            arguments = samples_of(name, requires_grad=True)[0]
            check_gradient(name, arguments)
            if kind == TWICE:
                torch.library.opcheck(op_of(name), arguments)


def check_transforms():
    """Check that torch refuses transforms of reverse mode, and we tangents, which torch.library drops."""
    from helpers.op_samples import op_of, outputs_of, samples_of

    for name in ("radix::gather", "radix::scatter_add.csr", "radix::varlen_attention", "radix::gather_kv"):
        x, *rest = samples_of(name)[0]

        def function(x, name=name, rest=rest):
            return outputs_of(op_of(name), (x, *rest))[0]

        def dual(x, function=function):
            with torch.autograd.forward_ad.dual_level():
                function(torch.autograd.forward_ad.make_dual(x, x))

        forward = lambda x: torch.func.jvp(function, (x,), (x,)), torch.func.jacfwd(function), dual
        for transformed in forward:
            with pytest.raises(RuntimeError, match=f"{name} has no forward-mode gradient with torch .*; use backward"):
                transformed(x)
        reverse = torch.func.grad(lambda x: function(x).sum()), torch.func.jacrev(function)
        for transformed in reverse:
            with pytest.raises(RuntimeError, match="autograd.Function with functorch transforms"):
                transformed(x)


if __name__ == "__main__":
    import_without_a_part()
    check_gradients()
    check_transforms()
    torch.save([x.detach() for x in results()], sys.argv[1])
