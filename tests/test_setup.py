"""A build that can't work says why, and what to do, in one paragraph that is all of its output; sdists are whole."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import pytest
import setuptools
import torch

from helpers.processes import python_environment, run_python

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "setup.py"
# Runs setup.py as pip does, after a change.
BUILD = """
import sys
{change}
sys.argv = ["setup.py", "-q", "bdist_wheel"]
exec(compile(open({path!r}).read(), {path!r}, "exec"), {{"__file__": {path!r}, "__name__": "__main__"}})
"""


def build(change: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_python("-c", BUILD.format(change=change, path=str(SETUP)), cwd=ROOT, **variables)


@pytest.fixture
def setup(monkeypatch):
    """Load setup.py as a module, which sets up nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    spec = importlib.util.spec_from_file_location("setup_of_radix_ops", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("change", "variables", "message"),
    [
        (
            "sys.modules['torch'] = None",
            {},
            "radix_ops is built beside torch, which is not installed here: pip install 'torch>=2.11' 'setuptools>=77' "
            "wheel ninja, then pip install --no-build-isolation .",
        ),
        (
            "import torch; torch.__version__ = '2.10.1+cpu'",
            {},
            "radix_ops is built beside torch >= 2.11, but torch 2.10.1+cpu is installed: pip install --upgrade "
            "'torch>=2.11', then pip install --no-build-isolation .",
        ),
        (
            "import setuptools; setuptools.__version__ = '68.1.2'",
            {},
            "radix_ops is built by setuptools >= 77, but 68.1.2 is installed: pip install --upgrade setuptools wheel "
            "ninja, then pip install --no-build-isolation .",
        ),
        (
            "",
            {"CXX": "/no/such/c++"},
            "radix_ops is compiled by a C++20 compiler, and /no/such/c++ can't be run: install GCC 11 or newer (on "
            "Debian and Ubuntu: apt install g++), or name another one: CXX=clang++ pip install --no-build-isolation .",
        ),
        (
            "",
            {"CXX": "false"},
            "radix_ops is compiled by a C++20 compiler, which false is not: install GCC 11 or newer and name it: "
            "CXX=g++-11 pip install --no-build-isolation .",
        ),
    ],
    ids=["no torch", "old torch", "old setuptools", "no compiler", "old compiler"],
)
def test_a_build_that_cannot_work_says_one_thing(change, variables, message):
    done = build(change, **variables)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == message


@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", None])
def test_cuda_that_is_wanted_needs_nvcc(setup, monkeypatch, name):
    for variable in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(setup, "cuda_home", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: name is None)
    if name is not None:
        assert setup.why_not_compilable() is None
        monkeypatch.setenv(name, "9.0")
    wish = "torch finds a GPU" if name is None else f"{name} is set"
    said = setup.why_not_compilable()
    assert said.startswith(
        f"radix_ops' CUDA kernels are compiled by nvcc, which is not found, and {wish}. Install the "
    )
    assert said.endswith("TORCH_CUDA_ARCH_LIST CUDA_VISIBLE_DEVICES= pip install --no-build-isolation .")
    if name is None:
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert setup.why_not_compilable() is None
    monkeypatch.setattr(setup, "cuda_home", lambda: "/usr/local/cuda")
    assert setup.why_not_compilable() is None


def test_reading_what_the_project_says_needs_no_compiler():
    done = run_python(str(SETUP), "--version", cwd=ROOT, CXX="/no/such/c++")
    assert done.stdout.strip().splitlines()[-1] == __import__("radix_ops").__version__


def test_an_error_of_the_compiler_ends_with_the_remedy(setup, monkeypatch, capsys):
    def fail(self):
        raise RuntimeError("Error compiling objects for extension")

    monkeypatch.setattr(setup.BuildExtension.__base__, "build_extensions", fail)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    command = setup.BuildExtension.__new__(setup.BuildExtension)
    with pytest.raises(SystemExit) as stop:
        command.build_extensions()
    assert str(stop.value).startswith("radix_ops could not be compiled (Error compiling objects for extension); what ")
    assert "MAX_JOBS=1 pip install --no-build-isolation ." in str(stop.value)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked sdist has no list of the checkout's files")
def test_an_sdist_holds_the_checkout(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, env=python_environment(), check=True, capture_output=True)
    [path] = tmp_path.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    of_the_repository = (".ci/", ".github/", ".git", ".pre-commit-config.yaml")
    assert [name for name in listed if name not in held and not name.startswith(of_the_repository)] == []
    assert not any(name.endswith((".so", ".pyc")) for name in held)


@pytest.mark.parametrize(
    ("architectures", "is_wanted"),
    [
        ("8.0;9.0+PTX", True),
        ("9.0", True),
        ("8.0 9.0a", True),
        ("Hopper", True),
        ("8.0;8.6+PTX", False),
        ("10.0", False),
    ],
)
def test_the_kernels_for_hopper_are_built_where_it_is_among_the_architectures(
    setup, monkeypatch, architectures, is_wanted
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    monkeypatch.setattr(setup, "cuda_home", lambda: "/usr/local/cuda")
    built = setup.extension().sources
    assert any(path.endswith("fold.cu") for path in built)
    assert any(path.endswith("_sm90.cu") for path in built) == is_wanted


def test_the_kernels_for_hopper_are_compiled_for_it_alone(setup, monkeypatch):
    calls = []

    def compile_files(files, *, extra_postargs, **options):
        calls.append((files, [flag for flag in extra_postargs["nvcc"] if "gencode" in flag]))
        return [f"{path}.o" for path in files]

    def build_extension(self, extension):
        flags = {"cxx": [], "nvcc": ["-O3", "-ffile-prefix-map=/home/research=."]}
        self.objects = self.compiler.compile(extension, output_dir="build", extra_postargs=flags)

    monkeypatch.setattr(setup.BuildExtension.__base__, "build_extension", build_extension)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    command = setup.BuildExtension.__new__(setup.BuildExtension)
    command.compiler = types.SimpleNamespace(compile=compile_files)
    command.build_extension(["a.cpp", "b_sm90.cu", "c.cu"])
    (hopper, of_hopper), (others, of_others) = calls
    assert hopper == ["b_sm90.cu"]
    assert of_hopper == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert others == ["a.cpp", "c.cu"]
    assert {flag.rpartition("code=")[2] for flag in of_others} == {"sm_80", "sm_90", "compute_90"}
    assert sorted(command.objects) == ["a.cpp.o", "b_sm90.cu.o", "c.cu.o"]
