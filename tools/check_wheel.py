"""Unpack the sdist outside the checkout, run tests there, and use the wheel that is made of it: `make check-wheel`. A
checkout and an editable install hide what those lack. Every module is imported, the files beside them are read, and
the command says its version.

Both take the extension that stands in radix_ops/, since to compile it again would take minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [ROOT / "radix_ops", ROOT / "radix_ops_command"]
EXTENSION = "radix_ops/_C.abi3.so"
TESTS = [
    "tests/test_package.py",
    "tests/test_extras.py",
    "tests/test_house.py",
    "tests/plan/test_store.py",
    "tests/ops/test_fold.py",
]
DATA = ["_C.abi3.so", "hf/models.json", "py.typed"]
USE = """
import importlib, sys
from importlib.resources import files
from pathlib import Path

site, modules, data = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
for name in modules:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name != "ray":  # of 470 MB, which `make test-ray` alone installs
            raise
        assert site.joinpath(*name.split(".")).with_suffix(".py").is_file(), name
        continue
    assert Path(module.__file__).is_relative_to(site), f"{name} comes from {module.__file__}"
for name in data:
    files("radix_ops").joinpath(name).read_bytes()
"""


def modules() -> list[str]:
    """Return the modules of both packages, as the checkout has them; a __main__ would run when it is imported."""
    paths = [path.relative_to(ROOT).with_suffix("") for package in PACKAGES for path in package.rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    return sorted(names)


def unpack_sdist(folder: Path) -> Path:
    """Make the sdist, and return the folder that it unpacks to, with the extension in it."""
    command = ["setup.py", "-q", "egg_info", "--egg-base", folder, "sdist", "--dist-dir", folder]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    [sdist] = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder)
    source = folder / sdist.name.removesuffix(".tar.gz")
    shutil.copy(ROOT / EXTENSION, source / EXTENSION)
    return source


def build(source: Path, folder: Path) -> Path:
    """Build the wheel of a folder and its extension, without the setup.py that would compile another."""
    shutil.copytree(source, folder / "source", ignore=shutil.ignore_patterns("setup.py", "__pycache__"))
    (folder / "source" / "MANIFEST.in").write_text(f"include {EXTENSION}\n")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder / "dist", folder / "source")
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def run(arguments: list[str], folder: Path, variables: dict[str, str]) -> None:
    if status := subprocess.call([sys.executable, *arguments], cwd=folder, env=os.environ | variables):
        sys.exit(status)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="radix-wheel-") as name:
        folder = Path(name)
        source = unpack_sdist(folder)
        # The package that the tests import is the unpacked one.
        run(["-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS], source, {"PYTHONPATH": str(source)})
        wheel = build(source, folder)
        tops = {Path(member).parts[0] for member in zipfile.ZipFile(wheel).namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {package.name for package in PACKAGES}, tops
        site = folder / "site"
        pip("install", "--no-deps", "--target", site, wheel)
        # Without the site module no .pth file leads back to the checkout.
        path = {"PYTHONPATH": os.pathsep.join([str(site), sysconfig.get_path("purelib")])}
        run(["-S", "-c", USE, str(site), " ".join(modules()), " ".join(DATA)], folder, path)
        run(["-S", "-m", "radix_ops", "--version"], folder, path)
    print(f"{wheel.name}: {len(modules())} modules and {len(DATA)} files are there, and the sdist's tests pass")


if __name__ == "__main__":
    main()
