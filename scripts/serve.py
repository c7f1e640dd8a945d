"""``pyra serve``: a run or an export behind HTTP."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse
from pyra.tasks.serving.limits import Limits


@dataclass(kw_only=True)
class ServeOptions:
    """Options of ``pyra serve``."""

    folder: str = option("", "folder of a run or of an export")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is reached from other machines, without a password")
    port: int = option(8080, "to listen on; 0 takes a free one")
    runtime: str | None = option(None, "that opens an export: pytorch, onnxruntime or openvino; the first installed")
    threads: int | None = option(None, "of the runtime; its own choice by default")
    device: str = option("auto", "of a run: auto, cpu or cuda")
    trust_code: bool = option(False, "open an export that is machine code (aoti), which runs with your rights")
    max_batch: int = option(Limits.max_batch, "images in a forward")
    max_wait_ms: float = option(Limits.max_wait_ms, "milliseconds that an image waits for others to share its forward")
    max_queue: int = option(Limits.max_queue, "requests in work at once; others get status 503")
    max_bytes: int = option(Limits.max_bytes, "of an image as it is sent")
    max_pixels: int = option(Limits.max_pixels, "of an image")
    max_connections: int = option(Limits.max_connections, "that are open at once")
    timeout_s: float = option(Limits.timeout_s, "seconds that a request may take")
    decode_threads: int = option(Limits.decode_threads, "images that are decoded at once")

    def limits(self) -> Limits:
        """Return the limits among them; raises :class:`ConfigError` with every problem."""
        return Limits(**{limit.name: getattr(self, limit.name) for limit in fields(Limits)})


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, open the model, serve it until a signal: SIGTERM ends with status 0, Ctrl-C with 130."""
    options = parse(
        ServeOptions,
        argv,
        prog="pyra serve",
        description=(
            "Serve a run or an export: a page to try it at /, POST /predict for programs, /health and /metrics.\n"
            "Images of several requests share a forward. Memory is bounded by the limits, whatever is sent."
        ),
        example=(
            "pyra serve runs/a/export/onnx --port 8080\n"
            "  curl -F image=@photo.jpg 'http://127.0.0.1:8080/predict?top=3'\n"
            "  curl -H 'Content-Type: image/jpeg' --data-binary @photo.jpg http://127.0.0.1:8080/predict"
        ),
        positional="folder",
    )
    if not options.folder:
        raise ConfigError("FOLDER is missing: give the folder of a run or an export (see 'pyra serve --help')")
    from pyra.tasks.serving import need_libraries

    need_libraries()
    if _serve(options) == signal.SIGINT:
        raise KeyboardInterrupt
    return 0


def _serve(options: ServeOptions) -> int:
    from pyra.tasks.quiet import quiet_libraries

    quiet_libraries()  # before anything loads what would talk
    from pyra.tasks.predicting import open_classifier
    from pyra.tasks.serving.server import bound_socket, serve

    limits, where = options.limits(), bound_socket(options.host, options.port)
    classifier = open_classifier(
        options.folder,
        runtime=options.runtime,
        threads=options.threads,
        device=options.device,
        trust_code=options.trust_code,
    )

    def started(address: str) -> None:
        side, classes = classifier.image_size, len(classifier.labels)
        what = f"{classifier.format} in {classifier.runtime}, {classes} classes, {side} x {side} pixels"
        print(f"serving {options.folder} ({what})\n{address}  (Ctrl-C ends it)", flush=True)
        if options.host not in ("127.0.0.1", "::1", "localhost"):
            print(
                "note: other machines may reach it, and nothing asks who they are: put a proxy with TLS and a password "
                "in front of it",
                file=sys.stderr,
            )

    return serve(classifier, where, limits=limits, started=started)
