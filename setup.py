"""Builds radix_ops._C: one extension for every Python >= 3.10 and torch >= 2.11, with CUDA kernels where nvcc is."""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

try:
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    sys.exit('radix_ops is built beside torch, which is not installed: pip install "torch>=2.11", then install again')

ROOT = Path(__file__).resolve().parent
# The first torch release whose stable interface the sources may use.
TORCH_TARGET_VERSION = "0x020b000000000000"


def cuda_home() -> str | None:
    """The root of the CUDA toolkit, or None, which builds for the CPU alone."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    # nvcc on the PATH may be a wrapper script outside the toolkit, so headers must stand beside it.
    candidates.insert(2, str(Path(nvcc).resolve().parent.parent) if nvcc else None)
    for root in filter(None, candidates):
        if Path(root, "bin", "nvcc").exists() and Path(root, "include", "cuda_runtime.h").exists():
            return root
    return None


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def extension() -> cpp_extension.CppExtension:
    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)]
    cxx = [
        "-O3",
        "-g0",
        "-std=c++20",
        "-fvisibility=hidden",
        f"-ffile-prefix-map={ROOT}=.",
        "-Wall",
        "-Wno-unknown-pragmas",
    ]
    nvcc = ["-O3", "-std=c++20", f"-Xcompiler=-fvisibility=hidden,-ffile-prefix-map={ROOT}=."]
    # Beside a torch without CUDA nothing tracks the headers of .cu files: a changed flag compiles them again.
    headers = [path.read_bytes() for path in sorted((ROOT / "csrc").rglob("*.*h"))]
    nvcc.append(f"-DRADIX_HEADERS={hashlib.sha256(b''.join(headers)).hexdigest()[:16]}")
    files = sources("*.cpp") + sources("cpu/*.cpp")
    # libtorch.so holds no symbol that we use, but needs libtorch_cuda.so where torch has CUDA: keep it among ours.
    link = ["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else ["-ltorch"]
    cuda_files = sources("cuda/*.cu")
    home = cuda_home()
    if home and cuda_files:
        # Next to a torch without CUDA, setuptools needs to be told where the toolkit is and what to build for.
        cpp_extension.CUDA_HOME = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
        files += cuda_files
        link.append("-lcudart_static")
    return cpp_extension.CppExtension(
        name="radix_ops._C",
        sources=files,
        define_macros=macros,
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
        extra_link_args=link,
        library_dirs=[os.path.join(home, "lib64")] if home and cuda_files else [],
        py_limited_api=True,
    )


setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
