"""From texts to token ids and batches: what a decoder reads, where its answer begins, and padding.

Padding is done here, with ids of our own choosing, so that tokenizers without a padding token work, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyra.tasks.language.prompts import SEPARATOR
from pyra.tasks.language.thoughts import Marks, opened, spoken, thought_marks

_PROBE = "5ac1e07b"  # a text that no template holds
_TAIL = 32  # tokens at the end of a prompt that a mark is looked for in

IGNORED = -100
"""Label of a token that no loss is taken of."""


@dataclass(frozen=True)
class Answered:
    """Token ids of a prompt and its answer; the answer begins at ``start``."""

    ids: list[int]
    start: int


@dataclass(frozen=True)
class Encoder:
    """A tokenizer, and the prompt around a prompt.

    Args:
        tokenizer: of transformers.
        chat: give prompts through the tokenizer's chat template, as what the user says.
        kinds: say which of two texts a token is of, where the tokenizer does; not every model takes that.
        values: what the chat template is given beside the messages, such as a switch for thinking.
    """

    tokenizer: Any = field(repr=False)
    chat: bool = False
    kinds: bool = True
    values: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def pad_id(self) -> int:
        """Id that fills batches: the tokenizer's own, or else of a token that is in no text, or else 0."""
        names = ("pad", "eos", "unk", "bos", "sep")
        found = (getattr(self.tokenizer, f"{name}_token_id", None) for name in names)
        return next((int(value) for value in found if value is not None), 0)

    @cached_property
    def end(self) -> list[int]:
        """What ends an answer: the end-of-text token, or nothing where there is none."""
        value = self.tokenizer.eos_token_id
        return [] if value is None else [int(value)]

    def prompt(self, text: str) -> list[int]:
        """Return the ids that an answer follows; never none of them."""
        return self._encode(self._framed(text)) or [self._first]

    def answered(self, prompt: str, answers: Sequence[str]) -> list[Answered]:
        """Encode a prompt with each of several answers; all answers begin at the same token.

        Prompt and answer are encoded together, as text is: where that joins the last letters of the prompt with the
        answer, the answers begin before them.
        """
        framed = self._framed(prompt)
        separator = self._gap if self.chat else SEPARATOR
        start = self.prompt(prompt)
        whole = [self._encode(framed + separator + answer) for answer in answers]
        if not self._encode(framed):
            whole = [start + ids for ids in whole]
        shared = min(min(common_length(start, ids), len(ids) - 1) for ids in whole)  # an answer has a token of its own
        if not shared:  # all of the prompt was joined with the answers
            whole, shared = [[self._first, *ids] for ids in whole], 1
        return [Answered(ids, shared) for ids in whole]

    def texts(self, texts: Sequence[str], max_length: int) -> dict[str, list[int]]:
        """Encode what a classification head reads, cut to ``max_length`` tokens: one text or two."""
        encoded = self.tokenizer(*texts, truncation=True, max_length=max_length)
        names = ("input_ids", "token_type_ids") if self.kinds else ("input_ids",)
        return {name: list(encoded[name]) for name in names if name in encoded}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @cached_property
    def marks(self) -> Marks | None:
        """What opens and closes a thought; None where prompts are no chats, or their template knows no thoughts."""
        return thought_marks(self.tokenizer) if self.chat else None

    def begun(self, prompt: Sequence[int]) -> str:
        """Return the mark that opens a thought where a prompt ends with it, or nothing."""
        return "" if self.marks is None else opened(str(self.tokenizer.decode(prompt[-_TAIL:])), self.marks)

    def spoken(self, ids: Sequence[int], begun: str = "") -> str:
        """Return the text of generated ids without the thought before it; ``begun`` of :meth:`begun`."""
        if self.marks is None:
            return self.decode(ids)
        found = spoken(begun + str(self.tokenizer.decode(ids)), self.marks)  # a mark may be a special token
        for token in self.tokenizer.all_special_tokens:
            found = found.replace(token, "")
        return found

    def _framed(self, prompt: str) -> str:
        if not self.chat:
            return prompt
        return self.chat_text([{"role": "user", "content": prompt}], asks=True)

    def chat_text(
        self, messages: Sequence[Mapping[str, Any]], *, asks: bool = False, values: Mapping[str, Any] | None = None
    ) -> str:
        """Return a chat as the tokenizer's template writes it.

        Args:
            messages: turns with role and content.
            asks: end where the assistant is to go on.
            values: more for the template, before those of the encoder.

        Raises:
            ValueError: where the template fails, in one line.
        """
        given = {**self.values, **(values or {}), "tokenize": False, "add_generation_prompt": asks}
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), **given))
        except Exception as error:  # of a template, which may raise what it pleases
            raise ValueError(" ".join(str(error).split())[:200] or type(error).__name__) from None

    def going_on(self, prompt: str, answer: str) -> Answered:
        """Encode a text of :meth:`chat_text` and what goes on from it; the template has written a text's first token.

        They are encoded together, as text is: where that joins the last letters of the prompt with the answer, the
        answer begins before them.
        """
        start = self._plain(prompt) or [self._first]
        ids = self._plain(prompt + answer)
        shared = min(common_length(start, ids), len(ids) - 1)
        return Answered(ids, shared) if shared > 0 else Answered([self._first, *ids], 1)

    @cached_property
    def _gap(self) -> str:
        """White space that the chat template writes between what asks and an answer."""
        asked = {"role": "user", "content": "a"}
        try:
            before = self._framed("a")
            whole = self.chat_text([asked, {"role": "assistant", "content": _PROBE}])
        except ValueError:
            return ""
        between = whole.removeprefix(before).partition(_PROBE)[0]
        return between if whole.startswith(before) and between.isspace() else ""

    @property
    def starting(self) -> list[int]:
        """Special tokens that the tokenizer puts before every text."""
        return self._added[0]

    def _encode(self, text: str) -> list[int]:
        before = [] if self.chat else self._added[0]  # a chat template writes its own
        return [*before, *self._plain(text)]

    def _plain(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    @cached_property
    def _added(self) -> tuple[list[int], list[int]]:
        """Special tokens that the tokenizer puts before and after a text; only the first belong before an answer."""
        plain = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self.tokenizer("a")["input_ids"]
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain and plain:
                return whole[:start], whole[start + len(plain) :]
        return [], []

    @property
    def _first(self) -> int:
        """What stands before a text that encodes to nothing."""
        start = self.tokenizer.bos_token_id
        return int(start) if start is not None else (self.end or [self.pad_id])[0]


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Stack rows of different lengths, [B, T], filled with ``value`` at one side."""
    width = max(map(len, rows))
    filled = [[value] * (width - len(row)) for row in rows]
    pairs = zip(rows, filled, strict=True)
    return torch.tensor([[*fill, *row] if left else [*row, *fill] for row, fill in pairs], dtype=torch.long)


def mask(rows: Sequence[Sequence[int]], *, left: bool = False) -> Tensor:
    """Return the attention mask of what :func:`pad` makes of the same rows, [B, T]."""
    return pad([[1] * len(row) for row in rows], 0, left=left)


def by_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield batches of indices, the longest rows first: what does not fit into memory is seen at once."""
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how long the common beginning of two rows or texts is."""
    equal = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(equal, min(len(first), len(second)))
