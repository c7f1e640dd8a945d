"""The queue in front of the model, on its own."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from colour_model import Model, until

from pyra.tasks.serving.batching import Answer, Batcher, Closed, Expired, QueueFull

LONG = 1e9  # a deadline that does not come


@pytest.fixture
def batcher(model: Model) -> Iterator[Batcher]:
    made = Batcher(lambda pixels: model(pixels.float()), max_batch=2, max_wait_ms=0, max_queue=3)
    made.start()
    yield made
    model.gate.set()
    made.close(5)


def image(value: int) -> torch.Tensor:
    return torch.full((3, 4, 4), value, dtype=torch.uint8)


def value_of(answer: Answer) -> float:
    return float(answer.probabilities[0]) / 10


def occupied(batcher: Batcher, model: Model) -> None:
    """Give the model something to do, and wait until it does."""
    model.gate.clear()
    batcher.submit(image(0), LONG)
    assert model.begun.acquire(timeout=10)


def test_a_full_queue_takes_no_more_and_loses_nothing(batcher: Batcher, model: Model) -> None:
    occupied(batcher, model)
    futures = [batcher.submit(image(value), LONG) for value in (1, 2, 3)]
    assert batcher.waiting == 3
    with pytest.raises(QueueFull):
        batcher.submit(image(4), LONG)
    model.gate.set()
    answers = [future.result(10) for future in futures]
    assert [value_of(answer) for answer in answers] == [1, 2, 3]
    assert [answer.batch_size for answer in answers] == [2, 2, 1] and model.batches == [1, 2, 1]
    assert all(answer.queue_ms > 0 and answer.model_ms >= 0 for answer in answers)


def test_the_model_never_sees_what_nobody_waits_for(batcher: Batcher, model: Model) -> None:
    occupied(batcher, model)
    late, wanted = batcher.submit(image(1), time.perf_counter()), batcher.submit(image(2), LONG)
    model.gate.set()
    with pytest.raises(Expired):
        late.result(10)
    assert wanted.result(10).batch_size == 1


def test_a_future_that_was_cancelled_does_not_end_the_thread(batcher: Batcher, model: Model) -> None:
    occupied(batcher, model)
    cancelled, wanted = batcher.submit(image(1), LONG), batcher.submit(image(2), LONG)
    assert cancelled.cancel()
    model.gate.set()
    assert value_of(wanted.result(10)) == 2
    assert batcher.alive and value_of(batcher.submit(image(3), LONG).result(10)) == 3


def test_a_model_that_answers_too_few_is_an_error_of_that_batch(model: Model) -> None:
    batcher = Batcher(lambda pixels: pixels[:0].float(), max_batch=2, max_wait_ms=0, max_queue=3)
    batcher.start()
    for _ in range(2):
        with pytest.raises(ValueError):
            batcher.submit(image(1), LONG).result(10)
    batcher.close(5)
    assert not batcher.alive


def test_the_end_answers_what_waits_and_takes_nothing_more(batcher: Batcher, model: Model) -> None:
    occupied(batcher, model)
    future = batcher.submit(image(7), LONG)
    model.gate.set()
    batcher.close(10)
    assert value_of(future.result(0)) == 7 and not batcher.alive
    with pytest.raises(Closed):
        batcher.submit(image(1), LONG)


def test_a_model_that_hangs_does_not_keep_the_server(batcher: Batcher, model: Model) -> None:
    occupied(batcher, model)
    future = batcher.submit(image(7), LONG)
    start = time.monotonic()
    batcher.close(0.1)
    assert time.monotonic() - start < 5
    with pytest.raises(Closed):
        future.result(0)
    model.gate.set()
    until(lambda: not batcher.alive)
