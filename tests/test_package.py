"""What an installed package promises: one binary for all torch and Python versions, and errors that say what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import radix_ops

LIBRARY = Path(radix_ops.__file__).with_name("_C.abi3.so")


def test_every_op_has_schema_fake_and_cpu_kernel():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("radix::")]
    assert sorted(names) == sorted(f"radix::{name}" for name in radix_ops.ops._ALL_OPS)
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) reads the symbols")
def test_the_binary_uses_the_stable_c_interface_alone():
    listed = subprocess.run(["nm", "-D", "--undefined-only", LIBRARY], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    from_torch = [symbol for symbol in symbols if re.search(r"torch|c10|N2at", symbol)]
    assert from_torch
    assert [symbol for symbol in from_torch if not symbol.startswith(("aoti_torch_", "torch_"))] == []
    assert [s for s in symbols if s.startswith(("Py", "_Py"))] == []


def test_the_binary_names_no_build_path():
    assert str(Path(__file__).parent.parent / "csrc").encode() not in LIBRARY.read_bytes()


def test_an_old_torch_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    with pytest.raises(ImportError, match=r"radix_ops needs torch >= 2.11, but torch 2.9.1\+cu128 is installed"):
        radix_ops._load_extension()


def test_a_missing_library_says_how_to_build(monkeypatch, tmp_path):
    monkeypatch.setattr(radix_ops, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(
        ImportError, match=r"radix_ops was not built: .*_C.abi3.so is missing. In a source tree, run `make build`"
    ):
        radix_ops._load_extension()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc (CUDA toolkit) compiles the CUDA sources")
def test_the_build_compiles_cuda_sources_without_a_gpu(tmp_path):
    root = Path(__file__).parent.parent
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc"):
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, tmp_path / name)
    (tmp_path / "csrc" / "cuda").mkdir(exist_ok=True)
    (tmp_path / "csrc" / "cuda" / "probe.cu").write_text(
        "__global__ void probe_kernel(int* x) { *x = 1; }\n"
        'extern "C" __attribute__((visibility("default"))) void radix_probe(int* x) { probe_kernel<<<1, 1>>>(x); }\n'
    )
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "out"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=os.environ | {"MAX_JOBS": "2"})
    (library,) = (tmp_path / "out").rglob("_C.abi3.so")
    # Beside a torch without CUDA it must still load: in a process of its own, since it defines torch.ops.radix.
    program = f"import ctypes, torch; ctypes.CDLL({str(library)!r}).radix_probe; torch.ops.radix.gather"
    subprocess.run([sys.executable, "-c", program], check=True)
