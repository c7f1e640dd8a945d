"""One request from its first byte to its answer, and what all of them share.

A request has a slot from before its body is read until nothing of it is in memory any more: slots bound the memory
(:class:`~pyra.tasks.serving.limits.Limits`), and who finds none is told to come again. Work in a thread cannot be
stopped: whoever waits too long is told so, and the slot stays taken until the thread is done.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import Request
from PIL import Image
from torch import Tensor

from pyra.tasks.classifier import Classifier
from pyra.tasks.data.decoding import decode_image, unreadable
from pyra.tasks.serving.batching import Answer, Batcher, Closed, Expired, QueueFull
from pyra.tasks.serving.bodies import read_image
from pyra.tasks.serving.limits import FORMATS, Limits
from pyra.tasks.serving.metrics import Metrics
from pyra.tasks.serving.refusals import Refused, busy

_LAST_ANSWERS = 5.0  # seconds
_ENDING = "the server is about to end: try again"


@dataclass(frozen=True)
class _Decoded:
    pixels: Tensor
    waited_ms: float
    decode_ms: float


class Service:
    """A classifier with its queue, its decoders and its metrics.

    Args:
        classifier: what answers. It runs in one thread.
        limits: of everything that is held.

    Attributes:
        closing: whether new requests are refused because the server ends.
    """

    def __init__(self, classifier: Classifier, limits: Limits) -> None:
        self.classifier, self.limits = classifier, limits
        self.closing = False
        self._held = 0  # of the event loop's thread only
        self._batcher = Batcher(
            self._run, max_batch=limits.max_batch, max_wait_ms=limits.max_wait_ms, max_queue=limits.max_queue
        )
        self.metrics = Metrics(lambda: self._batcher.waiting, lambda: self._held)
        self._decoders = ThreadPoolExecutor(limits.decode_threads, thread_name_prefix="pyra-decoder")

    def start(self) -> None:
        """Start the thread of the model."""
        self._batcher.start()

    def close(self) -> None:
        """Refuse what comes, answer what waits."""
        self.closing = True
        self._batcher.close(_LAST_ANSWERS)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    @property
    def healthy(self) -> bool:
        """Whether it answers."""
        return not self.closing and self._batcher.alive

    async def answer(self, request: Request, top: int) -> dict[str, Any]:
        """Classify the image of a request.

        Args:
            request: whose body has not been read.
            top: classes to list.

        Returns:
            The JSON of the answer.

        Raises:
            Refused: as :func:`~pyra.tasks.serving.bodies.read_image`; 400 for what is no image, 413 for too many
                pixels, 503 where there is no slot or the server ends; after ``timeout_s`` 408 where the image has not
                come, 504 where the answer has not.
            Exception: what the model raises.
        """
        start = time.perf_counter()
        if self.closing:
            raise busy(_ENDING, unread=True)
        if self._held >= self.limits.max_queue:
            raise busy(f"{self._held} requests are in work, as many as may be: try again", unread=True)
        deadline = start + self.limits.timeout_s
        self._held += 1
        try:
            async with asyncio.timeout(self.limits.timeout_s):
                encoded = await read_image(request, self.limits)
        except BaseException as error:
            self._held -= 1
            if isinstance(error, TimeoutError):
                said = f"the image has not come within {self.limits.timeout_s:g} s: send it faster, or a smaller one"
                raise Refused(408, said, unread=True) from None
            raise
        work = asyncio.create_task(self._work(encoded, deadline))
        work.add_done_callback(self._ended)
        del encoded  # the task has it, for as long as it needs it
        await asyncio.wait({work}, timeout=max(0.0, deadline - time.perf_counter()))
        if not work.done():
            raise self._late()
        decoded, answer = work.result()
        return self._told(decoded, answer, top, start)

    def _ended(self, work: asyncio.Task[tuple[_Decoded, Answer]]) -> None:
        self._held -= 1
        if not work.cancelled():
            work.exception()  # taken: nobody may be there any more to do so

    async def _work(self, encoded: bytes, deadline: float) -> tuple[_Decoded, Answer]:
        decoding = self._decoders.submit(self._decode, encoded, time.perf_counter(), deadline)
        del encoded
        decoded = await asyncio.wrap_future(decoding)
        try:
            return decoded, await asyncio.wrap_future(self._batcher.submit(decoded.pixels, deadline))
        except QueueFull:
            raise busy(f"{self.limits.max_queue} images wait for the model, as many as may: try again") from None
        except Closed:
            raise busy(_ENDING) from None
        except Expired:
            raise self._late() from None

    def _decode(self, encoded: bytes, since: float, deadline: float) -> _Decoded:
        start = time.perf_counter()
        if start >= deadline:
            raise self._late()
        try:
            image = decode_image(encoded, max_pixels=self.limits.max_pixels, formats=FORMATS)
            pixels = self.classifier.prepare(image)
        except Image.DecompressionBombError as error:
            raise Refused(413, f"{' '.join(str(error).split())}: send a smaller image") from None
        except MemoryError:
            raise busy("there is no memory for the image now: try again, or send a smaller one") from None
        except Exception as error:  # a damaged file makes Pillow's decoders raise nearly anything
            raise Refused(400, f"no readable image of {', '.join(FORMATS)}: {unreadable(error)}") from None
        return _Decoded(pixels, 1000 * (start - since), 1000 * (time.perf_counter() - start))

    def _run(self, pixels: Tensor) -> Tensor:
        self.metrics.batch(len(pixels))
        return self.classifier.probabilities(pixels)

    def _late(self) -> Refused:
        return Refused(504, f"no answer within {self.limits.timeout_s:g} s: the server has too much to do", again=1)

    def _told(self, decoded: _Decoded, answer: Answer, top: int, start: float) -> dict[str, Any]:
        scores = self.classifier.best(answer.probabilities, top)
        milliseconds = {
            "decode": decoded.decode_ms,
            "queue": decoded.waited_ms + answer.queue_ms,
            "model": answer.model_ms,
            "total": 1000 * (time.perf_counter() - start),
        }
        self.metrics.stages(milliseconds)
        return {
            "label": scores[0].label,
            "probability": scores[0].probability,
            "top": [asdict(score) for score in scores],
            "milliseconds": {name: round(value, 3) for name, value in milliseconds.items()},
            "batch_size": answer.batch_size,
        }
