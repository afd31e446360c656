"""The private parts of torch that the package uses, each with its tests: a release may drop any of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import radix_ops

PACKAGE = Path(radix_ops.__file__).parent
FALLBACK = "a fallback: tests/ops/test_autograd_fallback.py"
TYPE = "a type hint, which nothing evaluates"
DOCUMENTED = "torch documents it for whoever writes code that compiles"
NO_WAIT = "no other assert leaves the host running; the test of each use finds it missing"
TRACING = "no public way tells a transform or a tracer at work; tests/hf/test_modes.py enters each"
MODES = "no public way tells modes of users; tests/graphs/test_cuda.py enters each"
USES = {
    "_integers.py": {"torch._assert_async": NO_WAIT},
    "batch.py": {"torch._assert_async": NO_WAIT, "torch._check": DOCUMENTED},
    "graphs/capture.py": {
        "torch._C._cuda_endAllocateToPool": "else a capture that broke off goes on; tests/graphs/test_cuda.py has some",
        "torch._C._cuda_releasePool": "the same",
    },
    "graphs/circumstances.py": {
        "torch._C._functorch.peek_interpreter_stack": TRACING,
        "torch._C._get_function_stack_at": MODES,
        "torch._C._len_torch_dispatch_stack": MODES,
        "torch._C._len_torch_function_stack": MODES,
        "torch.autograd.forward_ad._current_level": TRACING,
        "torch.utils._device.DeviceContext": MODES,
    },
    "graphs/step.py": {"torch._foreach_copy_": "torch's optimizers copy so, and no public way copies many at once"},
    "graphs/steps.py": {
        "torch._C._autograd._top_saved_tensors_default_hooks": "no public way tells them; tests/graphs/test_steps.py",
        "torch._C._current_graph_task_id": "the same",
    },
    "hf/cache.py": {
        "torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack": TRACING,
        "torch.utils._python_dispatch._disable_current_modes": TRACING,
    },
    "hf/guards.py": {
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "the one class there is",
        "torch.nn.modules.dropout._DropoutNd": "the base of torch's dropouts",
    },
    "hf/modes.py": {
        "torch._C._TorchDispatchModeKey.FAKE": TRACING,
        "torch._C._TorchDispatchModeKey.FUNCTIONAL": TRACING,
        "torch._C._TorchDispatchModeKey.PROXY": TRACING,
        "torch._C._functorch.peek_interpreter_stack": TRACING,
        "torch._C._get_dispatch_mode": TRACING,
        "torch.autograd.forward_ad._current_level": TRACING,
    },
    "models/qwen3.py": {"torch._check": DOCUMENTED},
    "ops/autograd_kernels.py": {
        "torch._C.DispatchKeySet.from_raw_repr": FALLBACK,
        "torch._C._AutoDispatchBelowAutograd": FALLBACK,
        "torch._C._after_autograd_keyset": FALLBACK,
        "torch._functorch.utils.enable_single_level_autograd_function": FALLBACK,
        "torch.autograd.forward_ad._current_level": FALLBACK,
        "torch.autograd.function._SingleLevelFunction": FALLBACK,
        "torch._ops.OpOverload": TYPE,
    },
    "ops/fakes.py": {"torch._check": DOCUMENTED},
    "ops/flash_calls.py": {
        "torch.ops.aten._flash_attention_forward": "varlen_attn has no backward to call; tests/attention on CUDA",
        "torch.ops.aten._flash_attention_backward": "the same",
    },
    "ops/trie_launch.py": {"torch._assert_async": NO_WAIT},
}


def names_of(path: Path) -> Iterator[str]:
    """The dotted names of torch's that a module imports or reads, in full."""
    tree, aliases = ast.parse(path.read_text(encoding="utf-8")), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {a.asname or "torch": a.name if a.asname else "torch" for a in node.names if _is_torch(a.name)}
        elif isinstance(node, ast.ImportFrom) and not node.level and _is_torch(node.module):
            imported = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            aliases |= imported
            yield from imported.values()
    for node in ast.walk(tree):
        attributes = []
        while isinstance(node, ast.Attribute):
            attributes.insert(0, node.attr)
            node = node.value
        if attributes and isinstance(node, ast.Name) and node.id in aliases:
            yield ".".join([aliases[node.id], *attributes])


def _is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"


def private_names_of(path: Path) -> set[str]:
    names = {name for name in names_of(path) if any(p[0] == "_" and p[:2] != "__" for p in name.split("."))}
    # The parts of a longer name are names too.
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def test_every_private_part_of_torch_has_what_holds_it():
    found = {path.relative_to(PACKAGE).as_posix(): private_names_of(path) for path in PACKAGE.rglob("*.py")}
    assert {name: used for name, used in found.items() if used} == {name: set(uses) for name, uses in USES.items()}


def test_private_names_are_found_however_they_are_read(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "import torch\nimport torch._inductor as inductor\nfrom torch import autograd\nfrom torch._C import _a\n"
        "from torch.utils import _pytree as tree\nfrom . import _own\n"
        "torch._b.c(torch.__version__, torch.d, inductor.e, autograd._f, tree.g, _own._h)\n"
    )
    assert private_names_of(module) == {
        "torch._b.c", "torch._inductor.e", "torch.autograd._f", "torch._C._a", "torch.utils._pytree.g"
    }  # fmt: skip
