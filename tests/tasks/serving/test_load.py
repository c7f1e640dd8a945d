"""The real command with a real model, under more load than it can answer."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from colour_model import until
from PIL import Image

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
from pyra.tasks.benchmarks.serving import load_test
from pyra.tasks.options import RunOptions
from pyra.tasks.training import train

pytestmark = pytest.mark.slow(reason="trains a run, starts a process and loads it for some seconds")

COMMAND = (sys.executable, "-m", "pyra.scripts.main", "serve")


@pytest.fixture(scope="module")
def run_folder(tiny_backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    train(
        RunOptions(
            backbone=str(tiny_backbone), output=str(folder), method="pyra", rate=0.5, epochs=1, limit=16, batch_size=8,
            device="cpu",
        )
    )  # fmt: skip
    return folder


class Server:
    """The command in a process of its own, with what it says."""

    def __init__(self, folder: Path, *flags: str) -> None:
        line = [*COMMAND, str(folder), "--port", "0", "--threads", "1", *flags]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        assert self.process.stdout is not None
        threading.Thread(target=self.said.extend, args=(iter(self.process.stdout.readline, ""),), daemon=True).start()
        until(lambda: len(self.said) >= 2 or self.process.poll() is not None, 120)
        found = re.match(r"(http://127\.0\.0\.1:\d+)  \(Ctrl-C", self.said[1]) if len(self.said) >= 2 else None
        assert found, self.process.communicate()
        self.url = found[1]

    def health(self) -> int:
        with urllib.request.urlopen(f"{self.url}/health", timeout=10) as response:
            return int(response.status)

    def end(self, by: signal.Signals) -> tuple[int, str]:
        self.process.send_signal(by)
        assert self.process.stderr is not None
        return self.process.wait(30), self.process.stderr.read()


@pytest.fixture
def server(run_folder: Path) -> Iterator[Server]:
    started = Server(run_folder, "--max-queue", "16", "--max-connections", "200")
    yield started
    started.process.kill()
    started.process.wait()


def photo(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_more_clients_than_it_can_answer(server: Server) -> None:
    warm = load_test(server.url, photo(200), clients=16, seconds=3)
    assert warm.answered > 0 and warm.failed == 0, warm
    heavy = load_test(server.url, photo(1500), clients=100, seconds=6)
    assert heavy.answered > 0 and heavy.refused > 0 and heavy.failed == 0, heavy
    again = load_test(server.url, photo(1500), clients=100, seconds=6)
    assert again.failed == 0, again
    # 16 images as they are sent (1 MB each), two that are decoded (9 MB each, at most 25 bytes a pixel): under 150 MB.
    assert warm.server_megabytes_after is not None and again.server_megabytes_peak is not None
    assert again.server_megabytes_peak - warm.server_megabytes_after < 250, (warm, heavy, again)
    assert heavy.server_megabytes_after is not None and again.server_megabytes_after is not None
    assert again.server_megabytes_after - heavy.server_megabytes_after < 50, (heavy, again)
    assert server.health() == 200
    calm = load_test(server.url, photo(200), clients=1, seconds=1)
    assert calm.answered > 0 and (calm.refused, calm.failed) == (0, 0)
    assert server.end(signal.SIGTERM) == (0, "")


def test_bodies_larger_than_allowed_leave_no_memory(server: Server) -> None:
    before = load_test(server.url, photo(200), clients=4, seconds=1)
    large = load_test(server.url, b"x" * 30_000_000, clients=30, seconds=4)
    assert large.answered == 0 and large.failures.keys() <= {"status 413"} | BROKEN, large
    assert large.failures["status 413"] > 0
    assert large.server_megabytes_peak is not None and before.server_megabytes_after is not None
    assert large.server_megabytes_peak - before.server_megabytes_after < 100, (before, large)
    assert server.health() == 200
    status, said = server.end(signal.SIGINT)
    assert status == 130 and said == "pyra: interrupted\n"


# A refusal may overtake a client that still sends: its connection is then reset.
BROKEN = {"ConnectionResetError", "BrokenPipeError", "IncompleteReadError"}


def test_a_port_in_use_is_one_line(server: Server, run_folder: Path) -> None:
    port = server.url.rpartition(":")[2]
    line = [*COMMAND, str(run_folder), "--port", port]
    second = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert second.returncode == 2 and second.stdout == ""
    assert (
        second.stderr.startswith(f"pyra: error: port {port} of 127.0.0.1 is in use") and second.stderr.count("\n") == 1
    )
