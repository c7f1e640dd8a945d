"""What Prometheus reads of a server, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)

STAGES = ("decode", "queue", "model")


class Metrics:
    """Counters, histograms and gauges of one server.

    Args:
        waiting: returns how many images wait for the model.
        held: returns how many requests are in work.
    """

    def __init__(self, waiting: Callable[[], int], held: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        own = self.registry
        self._requests = Counter("pyra_requests", "Requests to /predict that were answered", ["status"], registry=own)
        self._seconds = Histogram(
            "pyra_request_seconds", "From the headers of a request to its answer", buckets=_SECONDS, registry=own
        )
        self._stages = Histogram(
            "pyra_stage_seconds", "Time of an image in each stage", ["stage"], buckets=_SECONDS, registry=own
        )
        self._batches = Histogram("pyra_batch_size", "Images in a forward", buckets=_IMAGES, registry=own)
        Gauge("pyra_queue_length", "Images that wait for the model", registry=own).set_function(waiting)
        Gauge("pyra_requests_in_work", "Requests that hold memory", registry=own).set_function(held)
        ProcessCollector(registry=own)

    def request(self, status: int, seconds: float) -> None:
        """Count an answered request; only those that got a prediction say how long one takes."""
        self._requests.labels(str(status)).inc()
        if status == 200:
            self._seconds.observe(seconds)

    def stages(self, milliseconds: dict[str, float]) -> None:
        """Take the time of one image in each of :data:`STAGES`."""
        for stage in STAGES:
            self._stages.labels(stage).observe(milliseconds[stage] / 1000)

    def batch(self, images: int) -> None:
        """Take the size of a batch."""
        self._batches.observe(images)

    def text(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self.registry)
