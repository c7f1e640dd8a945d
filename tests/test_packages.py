"""The house rules that a reader cannot see: the package list and the directions of imports."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
MAPPED = {"pyra": "pyra", **SETUPTOOLS["package-dir"]}
SUFFIXES = {".py", ".typed", ".yaml", ".parquet", ".json", ".safetensors", ".md", ".html", ".css", ".js"}
LAYERS = ("pyra.scripts", "pyra.tasks", "pyra.adapters", "pyra")  # from the top; each imports from those after it

# library -> the only files (repository paths) that may import it
ALLOWED = {
    "timm": (
        "pyra/backbones/timm_*.py",
        "pyra/backbones/loading.py",
        "tasks/fitting/augmentation.py",  # its RandAugment, mixup and CutMix
        "scripts/pretrain_demo_backbone.py",
    ),
    "transformers": (
        "adapters/*",
        "tasks/*",
        "pyra/export/*",
        "pyra/backbones/hf_*.py",
        "pyra/backbones/joyai*.py",
        "scripts/prepare_demo_task.py",  # the two makers of the shipped demo files
        "scripts/pretrain_demo_backbone.py",
    ),
    "peft": ("adapters/*", "tasks/benchmarks/adapters.py", "tasks/benchmarks/experts.py"),  # which time stock PEFT
    "datasets": ("tasks/*",),
    "evaluate": ("tasks/*",),
    "accelerate": ("tasks/*",),
    "trl": ("tasks/posttraining/*",),
    "math_verify": ("tasks/posttraining/*",),
    "gguf": ("pyra/export/*",),
    "compressed_tensors": ("pyra/export/*",),
    "lm_eval": ("tasks/language/harness.py",),
    "optuna": ("tasks/schedules/search.py",),
    "matplotlib": ("tasks/reports/*",),
    "plotly": ("tasks/reports/*",),
    "onnx": ("pyra/export/*", "scripts/study_rate_input.py"),  # which joins two graphs
    "onnxruntime": ("pyra/export/*",),
    "triton": ("pyra/kernels/*",),
}
# the parts of the mechanism that models and exporters are built from, never the other way round
MECHANISM = ("matching", "merging", "reactivation", "schedule", "cost", "attention", "config")


def package_files() -> Iterator[tuple[str, Path]]:
    """Yield (package, file) for every code or data file of the mapped folders."""
    for package, folder in MAPPED.items():
        for file in sorted((ROOT / folder).rglob("*")):
            if file.is_file() and file.suffix in SUFFIXES and "__pycache__" not in file.parts:
                yield ".".join([package, *file.relative_to(ROOT / folder).parent.parts]), file


SOURCES = [(package, file) for package, file in package_files() if file.suffix == ".py"]
# Its lazy names are the one upward edge; tests/test_lean_import.py holds that they stay lazy.
LAYERED = [(package, file) for package, file in SOURCES if file != ROOT / "pyra" / "__init__.py"]


def imported_modules(file: Path) -> set[str]:
    """Return the dotted names that a file imports, in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def layer(module: str) -> str:
    """Return the layer a module of the package belongs to.

    >>> layer("pyra.tasks.metrics"), layer("pyra.merging")
    ('pyra.tasks', 'pyra')
    """
    return next(name for name in LAYERS if module == name or module.startswith(f"{name}."))


def identify(value: object) -> str | None:
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else None


def test_the_package_list_names_every_folder_on_disk() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted({package for package, _ in package_files()})


def test_package_data_names_every_data_file() -> None:
    data = [(package, file) for package, file in package_files() if file.suffix != ".py"]
    assert any(file.name == "py.typed" for _, file in data)
    patterns = SETUPTOOLS["package-data"]
    left_out = [
        str(file.relative_to(ROOT))
        for package, file in data
        if not any(fnmatch(file.name, pattern) for pattern in patterns.get(package, ()))
    ]
    assert left_out == []


@pytest.mark.parametrize(("package", "file"), SOURCES, ids=identify)
def test_libraries_are_imported_only_where_they_belong(package: str, file: Path) -> None:
    path = file.relative_to(ROOT).as_posix()
    libraries = {name.partition(".")[0] for name in imported_modules(file)} & ALLOWED.keys()
    assert [name for name in libraries if not any(fnmatch(path, pattern) for pattern in ALLOWED[name])] == []


@pytest.mark.parametrize(("package", "file"), LAYERED, ids=identify)
def test_imports_go_down_the_layers(package: str, file: Path) -> None:
    own = LAYERS.index(layer(package))
    ours = [name for name in imported_modules(file) if name.partition(".")[0] == "pyra"]
    assert [name for name in ours if LAYERS.index(layer(name)) < own] == []


@pytest.mark.parametrize("name", MECHANISM)
def test_the_mechanism_does_not_know_models_or_exporters(name: str) -> None:
    imported = imported_modules(ROOT / "pyra" / f"{name}.py")
    assert [module for module in imported if module.startswith(("pyra.backbones", "pyra.export"))] == []
