"""The switches of the build: with the compiled read path, without it, and without a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [
    *("shmelim", "setup.py", "setup.cfg", "pyproject.toml", "MANIFEST.in", "mkdocs.yml"),
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


def test_an_unasked_pure_path_says_once_what_it_is_and_the_way_out(source: Path) -> None:
    def told(code: str, pure: str = "") -> list[str]:
        environment = {**os.environ, "SHMELIM_PURE": pure}
        return subprocess.run(
            [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=True
        ).stderr.splitlines()

    reads = "from shmelim import EliminationReader; import shmelim.table; import shmelim.shm"
    (line,) = told(reads)
    assert "which is slower: the extension was not compiled; install a C compiler" in line
    assert "--no-cache-dir --no-binary shmelim shmelim" in line
    assert told("import shmelim") == told(reads, pure="1") == []

    (source / "shmelim/shm/_native.cpython-39-x86_64-linux-gnu.so").touch()
    (line,) = told(reads)
    assert "not compiled for this Python, as _native.cpython-39-x86_64-linux-gnu.so was for another;" in line

    (source / f"shmelim/shm/_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no machine code")
    (line,) = told(reads)
    assert "the extension cannot be loaded (" in line


@pytest.fixture
def distributed(source: Path) -> Path:
    """A copy of the whole project, since all of it is in the source distribution."""
    for name in ("tests", "docs", "examples", "bench", ".ci"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return source


def distribute(source: Path, kind: str, **environment: str) -> Path:
    """Make a source distribution or a wheel, with what is installed here, and return it."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", kind],
        cwd=source,
        env={**os.environ, "SHMELIM_BUILD": "", **environment},
        capture_output=True,
        check=True,
        text=True,
    )
    (made,) = (source / "dist").glob({"sdist": "*.tar.gz", "bdist_wheel": "*.whl"}[kind])
    return made


def files_of(directory: Path) -> set[str]:
    """Return the paths below a directory, but for those that a build or a run leaves."""
    found = {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()}
    left = {"__pycache__", "shmelim.egg-info", "build", "dist"}
    return {str(path) for path in found if not left.intersection(path.parts)}


def test_a_source_distribution_is_the_whole_project(distributed: Path) -> None:
    with tarfile.open(distribute(distributed, "sdist")) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
    packed = {name for name in packed if "egg-info" not in name}
    assert packed - files_of(distributed) == {"PKG-INFO"}
    assert files_of(distributed) - packed == set()


def test_a_wheel_has_what_runs_and_no_source_in_c(source: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("there is no compiler")
    with zipfile.ZipFile(distribute(source, "bdist_wheel", SHMELIM_BUILD="native")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wheel.extractall(source / "installed")
    native = f"shmelim/shm/_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    wanted = {f"shmelim/{name}" for name in files_of(source / "shmelim") if not name.endswith((".c", ".h", ".so"))}
    assert names == wanted | {native}
    assert {"shmelim/py.typed", "shmelim/shm/_native.pyi", "shmelim/watch/page/style.css"} < names
    assert read_path(source / "installed") == "native"
    machine_code = (source / "installed" / native).read_bytes()
    assert b".debug_info" not in machine_code, "not stripped"
    assert b".symtab" not in machine_code, "not stripped"


def test_a_wheel_without_a_compiler_reads_in_pure_python(source: Path) -> None:
    with zipfile.ZipFile(distribute(source, "bdist_wheel", CC="/bin/false", LDSHARED="/bin/false")) as wheel:
        wheel.extractall(source / "installed")
    assert read_path(source / "installed") == "pure"
