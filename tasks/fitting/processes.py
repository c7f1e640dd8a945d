"""One run over several processes, as ``torchrun`` or ``accelerate launch`` start them: who writes, and who waits.

A process that was started alone needs none of it: there is one process, it is the main one, nothing waits.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from pyra.errors import ConfigError, OtherProcessError

Value = TypeVar("Value")


def count() -> int:
    """Return how many processes share this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def launched_alone() -> bool:
    """Whether a launcher was asked for several processes and started one.

    ``accelerate launch --cpu`` does so without MPI: it names the address to meet at, but nobody else comes.
    """
    return "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ


def join(device: torch.device) -> None:
    """Meet the other processes, before anything is exchanged with them; a process alone returns at once."""
    if count() > 1 and not dist.is_initialized():
        PartialState(cpu=device.type == "cpu")
        atexit.register(leave)  # once more: while an error is on its way, its traceback still refers to the group


def leave() -> None:
    """Part from the other processes, and end the threads that talked to them.

    A group and its threads live as long as anything refers to it, and trainers are cycles of references. A thread that
    lets go of its last tensors while Python shuts down aborts the process ("terminate called without an active
    exception"), whatever it was that the process had done.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    if count() > 1:
        gc.collect()


def wait() -> None:
    """Return when every process is here."""
    if count() > 1:
        dist.barrier()


def on_main(work: Callable[[], Value]) -> Value:
    """Let the main process work, and return what it found in every process.

    Raises:
        Exception: in the main process, whatever the work raised.
        OtherProcessError: in the others, when it did.
    """
    if count() == 1:
        return work()
    found: list[Any] = [None, None]
    failure: BaseException | None = None
    if is_main():
        try:
            found[0] = work()
        except BaseException as error:
            failure, found[1] = error, str(error) or type(error).__name__
    dist.broadcast_object_list(found)
    if failure is not None:
        raise failure
    if found[1] is not None:
        raise OtherProcessError(found[1])
    result: Value = found[0]
    return result


def gathered(values: Any) -> list[Any]:
    """Return what every process passes, in their order."""
    if count() == 1:
        return [values]
    found: list[Any] = [None] * count()
    dist.all_gather_object(found, values)
    return found


def share(number: int) -> list[int]:
    """Return the positions of this process among ``number`` items; as many in each, so that all take equal turns.

    Where the items do not divide evenly some are done twice: whoever gathers them goes by their position.
    """
    each = -(-number // count())
    return [(rank() + count() * turn) % number for turn in range(each)]


def batch_of_each(batch_size: int, accumulate: int = 1) -> int:
    """Return how many of a step's images one forward of one process takes.

    Raises:
        ConfigError: where they do not divide evenly.
    """
    parts = count() * accumulate
    if batch_size % parts:
        shared = f"{count()} process{'es' if count() > 1 else ''}" + (
            f" times {accumulate} parts" if accumulate > 1 else ""
        )
        raise ConfigError(f"--batch-size {batch_size} cannot be shared by {shared}: give a multiple of {parts}")
    return batch_size // parts
