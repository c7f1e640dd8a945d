"""The endpoints: what is answered, what is refused and with which status, and what is held meanwhile."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import struct
import zlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from colour_model import COLOURS, Model, classifier_of, picture, until
from PIL.PngImagePlugin import PngImageFile

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from fastapi.testclient import TestClient

from pyra.tasks.serving import refusals
from pyra.tasks.serving.app import create_app
from pyra.tasks.serving.limits import Limits

PNG = {"Content-Type": "image/png"}
Serve = Callable[..., TestClient]


def send(client: TestClient, colour: str = "red", **how: Any) -> Any:
    return client.post("/predict", content=picture(colour), headers=PNG, **how)


def held(client: TestClient) -> int:
    return int(client.app.state.service._held)  # type: ignore[attr-defined]


def waiting(client: TestClient) -> int:
    return int(client.app.state.service._batcher.waiting)  # type: ignore[attr-defined]


def in_threads(client: TestClient, colours: list[str]) -> tuple[ThreadPoolExecutor, list[Future[Any]]]:
    pool = ThreadPoolExecutor(len(colours))
    return pool, [pool.submit(send, client, colour) for colour in colours]


# what is answered


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_an_image_as_the_body_and_in_a_form(serve: Serve, colour: str, form: str) -> None:
    client, image = serve(), picture(colour, form=form)
    raw = client.post("/predict?top=2", content=image, headers={"Content-Type": f"image/{form.lower()}"})
    field = client.post("/predict?top=2", files={"other": b"x" * 100, "image": ("a.bin", image, "text/plain")})
    for response in (raw, field):
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["label"] == colour and answer["probability"] > 0.9
        assert [score["label"] for score in answer["top"]][:1] == [colour] and len(answer["top"]) == 2
        took = answer["milliseconds"]
        assert set(took) == {"decode", "queue", "model", "total"} and answer["batch_size"] == 1
        assert took["total"] >= took["decode"] + took["model"] > 0
    assert raw.json()["top"] == field.json()["top"]


def test_more_classes_than_there_are_is_all_of_them(serve: Serve) -> None:
    answer = send(serve(), params={"top": 50}).json()
    assert len(answer["top"]) == 3
    assert sum(score["probability"] for score in answer["top"]) == pytest.approx(1)


def test_images_that_wait_share_a_forward_and_each_gets_its_own_answer(serve: Serve, model: Model) -> None:
    client = serve(max_batch=4)
    model.gate.clear()
    pool, first = in_threads(client, ["red"])
    assert model.begun.acquire(timeout=10)
    colours = ["green", "blue", "red", "green", "blue", "red"]
    more, others = in_threads(client, colours)
    until(lambda: waiting(client) == 6)
    model.gate.set()
    answers = [future.result(20).json() for future in others]
    assert [answer["label"] for answer in answers] == colours
    assert first[0].result(20).json()["batch_size"] == 1
    assert model.batches == [1, 4, 2]
    assert sorted(answer["batch_size"] for answer in answers) == [2, 2, 4, 4, 4, 4]
    pool.shutdown()
    more.shutdown()


def test_the_first_image_waits_for_others(serve: Serve, model: Model) -> None:
    client = serve(max_wait_ms=5000.0, max_batch=3)
    pool, futures = in_threads(client, ["red", "green", "blue"])
    assert [future.result(4).json()["batch_size"] for future in futures] == [3, 3, 3]
    assert model.batches == [3]
    pool.shutdown()


# what is refused


def header_of(width: int, height: int) -> bytes:
    """Return the first bytes of a PNG of that size, and no pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    begin = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + begin + struct.pack(">I", 1000) + b"IDAT"


FORM = {"Content-Type": "multipart/form-data; boundary=b"}
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


@pytest.mark.parametrize(
    ("status", "said", "how"),
    [
        (400, "not an image in a known format", {"content": b"no image at all", "headers": PNG}),
        (400, "no readable image", {"content": picture()[:45], "headers": PNG}),
        (400, "not an image in a known format", {"content": picture(form="TIFF"), "headers": PNG}),
        (400, "the body is empty", {"content": b"", "headers": PNG}),
        (400, "0 fields 'image'", {"files": {"picture": picture()}}),
        (400, "several fields 'image'", {"files": [("image", picture()), ("image", picture())]}),
        (400, "names no boundary", {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}),
        (400, "the form cannot be read", {"content": b"nothing of a form", "headers": FORM}),
        (400, "ends before its last boundary", {"content": PART + picture(), "headers": FORM}),
        (400, "top must be", {"content": picture(), "headers": PNG, "params": {"top": 0}}),
        (400, "top must be", {"content": picture(), "headers": PNG, "params": {"top": "many"}}),
        (400, "top must be", {"content": picture(), "headers": PNG, "params": {"top": "9" * 5000}}),
        (413, "more than 20000 bytes", {"content": b"x" * 20_001, "headers": PNG}),
        (413, "more than 20000 bytes", {"content": iter([b"x" * 20_001]), "headers": PNG}),
        (413, "more than 20000 bytes", {"files": {"image": b"x" * 20_001}}),
        (413, "more than 20000 bytes", {"files": {"other": b"x" * 90_000, "image": picture()}}),
        (413, "3600000000 pixels", {"content": header_of(60_000, 60_000), "headers": PNG}),
        (413, "1002001 pixels, more than the 1000000 allowed", {"content": header_of(1001, 1001), "headers": PNG}),
        (415, "Content-Type 'none'", {"content": picture()}),
        (415, "Content-Type 'application/json'", {"json": {"image": "x"}}),
        (415, "Content-Encoding 'gzip'", {"content": picture(), "headers": {**PNG, "Content-Encoding": "gzip"}}),
    ],
)
def test_what_is_refused(
    serve: Serve, model: Model, monkeypatch: pytest.MonkeyPatch, status: int, said: str, how: dict[str, Any]
) -> None:
    if status == 413:  # nothing of it is decoded
        monkeypatch.setattr(PngImageFile, "load", lambda _: pytest.fail("decoded"))
    client = serve(max_bytes=20_000, max_pixels=1_000_000)
    response = client.post("/predict", **how)
    assert (response.status_code, list(response.json())) == (status, ["error"]), response.text
    assert said in response.json()["error"] and "\n" not in response.json()["error"]
    assert model.batches == [] and held(client) == 0
    monkeypatch.undo()
    assert send(client).status_code == 200


def test_an_image_of_exactly_the_limits_is_taken(serve: Serve) -> None:
    image = picture(size=(40, 25))
    client = serve(max_bytes=len(image), max_pixels=1000)
    assert client.post("/predict", content=image, headers=PNG).status_code == 200
    assert client.post("/predict", files={"image": image}).status_code == 200
    assert client.post("/predict", content=image + b"x", headers=PNG).status_code == 413


def test_other_paths_and_methods(serve: Serve) -> None:
    client = serve()
    assert client.get("/predict").json() == {"error": "Method Not Allowed"}
    assert client.get("/docs").status_code == 404 and "error" in client.get("/docs").json()


def test_a_full_server_refuses_and_answers_those_it_has(serve: Serve, model: Model) -> None:
    client = serve(max_queue=3, max_batch=1)
    model.gate.clear()
    pool, futures = in_threads(client, ["red", "green", "blue"])
    until(lambda: held(client) == 3)
    response = send(client)
    assert response.status_code == 503 and int(response.headers["Retry-After"]) >= 1
    assert "3 requests are in work" in response.json()["error"]
    assert client.get("/health").status_code == 200
    model.gate.set()
    assert [future.result(20).json()["label"] for future in futures] == ["red", "green", "blue"]
    until(lambda: held(client) == 0)
    assert send(client).status_code == 200
    pool.shutdown()


def test_an_answer_that_comes_too_late_keeps_its_slot_until_the_model_is_done(serve: Serve, model: Model) -> None:
    client = serve(timeout_s=0.3, max_queue=2, max_batch=1)
    model.gate.clear()
    pool, futures = in_threads(client, ["red", "green"])
    assert [future.result(10).status_code for future in futures] == [504, 504]
    assert held(client) == 2 and send(client).status_code == 503
    model.gate.set()
    until(lambda: held(client) == 0)
    assert model.batches == [1]  # the other one was dropped: nobody waited for it any more
    assert send(client).status_code == 200
    pool.shutdown()


def test_a_model_that_fails_costs_one_batch(serve: Serve, model: Model, caplog: pytest.LogCaptureFixture) -> None:
    client = serve()
    model.error = RuntimeError("secret of the model")
    response = send(client)
    assert response.status_code == 500 and "secret" not in response.text and "error" in response.json()
    assert "secret of the model" in caplog.text
    model.error = None
    assert send(client).status_code == 200


def test_logits_that_are_no_numbers_are_no_answer(model: Model) -> None:
    classifier = classifier_of(model)
    broken = type(classifier)(**{**vars(classifier), "run": lambda pixels: model(pixels) * float("nan")})
    with TestClient(create_app(broken)) as client:
        assert send(client).status_code == 500


# bodies that come piece by piece


async def ask(limits: Limits, model: Model, pieces: AsyncIterator[dict[str, Any]], **headers: str) -> dict[str, Any]:
    """Send pieces to the application itself; return the status, and how many pieces it took before it answered."""
    app = create_app(classifier_of(model), limits)
    app.state.service.start()
    taken, seen = 0, {}

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += 1
        async for piece in pieces:
            return piece
        await asyncio.sleep(30)  # nothing comes any more
        return {}

    async def answer(message: Any) -> None:
        if message["type"] == "http.response.start":
            seen.update(status=message["status"], taken=taken, headers=dict(message["headers"]))
        if not message.get("more_body", True):
            seen["done"] = True

    told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "POST", "path": "/predict", "raw_path": b"/predict", "query_string": b""}
    await asyncio.wait_for(app({**scope, "headers": told, "http_version": "1.1"}, receive, answer), 10)
    seen["held"] = app.state.service._held
    app.state.service.close()
    return seen


async def endless(piece: bytes) -> AsyncIterator[dict[str, Any]]:
    while True:
        yield {"type": "http.request", "body": piece, "more_body": True}
        await asyncio.sleep(0)


@pytest.mark.parametrize("begin", [b"", PART, PART.replace(b'"image"', b'"other"')])
def test_a_body_without_end_is_refused_at_the_limit(
    model: Model, monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(refusals, "_LINGER", 0.05)

    async def pieces() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "http.request", "body": begin, "more_body": True}
        async for piece in endless(b"x" * 1000):
            yield piece

    kind = FORM["Content-Type"] if begin else "image/png"
    seen = asyncio.run(ask(Limits(max_bytes=50_000), model, pieces(), content_type=kind))
    assert seen["status"] == 413 and seen["taken"] <= (120 if b"other" in begin else 53)
    assert seen["headers"][b"connection"] == b"close" and seen["done"] and seen["held"] == 0


def test_an_image_that_does_not_come_in_time(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusals, "_LINGER", 0.05)

    async def pieces() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "http.request", "body": picture()[:20], "more_body": True}
        await asyncio.sleep(30)

    seen = asyncio.run(ask(Limits(timeout_s=0.2), model, pieces(), content_type="image/png"))
    assert seen["status"] == 408 and seen["held"] == 0


def test_a_client_that_goes_leaves_nothing(model: Model) -> None:
    async def pieces() -> AsyncIterator[dict[str, Any]]:
        yield {"type": "http.request", "body": picture()[:20], "more_body": True}
        yield {"type": "http.disconnect"}
        yield {"type": "http.disconnect"}

    seen = asyncio.run(ask(Limits(), model, pieces(), content_type="image/png"))
    assert seen["status"] == 499 and seen["held"] == 0 and model.batches == []


# around it


def test_health_says_what_it_is_and_when_it_ends(serve: Serve, model: Model) -> None:
    client = serve()
    response = client.get("/health")
    assert response.status_code == 200
    known = {"status": "ok", "format": "onnx", "runtime": "fake", "task": "colours", "backbone": "tiny", "classes": 3}
    assert response.json().items() >= known.items()
    client.app.state.service.closing = True  # type: ignore[attr-defined]
    assert client.get("/health").status_code == 503
    response = send(client)
    assert response.status_code == 503 and "Retry-After" in response.headers and model.batches == []


def test_the_end_answers_what_waits(serve: Serve, model: Model) -> None:
    client = serve(max_batch=1)
    model.gate.clear()
    pool, futures = in_threads(client, ["red", "green", "blue"])
    until(lambda: waiting(client) == 2)
    ending = ThreadPoolExecutor(1).submit(client.app.state.service.close)  # type: ignore[attr-defined]
    until(lambda: client.get("/health").status_code == 503)
    model.gate.set()
    ending.result(10)
    assert [future.result(10).status_code for future in futures] == [200, 200, 200]
    pool.shutdown()


def test_metrics(serve: Serve, model: Model) -> None:
    client = serve(max_queue=2)
    assert send(client).status_code == 200
    assert send(client).status_code == 200
    assert client.post("/predict", content=b"x", headers=PNG).status_code == 400
    model.gate.clear()
    pool, futures = in_threads(client, ["red"])
    assert model.begun.acquire(timeout=10) and model.begun.acquire(timeout=10) and model.begun.acquire(timeout=10)
    response = client.get("/metrics")
    assert response.headers["Content-Type"].startswith("text/plain")
    lines = response.text.splitlines()
    expected = [
        'pyra_requests_total{status="200"} 2.0',
        'pyra_requests_total{status="400"} 1.0',
        "pyra_request_seconds_count 2.0",
        'pyra_stage_seconds_count{stage="decode"} 2.0',
        "pyra_batch_size_count 3.0",
        "pyra_batch_size_sum 3.0",
        "pyra_queue_length 0.0",
        "pyra_requests_in_work 1.0",
    ]
    assert [line for line in expected if line not in lines] == []
    assert any(line.startswith("process_resident_memory_bytes") for line in lines)
    model.gate.set()
    assert futures[0].result(10).status_code == 200
    pool.shutdown()


def test_two_servers_in_a_process_have_metrics_of_their_own(serve: Serve) -> None:
    one, two = serve(), serve()
    assert send(one).status_code == 200
    assert 'status="200"' in one.get("/metrics").text and 'status="200"' not in two.get("/metrics").text


def test_the_page_is_one_file_whose_policy_allows_its_own_script(serve: Serve) -> None:
    response = serve().get("/")
    policy, page = response.headers["Content-Security-Policy"], response.text
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "//" not in page.replace("</", "") and 'style="' not in page and not re.search(r"\son\w+=", page)
