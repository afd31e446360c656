"""Builds radix_ops._C: one extension for every Python >= 3.10 and torch >= 2.11, with CUDA kernels where nvcc is."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH, OLDEST_SETUPTOOLS = (2, 11), (77,)
# The first torch release whose stable interface the sources may use.
TORCH_TARGET_VERSION = "0x020b000000000000"
# Commands that compile; pip asks others first, which only read what the project says of itself.
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}
INSTALL = "pip install --no-build-isolation ."
# Sources that are compiled for Hopper alone.
OF_HOPPER = "_sm90.cu"
HOPPER = "-gencode=arch=compute_90a,code=sm_90a"
OF_CXX20 = """
#include <concepts>
#if !defined(__clang__) && __GNUC__ < 11
#error
#endif
static_assert(std::integral<int>);
"""


def numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version opens with: (2, 11) of "2.11.0a0+git"."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdecimal())


def why_torch_will_not_do() -> str | None:
    """What is wrong with the torch and setuptools that build this, with the remedy, or None."""
    if numbers(setuptools.__version__) < OLDEST_SETUPTOOLS:
        return (
            f"radix_ops is built by setuptools >= 77, but {setuptools.__version__} is installed: pip install "
            f"--upgrade setuptools wheel ninja, then {INSTALL}"
        )
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return (
            "radix_ops is built beside torch, which is not installed here: pip install 'torch>=2.11' 'setuptools>=77' "
            f"wheel ninja, then {INSTALL}"
        )
    if numbers(torch.__version__) < OLDEST_TORCH:
        return (
            f"radix_ops is built beside torch >= 2.11, but torch {torch.__version__} is installed: pip install "
            f"--upgrade 'torch>=2.11', then {INSTALL}"
        )
    return None


def why_not_compilable() -> str | None:
    """What the compilers lack, with the remedy, or None."""
    cxx = os.environ.get("CXX", "c++")
    try:
        command = [*cxx.split(), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
        done = subprocess.run(command, input=OF_CXX20, capture_output=True, text=True)
    except OSError:
        return (
            f"radix_ops is compiled by a C++20 compiler, and {cxx} can't be run: install GCC 11 or newer (on Debian "
            f"and Ubuntu: apt install g++), or name another one: CXX=clang++ {INSTALL}"
        )
    if done.returncode:
        return (
            f"radix_ops is compiled by a C++20 compiler, which {cxx} is not: install GCC 11 or newer and name it: "
            f"CXX=g++-11 {INSTALL}"
        )
    if cuda_home() is None and (wish := who_wants_cuda()):
        return (
            f"radix_ops' CUDA kernels are compiled by nvcc, which is not found, and {wish}. Install the CUDA toolkit "
            f"(13.0 was tried) and name its folder: CUDA_HOME=/usr/local/cuda {INSTALL}. To build for the CPU alone: "
            f"env -u CUDA_HOME -u CUDA_PATH -u TORCH_CUDA_ARCH_LIST CUDA_VISIBLE_DEVICES= {INSTALL}"
        )
    return None


def who_wants_cuda() -> str | None:
    """What says that CUDA kernels are wanted, or None."""
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        if os.environ.get(name):
            return f"{name} is set"
    import torch

    # ROCm's torch calls its GPUs so, too.
    return "torch finds a GPU" if torch.cuda.is_available() and torch.version.hip is None else None


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


def wants_hopper(architectures: str) -> bool:
    """Whether TORCH_CUDA_ARCH_LIST asks for Hopper, whose own instructions no other GPU has."""
    if architectures in ("", "native"):
        import torch

        return any(torch.cuda.get_device_capability(i) == (9, 0) for i in range(torch.cuda.device_count()))
    return any(name.split("+")[0] in ("9.0", "9.0a", "Hopper") for name in architectures.replace(" ", ";").split(";"))


def extension() -> setuptools.Extension:
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
        is_wanted = wants_hopper(os.environ["TORCH_CUDA_ARCH_LIST"])
        files += [path for path in cuda_files if is_wanted or not path.endswith(OF_HOPPER)]
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


obstacle = why_torch_will_not_do()
if obstacle is None and COMPILING & set(sys.argv):
    obstacle = why_not_compilable()
if obstacle is not None:
    # The first and last words of this build: pip shows its whole output.
    sys.exit(obstacle)

from torch.utils import cpp_extension  # noqa: E402


class BuildExtension(cpp_extension.BuildExtension.with_options(use_ninja=True)):
    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            sys.exit(
                f"radix_ops could not be compiled ({error}); what the compiler says stands above. It takes GCC 11 or "
                "newer and, for CUDA, nvcc 13.0 or newer; CXX and CUDA_HOME name others. Where memory ran out, "
                f"MAX_JOBS=1 {INSTALL} compiles one file at a time"
            )

    def build_extension(self, extension: setuptools.Extension) -> None:
        compile_files = self.compiler.compile

        def compile_apart(files, *arguments, extra_postargs, **options):
            """Compile files of Hopper with its flag, all others with those of TORCH_CUDA_ARCH_LIST.

            torch adds these by itself, but not where any flag, such as one with a path, has the letters "arch".
            """

            def with_nvcc(*flags):
                return {**extra_postargs, "nvcc": [*extra_postargs["nvcc"], *flags]}

            of_hopper = [path for path in files if path.endswith(OF_HOPPER)]
            others = [path for path in files if not path.endswith(OF_HOPPER)]
            objects = []
            if of_hopper:
                objects += compile_files(of_hopper, *arguments, extra_postargs=with_nvcc(HOPPER), **options)
            has_cuda = any(path.endswith(".cu") for path in others)
            further = cpp_extension._get_cuda_arch_flags() if has_cuda else []
            return objects + compile_files(others, *arguments, extra_postargs=with_nvcc(*further), **options)

        self.compiler.compile = compile_apart
        super().build_extension(extension)


setuptools.setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
