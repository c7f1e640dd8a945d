"""Small chats and preferences, and a chat template with a switch for thinking."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from pyra.tasks.posttraining.rows import Row

TEMPLATE = (
    "{{- bos_token -}}{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] + eos_token -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}"
    "{%- if thinking is defined and not thinking -%}{{- '<think></think>' -}}{%- endif -%}{%- endif -%}"
)
"""A template with a switch for thinking: without it, an empty block of thoughts is written before the answer."""


def write_lines(file: Path, rows: Iterable[object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


def as_rows(values: Iterable[dict[str, object]]) -> list[Row]:
    return [Row(dict(value), f"f.jsonl, line {number}") for number, value in enumerate(values, 1)]


def chat(number: int) -> dict[str, object]:
    """A chat of 20 to 40 tokens before the answer, which depends on what is asked."""
    asked = f"Tom has {number} apples and buys {number % 4} more . How many are there ? " + "a fine film " * (
        number % 3
    )
    return {
        "messages": [
            {"role": "user", "content": asked.strip()},
            {"role": "assistant", "content": f"{number} + {number % 4} = {number + number % 4}"},
        ]
    }


def pair(number: int) -> dict[str, object]:
    """A preference that can be learnt: the good answer is warm, the bad one cold."""
    asked = f"Review {number} : is this review positive or negative ? what a great joy to watch"
    return {"prompt": asked, "chosen": "a warm joy" + " fine" * (number % 3), "rejected": "a cold bore"}
