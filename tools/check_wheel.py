"""Install the wheel outside the checkout and use it there: `make check-wheel`. An editable install hides what a wheel
lacks. Every module is imported, the files beside them are read, and the command says its version.

The wheel is built of the extension that stands in radix_ops/, since to compile it again would take minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [ROOT / "radix_ops", ROOT / "radix_ops_command"]
DATA = ["_C.abi3.so", "hf/models.json", "py.typed"]
USE = """
import importlib, sys
from importlib.resources import files
from pathlib import Path

site, modules, data = Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3].split()
for name in modules:
    module = importlib.import_module(name)
    assert Path(module.__file__).is_relative_to(site), f"{name} comes from {module.__file__}"
for name in data:
    files("radix_ops").joinpath(name).read_bytes()
"""


def modules() -> list[str]:
    """Return the modules of both packages, as the checkout has them; a __main__ would run when it is imported."""
    paths = [path.relative_to(ROOT).with_suffix("") for package in PACKAGES for path in package.rglob("*.py")]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths if path.name != "__main__"]
    return sorted(names)


def build(folder: Path) -> Path:
    """Build the wheel of pyproject.toml in a folder with copies of what goes into it."""
    for package in PACKAGES:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "MANIFEST.in").write_text("include radix_ops/_C.abi3.so\n")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder / "dist", folder)
    [wheel] = (folder / "dist").glob("*.whl")
    return wheel


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="radix-wheel-") as name:
        folder = Path(name)
        (folder / "source").mkdir()
        wheel = build(folder / "source")
        tops = {Path(member).parts[0] for member in zipfile.ZipFile(wheel).namelist()}
        assert {top for top in tops if not top.endswith(".dist-info")} == {package.name for package in PACKAGES}, tops
        site = folder / "site"
        pip("install", "--no-deps", "--target", site, wheel)
        # Without the site module no .pth file leads back to the checkout.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), sysconfig.get_path("purelib")])}
        python = [sys.executable, "-S"]
        for arguments in (
            ["-c", USE, str(site), " ".join(modules()), " ".join(DATA)],
            ["-m", "radix_ops", "--version"],
        ):
            if status := subprocess.call([*python, *arguments], cwd=folder, env=environment):
                sys.exit(status)
    print(f"{wheel.name}: {len(modules())} modules and {len(DATA)} files are there")


if __name__ == "__main__":
    main()
