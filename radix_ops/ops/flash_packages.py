"""Which flash attention radix::flash_attention runs: torch's, or FlashAttention 3 or 4 of a package.

A package is called directly: torch's own attention, and whoever else calls it, stay as they are. What a package does
not compute is torch's, and so is what it was found to compute wrong.
"""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import os
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from . import varlen
from .flash_calls import TORCH, Calls, Runs, load_fa3_fwd, load_flash_attn_4

FlashAttention: TypeAlias = Literal["torch", "fa3-fwd", "flash-attn-4"]
VARIABLE = "RADIX_OPS_FLASH_ATTENTION"
# How many times the error of torch's kernels a package may make; both round alike.
_MOST_ERROR = 2.0
# Of the comparison: queries and keys of its runs, which fill tiles, parts of them and several, and its window.
_LENGTHS = (1, 130, 0, 257, 3, 64), (1, 300, 0, 257, 200, 192)
_WINDOW = 100


class _Package(NamedTuple):
    """A package and all that was tried of it."""

    versions: tuple[str, ...]
    load: Callable[[], Calls]
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...]  # as padded, to a multiple of 8
    has_windows: bool
    has_backward: bool  # which is not deterministic
    in_graphs: bool  # whether it was tried in the capture of a CUDA graph


# All on compute capability 9.0. FlashAttention 4's gradients are wrong, without an error, where head_dim is no multiple
# of 32 (flash-attention issue 2896).
_CAPABILITY = (9, 0)
_PACKAGES: dict[str, _Package] = {
    "fa3-fwd": _Package(("0.0.3",), load_fa3_fwd, (torch.bfloat16,), tuple(range(8, 257, 8)), False, False, True),
    "flash-attn-4": _Package(
        ("4.0.0b36",), load_flash_attn_4, (torch.bfloat16, torch.float16), (32, 64, 96, 128, 256), True, True, False
    ),
}


class _Kind(NamedTuple):
    """What decides which kernel of a package runs, and so what is compared on its own."""

    package: str
    part: Literal["forward", "backward"]
    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    has_window: bool

    def __str__(self) -> str:
        window = ", a sliding window" if self.has_window else ""
        heads = f"{self.heads} heads over {self.kv_heads}, head_dim {self.head_dim}"
        return f"the {self.part} of {self.package} for {self.dtype}, {heads}{window}"


_active: FlashAttention | None = None  # None: not yet read from the environment
_loaded: dict[str, Calls] = {}
_is_right: dict[_Kind, bool] = {}


def current_flash_attention() -> FlashAttention:
    """Return whose flash attention is in use: "torch" or the name of a package. See `activate_flash_attention`."""
    global _active
    if _active is None:
        name = os.environ.get(VARIABLE, "") or "torch"
        try:
            _active = _checked(name)
        except (ValueError, RuntimeError) as error:
            raise type(error)(f"the environment has {VARIABLE}={name}: {error}") from error.__cause__
    return _active


def activate_flash_attention(implementation: FlashAttention) -> None:
    """Choose the flash attention behind the layouts "compact" and "unfold", and behind packed batches, in this process.

    "torch", which is in use at first, is torch's own: FlashAttention 2, or what
    `torch.nn.attention.activate_flash_attention_impl` chose. "fa3-fwd" and "flash-attn-4" are FlashAttention 3 and 4 of
    the packages of these names, on GPUs of compute capability 9.0 (Hopper):

        fa3-fwd 0.0.3: bfloat16, head_dim up to 256, no sliding windows. It has no backward: torch's takes its output
            and logsumexp, so that a forward has the same bits with and without gradients.
        flash-attn-4 4.0.0b36: bfloat16 and float16, head_dim 32, 64, 96, 128 and 256. The first call of a kind compiles
            kernels for some seconds. Its backward is not deterministic: under `torch.use_deterministic_algorithms`
            torch's runs in its place. It was not tried in CUDA graphs: models make none then, and a capture raises.

    All else stays with torch's kernels. A package's forward is deterministic, and its results differ from torch's by
    rounding. The first time that a kind is used (device, dtype, heads, head_dim, with a window or without) the host
    waits, and the package is compared with attention in float64: one whose error is more than twice that of torch's
    kernels is not used for that kind, with a warning. Nor is a kind whose first use is in a CUDA graph's capture.
    `torch.compile` and `torch.export` see no difference. torch's own attention is left as it is.

    The environment variable RADIX_OPS_FLASH_ATTENTION chooses for a program that doesn't call this.
    Raises ValueError for another name; RuntimeError for a package that is missing, of another version, or doesn't load.
    """
    global _active
    _active = _checked(implementation)


def may_be_captured() -> bool:
    """Return whether the flash attention in use was tried in CUDA graphs."""
    name = current_flash_attention()
    return name == "torch" or _PACKAGES[name].in_graphs


def _checked(name: str) -> FlashAttention:
    """Return the name of an implementation that is there, its package loaded."""
    if not isinstance(name, str) or name not in get_args(FlashAttention):
        allowed = ", ".join(map(repr, get_args(FlashAttention)))
        raise ValueError(f"flash attention must be one of {allowed}, got {name!r}")
    if name in _PACKAGES and name not in _loaded:
        _loaded[name] = _load(name, _PACKAGES[name])
    return name  # type: ignore[return-value]


def _load(name: str, package: _Package) -> Calls:
    tried = " or ".join(package.versions)
    install = f"pip install {name}=={package.versions[-1]}"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise RuntimeError(f"the package {name} is not installed: {install}") from None
    if version not in package.versions:
        raise RuntimeError(f"{name} {version} is installed, and radix_ops was tried with {tried}: {install}")
    try:
        return package.load()
    except (ImportError, OSError, AttributeError) as error:
        raise RuntimeError(f"{name} {version} does not load beside torch {torch.__version__}: {error}") from error


def calls_for(part: Literal["forward", "backward"], q: Tensor, k: Tensor, runs: Runs) -> Calls:
    """Return the calls whose forward, or backward, computes attention of q and k, whose head_dim is padded.

    The first time for a kind it waits for the device.
    """
    name = current_flash_attention()
    if name == "torch":
        return TORCH
    package, calls = _PACKAGES[name], _loaded[name]
    if not _was_tried(package, q, runs):
        return TORCH
    if part == "backward" and (not package.has_backward or torch.are_deterministic_algorithms_enabled()):
        return TORCH
    is_capturing = torch.cuda.is_current_stream_capturing()
    if is_capturing and not package.in_graphs:
        raise RuntimeError(
            f"{name} was not tried in CUDA graphs: activate_flash_attention('torch') or another before the capture"
        )
    kind = _Kind(name, part, q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2], runs.window > 0)
    is_right = _is_right.get(kind)
    if is_right is None:
        if is_capturing:
            _warn(f"{kind}, was not compared before a CUDA graph's capture: torch's is captured. Call it once before")
            return TORCH
        is_right = _is_right[kind] = _compare(kind, calls)
    return calls if is_right else TORCH


def _was_tried(package: _Package, q: Tensor, runs: Runs) -> bool:
    return (
        q.dtype in package.dtypes
        and q.shape[2] in package.head_dims
        and runs.scale > 0
        and (package.has_windows or not runs.window)
        and _capability(q.device) == _CAPABILITY
    )


_capability = functools.cache(torch.cuda.get_device_capability)


def _compare(kind: _Kind, calls: Calls) -> bool:
    """Return whether a package computes a kind about as well as torch does; warn where it doesn't."""
    sample = _Sample.of(kind)
    try:
        errors = sample.errors(calls if kind.part == "backward" else Calls(calls.forward, TORCH.backward))
    except Exception as error:
        _warn(f"{kind}, can't run, and torch's runs in its place: {type(error).__name__}: {error}")
        return False
    torchs = sample.errors(TORCH)
    wrong = [name for name, error in errors.items() if not error <= _MOST_ERROR * torchs[name]]
    if wrong:
        _warn(
            f"{kind}, is not used: {wrong[0]} is off by {errors[wrong[0]]:.2g} of its norm from attention in float64, "
            f"and torch's, which runs in its place, by {torchs[wrong[0]]:.2g}"
        )
    return not wrong


class _Sample(NamedTuple):
    """Random tensors of a kind, and what attention makes of them in float64."""

    grad_out: Tensor
    qkv: tuple[Tensor, ...]
    runs: Runs
    exact: dict[str, Tensor]  # on the CPU

    @classmethod
    def of(cls, kind: _Kind) -> _Sample:
        generator = torch.Generator("cpu").manual_seed(0)
        ends_q, ends_k = (
            torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32, device="cpu") for x in _LENGTHS
        )
        num_queries, num_keys = sum(_LENGTHS[0]), sum(_LENGTHS[1])
        scale, window = kind.head_dim**-0.5, _WINDOW if kind.has_window else 0

        def draw(rows: int, heads: int) -> Tensor:
            return torch.randn(rows, heads, kind.head_dim, generator=generator, device="cpu").to(kind.dtype)

        drawn = [draw(num_queries, kind.heads) for _ in range(2)] + [draw(num_keys, kind.kv_heads) for _ in range(2)]
        # The CPU's products are exact and deterministic, whatever is set for those of the device.
        grad_out, q, k, v = (x.double() for x in drawn)
        out = varlen.varlen_attention(q, k, v, ends_q, ends_k, scale, window)
        grads = varlen.varlen_attention_backward(grad_out, q, k, v, ends_q, ends_k, scale, window)
        names = "the output", "the gradient of q", "the gradient of k", "the gradient of v"
        grad_out, *qkv = (x.to(kind.device) for x in drawn)
        ends_q, ends_k = (x.to(kind.device) for x in (ends_q, ends_k))
        runs = Runs(ends_q, ends_k, max(_LENGTHS[0]), max(_LENGTHS[1]), scale, window)
        return cls(grad_out, tuple(qkv), runs, dict(zip(names, (out, *grads), strict=True)))

    def errors(self, calls: Calls) -> dict[str, float]:
        """Return how far each result of a forward and a backward is from the exact one, over its norm."""
        out, logsumexp = calls.forward(*self.qkv, self.runs)
        found = out, *calls.backward(self.grad_out, *self.qkv, out, logsumexp, self.runs)
        return {
            name: float((got.cpu().double() - want).norm() / want.norm())
            for (name, want), got in zip(self.exact.items(), found, strict=True)
        }


def _warn(text: str) -> None:
    warnings.warn(f"radix_ops: {text}", stacklevel=2)
