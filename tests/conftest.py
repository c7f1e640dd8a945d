"""Settings of the whole test run: offline, few threads, and where the real assets are."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from headless_browser import find_browser

# Before any library reads them: tests never reach a hub, and two xdist workers share the cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ["PYRA_CACHE"] = "off"  # nothing of a test lands in the home folder
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests without a CUDA device and `browser` tests without a browser."""
    if find_browser() is None:
        for item in items:
            if item.get_closest_marker("browser"):
                item.add_marker(pytest.mark.skip(reason="no Chromium (apt install chromium-headless-shell)"))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real weights and images; tests that ask for it carry the marker `assets`."""
    folder = Path(os.environ.get("PYRA_ASSETS") or ROOT.parent / "shared" / "assets")
    if not folder.is_dir():
        pytest.skip(f"no real assets: {folder} is not a folder; set PYRA_ASSETS")
    return folder


@pytest.fixture
def tiny_disk() -> Iterator[None]:
    """No file can be larger than 20 kB: as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def no_cuda_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """BOFT would build one in the home folder, wherever it finds a compiler; without it every machine runs the same."""
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
