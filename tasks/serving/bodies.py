"""The image in a request: a body of its own, or the field ``image`` of a form. Never more is held than allowed."""

from __future__ import annotations

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from pyra.tasks.serving.limits import FRAMING, Limits
from pyra.tasks.serving.refusals import Refused

FIELD = "image"
_TYPES = f"send an image as the body (Content-Type: image/jpeg, image/png, ...) or as the field {FIELD!r} of a form"


async def read_image(request: Request, limits: Limits) -> bytes:
    """Return the encoded image of a request.

    Raises:
        Refused: 400 for a form without the field, with several, or a damaged one, or an empty image; 413 for more than
            ``limits.max_bytes``, as soon as that is known, from Content-Length or from what has come; 415 for
            another type of content, or one that is compressed; 499 where the client has gone.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type"))
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise Refused(415, f"Content-Encoding {encoding[:40]!r} is not taken: send the image as it is", unread=True)
    sink: _Plain | _Form
    if kind == b"multipart/form-data":
        sink = _Form(parameters.get(b"boundary", b""), limits.max_bytes)
    elif kind.startswith(b"image/"):
        sink = _Plain(limits.max_bytes)
    else:
        said = kind.decode("latin-1")[:60] or "none"
        raise Refused(415, f"Content-Type {said!r} is not taken: {_TYPES}", unread=True)
    most = limits.max_bytes + (FRAMING if isinstance(sink, _Form) else 0)
    told = request.headers.get("content-length", "")
    if told.isascii() and told.isdigit() and int(told[:18]) > most:
        raise too_large(limits.max_bytes)
    received, more = 0, True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise Refused(499, "the client has gone")
        chunk, more = message.get("body", b""), message.get("more_body", False)
        received += len(chunk)
        try:
            if received > most:
                raise too_large(limits.max_bytes)
            sink.write(chunk)
        except Refused as refused:
            refused.unread = more
            raise
    return sink.finish()


def too_large(most: int) -> Refused:
    """Return the refusal of an image of too many bytes."""
    return Refused(413, f"the image has more than {most} bytes: send a smaller one", unread=True)


class _Plain:
    """A body that is the image."""

    def __init__(self, most: int) -> None:
        self._image, self._most = bytearray(), most

    def write(self, chunk: bytes) -> None:
        if len(self._image) + len(chunk) > self._most:
            raise too_large(self._most)
        self._image += chunk

    def finish(self) -> bytes:
        if not self._image:
            raise Refused(400, f"the body is empty: {_TYPES}")
        return bytes(self._image)


class _Form:
    """A form, of which only the image is kept. What kind of image that is, its bytes say."""

    def __init__(self, boundary: bytes, most: int) -> None:
        self._image, self._found, self._ended = _Plain(most), 0, False
        self._wanted = False
        self._name, self._value = bytearray(), bytearray()
        try:
            if not boundary:
                raise FormParserError("it names no boundary")
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_part_data": self._data,
                    "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._header,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise self._damaged(error) from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise self._damaged(error) from None

    def finish(self) -> bytes:
        if not self._ended:
            raise Refused(400, "the form ends before its last boundary: send all of it")
        if self._found != 1:
            raise Refused(400, f"the form has {self._found} fields {FIELD!r}: send one image in one field of that name")
        return self._image.finish()

    def _begin(self) -> None:
        self._wanted = False

    def _header(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            _, parameters = parse_options_header(bytes(self._value))
            self._wanted = parameters.get(b"name") == FIELD.encode()
            self._found += self._wanted
        self._name.clear()
        self._value.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._wanted:
            if self._found > 1:
                raise Refused(400, f"the form has several fields {FIELD!r}: send one image a request", unread=True)
            self._image.write(data[start:end])

    def _end(self) -> None:
        self._ended = True

    @staticmethod
    def _damaged(error: Exception) -> Refused:
        return Refused(400, f"the form cannot be read: {' '.join(str(error).split())[:150]}", unread=True)
