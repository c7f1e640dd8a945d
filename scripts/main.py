"""``pyra``: one command, one verb a job. Each verb is a module of :mod:`pyra.scripts` with ``main(argv) -> int``."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence

from pyra.errors import ConfigError, OtherProcessError, PyraError, did_you_mean, is_out_of_memory

VERBS = {
    "train": ("pyra.scripts.train", "adapt a backbone to a task and save the run"),
    "sft": ("pyra.scripts.sft", "train a decoder on chats"),
    "dpo": ("pyra.scripts.dpo", "train a decoder to prefer some answers to others"),
    "evaluate": ("pyra.scripts.evaluate", "score and time a saved run"),
    "sweep": ("pyra.scripts.sweep", "train a grid of methods and rates, here or on a cluster, and report"),
    "results": ("pyra.scripts.results", "show all runs below folders in one table"),
    "recommend": ("pyra.scripts.recommend", "name the fastest of many runs that loses little, and how sure that is"),
    "schedule": ("pyra.scripts.schedule", "find a schedule for a latency, by calibration or by search"),
    "visualize": ("pyra.scripts.visualize", "picture what merged in an image, layer by layer"),
    "compress-experts": ("pyra.scripts.compress_experts", "drop the experts of a mixture that a task does not use"),
    "export": ("pyra.scripts.export", "write a run for deployment (ONNX, ...), reload and compare it"),
    "predict": ("pyra.scripts.predict", "classify images with a run or an export, as JSON"),
    "serve": ("pyra.scripts.serve", "serve a run or an export: a page, an endpoint, health and metrics"),
    "demo": ("pyra.scripts.demo", "four adaptations of a small backbone, measured and plotted"),
    "tasks": ("pyra.scripts.tasks", "list the tasks, check and prepare their data"),
    "benchmark": ("pyra.scripts.benchmark", "measure speed and memory against the unwrapped model"),
    "env": ("pyra.scripts.env", "show versions and hardware, for bug reports"),
}

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DESCRIPTION = "Adapt a pretrained transformer with few trained weights, and make it faster by merging tokens."
_EXAMPLE = "pyra train --task demo --method pyra --rate 0.7 --output runs/a"


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pyra VERB ...`` and return the exit status: 0, 2 for wrong input, 130 when interrupted.

    >>> main(["--version"])  # doctest: +SKIP
    pyra 0.1.0
    0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Threads that spin for long slow a shared machine down, threads that never spin a quiet one; GNU OpenMP reads this
    # when torch loads.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    alone = os.environ.get("RANK", "0") == "0"
    if not alone:  # one of several processes that share a run: the first one tells
        os.environ.setdefault("TQDM_DISABLE", "1")
    if "RANK" in os.environ:  # torch's remarks on how parameters are shared, which nobody at the keyboard can change
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with contextlib.suppress(ValueError):  # only the main thread may; an interrupted output is then cleaned up
        signal.signal(signal.SIGTERM, _terminate)
    try:
        return _dispatch(arguments)
    except PyraError as error:
        if not alone:
            time.sleep(10)  # the first process says the same, and its launcher then ends this one
        if alone or not isinstance(error, (ConfigError, OtherProcessError)):
            print(f"pyra: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader has seen enough: `pyra tasks ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None:
            raise
        full = error.errno in _NO_ROOM
        hint = "; free some space there, or choose another --output" if full else ""
        what = f"cannot {'write' if full else 'use'} {error.filename}"
        print(f"pyra: error: {what}: {error.strerror}{hint}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("pyra: error: out of memory: try a smaller --batch-size, or smaller images", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pyra: interrupted", file=sys.stderr)
        return 130


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def usage() -> str:
    """Return the text of ``pyra --help``."""
    verbs = "\n".join(f"  {name:<18}{text}" for name, (_, text) in VERBS.items())
    return (
        f"usage: pyra VERB [options]\n\n{_DESCRIPTION}\n\nverbs:\n{verbs}\n\n"
        "options:\n  -h, --help  show this text; 'pyra VERB --help' shows a verb's options\n"
        "  --version   show the version\n\n"
        f"example:\n  {_EXAMPLE}"
    )


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        import pyra

        print(f"pyra {pyra.__version__}")
        return 0
    if verb not in VERBS:
        known = [*VERBS, "--help", "--version"]
        raise ConfigError(f"unknown verb {verb!r}{did_you_mean(verb, known)}; verbs are {', '.join(VERBS)}")
    return int(importlib.import_module(VERBS[verb][0]).main(rest))


if __name__ == "__main__":
    sys.exit(main())
