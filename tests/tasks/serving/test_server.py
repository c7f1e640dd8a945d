"""A real server on a real port: slow and endless clients, ports in use, the end."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from colour_model import Model, classifier_of, picture, until

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
from pyra.errors import ConfigError
from pyra.tasks.benchmarks.serving import load_test
from pyra.tasks.serving import server as module
from pyra.tasks.serving.limits import Limits

Address = tuple[str, int]


@pytest.fixture
def running(model: Model, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[Address, Any]]]:
    """Start servers in threads; return their address and the server that a signal would reach."""
    servers: list[tuple[Any, threading.Thread]] = []
    made: list[Any] = []

    class Recorded(module._Server):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(module, "_Server", Recorded)

    def start(**limits: float) -> tuple[Address, Any]:
        address: list[str] = []
        settings: dict[str, Any] = {"limits": Limits(**{"max_wait_ms": 0.0, **limits}), "started": address.append}  # type: ignore[arg-type]
        where = module.bound_socket(port=0)
        thread = threading.Thread(target=module.serve, args=(classifier_of(model), where), kwargs=settings)
        thread.start()
        until(lambda: bool(address))
        servers.append((made[-1], thread))
        return ("127.0.0.1", int(address[0].rpartition(":")[2])), made[-1]

    yield start
    model.gate.set()
    for server, thread in servers:
        server.handle_exit(signal.SIGTERM, None)
        thread.join(20)
        assert not thread.is_alive()


def post(length: str) -> bytes:
    return f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n{length}\r\n\r\n".encode()


def read_all(connection: socket.socket) -> bytes:
    """Read until the server ends the connection."""
    connection.settimeout(15)
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return received


def test_a_client_that_sends_without_end_hears_the_refusal_and_is_cut_off(running: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("pyra.tasks.serving.refusals._LINGER", 0.3)
    address, _ = running(max_bytes=100_000)
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    with socket.create_connection(address) as connection:
        connection.sendall(post("Transfer-Encoding: chunked"))
        end = time.monotonic() + 20
        with pytest.raises(OSError):  # cut off while it sends
            while time.monotonic() < end:
                connection.sendall(chunk)
    with socket.create_connection(address) as connection:
        connection.sendall(post("Transfer-Encoding: chunked") + 10 * chunk)
        received = read_all(connection)
    assert received.startswith(b"HTTP/1.1 413") and b"more than 100000 bytes" in received


def test_a_declared_length_is_refused_before_anything_is_sent(running: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("pyra.tasks.serving.refusals._LINGER", 0.1)
    address, _ = running(max_bytes=100_000)
    with socket.create_connection(address) as connection:
        connection.sendall(post("Content-Length: 999999999999"))
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_connections_that_send_nothing_or_half_a_header_are_ended(running: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_HEADERS", 0.5)
    address, _ = running()
    for begun in (b"", b"POST /predict HTTP/1.1\r\nHost: x\r\n"):
        with socket.create_connection(address) as connection:
            connection.sendall(begun)
            assert read_all(connection) == b""


def test_requests_in_work_are_answered_before_the_end(running: Any, model: Model) -> None:
    address, server = running()
    model.gate.clear()
    image = picture("green")
    with socket.create_connection(address) as connection:
        connection.sendall(post(f"Content-Length: {len(image)}") + image)
        assert model.begun.acquire(timeout=10)
        server.handle_exit(signal.SIGINT, None)
        until(lambda: not server.servers[0].is_serving())
        model.gate.set()
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and json.loads(body)["label"] == "green"
    assert server.ended_by == signal.SIGINT
    with pytest.raises(OSError):
        socket.create_connection(address)


def test_a_port_in_use_and_what_is_no_port(running: Any) -> None:
    (host, port), _ = running()
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use"):
        module.bound_socket(host, port)
    with pytest.raises(ConfigError, match=r"--port must be in 0\.\.65535, got 70000"):
        module.bound_socket(port=70_000)
    with pytest.raises(ConfigError, match=r"--host 'no\.such\.host\.invalid'"):
        module.bound_socket("no.such.host.invalid")


def test_limits_that_cannot_be_are_all_named() -> None:
    with pytest.raises(ConfigError) as caught:
        Limits(max_bytes=0, max_pixels=10**9, max_wait_ms=-1, max_connections=10)
    said = str(caught.value)
    assert [name for name in ("max-bytes", "max-pixels", "max-wait-ms", "max-connections") if name not in said] == []


def test_a_load_test_counts_answers_refusals_and_failures(running: Any, model: Model) -> None:
    (host, port), _ = running(max_queue=4)
    url = f"http://{host}:{port}/"
    few = load_test(url, picture("red"), clients=2, seconds=0.5, content_type="image/png")
    assert few.answered > 5 and (few.refused, few.failed) == (0, 0)
    assert few.p50_ms is not None and few.p99_ms is not None and 0 < few.p50_ms <= few.p99_ms
    assert few.requests_per_second == pytest.approx(few.answered / few.seconds)
    assert few.server_megabytes_before is not None and few.server_megabytes_before > 10
    many = load_test(url, picture("red", (1500, 1500)), clients=24, seconds=1.0, content_type="image/png")
    assert many.answered > 0 and many.refused > 0 and many.failed == 0
    wrong = load_test(url, b"no image", clients=1, seconds=0.2)
    assert wrong.answered == 0 and wrong.p50_ms is None and wrong.failures == {"status 400": wrong.failed}


def test_a_load_test_of_nothing(running: Any) -> None:
    from pyra.errors import DataError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match=f"no server answers at 127.0.0.1:{port}"):
        load_test(f"http://127.0.0.1:{port}", b"x")
    for url in ("https://127.0.0.1", "127.0.0.1:80", "http://x:99999"):
        with pytest.raises(ConfigError, match="is no address of a server"):
            load_test(url, b"x")
