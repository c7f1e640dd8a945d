"""What a user gets from pip: the wheel and the sdist, each installed alone into an empty folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # a build and two installations: about ten seconds

SUFFIXES = {".py", ".typed", ".yaml", ".parquet", ".json", ".safetensors", ".md", ".html"}
PROBE = """
import importlib, importlib.util, sys
import pyra
for name in sys.argv[1:]:
    importlib.import_module(name)
print(pyra.__file__, pyra.__version__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path) if path else "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def project(repository: Path) -> dict[str, Path]:
    """Package -> folder, as pyproject.toml maps them."""
    table = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    mapping = {"pyra": "pyra", **table["tool"]["setuptools"]["package-dir"]}
    return {package: repository / folder for package, folder in mapping.items()}


@pytest.fixture(scope="module")
def artefacts(repository: Path, project: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The sdist and the wheel made from it, built from a copy: an old build/ would hide a missing file."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repository / name, source)
    for folder in project.values():
        shutil.copytree(folder, source / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    output = tmp_path_factory.mktemp("dist")
    isolation = ["--no-isolation"] if find_spec("setuptools") else []
    run(sys.executable, "-m", "build", *isolation, "--outdir", output, source, cwd=output)
    return sorted(output.iterdir())


@pytest.fixture(scope="module", params=["wheel", "sdist"])
def installed(request: pytest.FixtureRequest, artefacts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which pip has put the distribution, without its dependencies."""
    suffix = ".whl" if request.param == "wheel" else ".tar.gz"
    artefact = next(file for file in artefacts if file.name.endswith(suffix))
    target = tmp_path_factory.mktemp(request.param)
    isolation = ["--no-build-isolation"] if find_spec("setuptools") else []
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *isolation]
    run(*pip, "--target", target, artefact, cwd=target.parent)
    return target


def test_only_pyra_is_at_the_top_level(installed: Path) -> None:
    names = {entry.name for entry in installed.iterdir()} - {"bin"}
    assert names == {"pyra", "pyra_adapt-0.1.0.dist-info"}


def test_every_code_and_data_file_is_there(installed: Path, project: dict[str, Path]) -> None:
    expected = {
        installed.joinpath(*package.split("."), file.relative_to(folder))
        for package, folder in project.items()
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES and "__pycache__" not in file.parts
    }
    assert len(expected) > 20
    assert sorted(str(file) for file in expected if not file.is_file()) == []


def test_import_from_an_empty_folder(installed: Path, project: dict[str, Path], tmp_path: Path) -> None:
    output = run(sys.executable, "-c", PROBE, *project, "pyra.scripts.main", cwd=tmp_path, path=installed)
    file, version = output.splitlines()
    assert Path(file) == installed / "pyra" / "__init__.py"
    assert version == "0.1.0"


def test_generic_names_are_not_importable(installed: Path, tmp_path: Path) -> None:
    script = "import importlib.util as u; print([n for n in ('adapters', 'tasks', 'scripts') if u.find_spec(n)])"
    assert run(sys.executable, "-c", script, cwd=tmp_path, path=installed).strip() == "[]"


def test_the_wheel_carries_the_licence_and_the_command(artefacts: list[Path]) -> None:
    wheel = next(file for file in artefacts if file.suffix == ".whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert any(name.endswith("/LICENSE") for name in names)
        entry_points = next(name for name in names if name.endswith("entry_points.txt"))
        assert "pyra = pyra.scripts.main:main" in archive.read(entry_points).decode()
