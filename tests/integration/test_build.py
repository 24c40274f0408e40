"""The switches of the build: with the compiled read path, without it, and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *("shmelim", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in"),
    *("README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"),
]

setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what is built, without what was built before."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


def build(source: Path, switch: str, compiler: str | None = None) -> subprocess.CompletedProcess[str]:
    """Build in place, as an editable installation does."""
    environment = {**os.environ, "SHMELIM_BUILD": switch}
    environment.pop("SHMELIM_PURE", None)
    if compiler is not None:
        environment |= {"CC": compiler, "LDSHARED": compiler}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=source,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def read_path(source: Path) -> str:
    """Return which read path the package uses there."""
    code = "import shmelim.shm; print(shmelim.shm.__file__, shmelim.shm.READ_PATH)"
    environment = {key: value for key, value in os.environ.items() if key != "SHMELIM_PURE"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=True
    )
    file, path = found.stdout.split()
    assert Path(file).is_relative_to(source)
    return path


@pytest.mark.parametrize("switch", ["", "native"])
def test_with_a_compiler(source: Path, switch: str) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no compiler")
    built = build(source, switch)
    assert built.returncode == 0, built.stderr
    assert "warning:" not in built.stderr
    assert read_path(source) == "native"


def test_pure_compiles_nothing(source: Path) -> None:
    built = build(source, "pure", compiler="/bin/false")
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    assert read_path(source) == "pure"


def test_without_a_compiler_it_installs_and_says_so(source: Path) -> None:
    built = build(source, "", compiler="/bin/false")
    assert built.returncode == 0, built.stderr
    assert "WARNING: the compiled read path could not be built" in built.stderr
    assert read_path(source) == "pure"


def test_native_without_a_compiler_is_an_error(source: Path) -> None:
    built = build(source, "native", compiler="/bin/false")
    assert built.returncode != 0


def test_an_unknown_switch_is_named(source: Path) -> None:
    built = build(source, "nativ")
    assert built.returncode != 0
    assert "'nativ' must be one of" in built.stderr


def test_source_distribution_and_wheel_have_what_they_need(source: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist"], cwd=source, capture_output=True, check=True, text=True
    )
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        paths = [Path(name) for name in archive.getnames()]
    names = {path.name for path in paths if path.parent.name == "shm"}
    wanted = {path.name for path in (ROOT / "shmelim/shm").iterdir() if path.suffix in {".c", ".h", ".py", ".pyi"}}
    assert wanted <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "SECURITY.md"} <= {path.name for path in paths}


@pytest.mark.long  # isolated builds fetch what they build with
def test_a_wheel_reads_natively(source: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(wheels), str(source)], check=True
    )
    with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
        names = [Path(name) for name in wheel.namelist()]
        wheel.extractall(tmp_path / "installed")
    assert any(name.name.startswith("_native.") and name.suffix == ".so" for name in names)
    assert read_path(tmp_path / "installed") == "native"
