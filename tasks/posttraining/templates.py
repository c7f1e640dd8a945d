"""The chat template of a run: the tokenizer's own, one from a file, or a plain default where there is none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyra.errors import ConfigError
from pyra.tasks.language.models import load_tokenizer
from pyra.tasks.language.thinking import thinking_values
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.posttraining.options import PostTrainingOptions

Message = Mapping[str, Any]

_TURNS = (
    "{%- for message in messages -%}"
    "{{- ('' if loop.first else '\\n') + message['role'] | capitalize + ': ' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- END -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\nAssistant:' -}}{%- endif -%}"
)
_PROBE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


def plain_template(tokenizer: Any) -> str:
    r"""Return the template that stands in where a tokenizer has none: ``User: ...\nAssistant: ...`` a turn.

    A chat begins with the token that this tokenizer begins every text with, and the assistant's turns end with its
    end-of-text token, where it has them.
    """
    begins = bool(Encoder(tokenizer).starting)
    end = "eos_token" if tokenizer.eos_token is not None else "''"
    return ("{{- bos_token -}}" if begins else "") + _TURNS.replace("END", end)


def chat_encoder(options: PostTrainingOptions) -> tuple[Encoder, str | None]:
    """Load the tokenizer of a backbone with the chat template of a run, and what the template is given.

    Returns:
        The encoder, and a note where the plain template stands in.

    Raises:
        ConfigError: where there is no tokenizer, the template cannot be read or fails, or it has no switch for
            ``--thinking``.
    """
    tokenizer = load_tokenizer(options.backbone)
    note = None
    if options.chat_template is not None:
        tokenizer.chat_template = _read(options.chat_template)
    elif not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = plain_template(tokenizer)
        note = (
            f"the tokenizer of {options.backbone} has no chat template: turns are written 'User: ...' and "
            "'Assistant: ...'; --chat-template FILE gives another"
        )
    return encoder_of(tokenizer, options), note


def encoder_of(tokenizer: Any, options: PostTrainingOptions, stored: str | None = None) -> Encoder:
    """Return the encoder of a tokenizer that has its chat template.

    Args:
        tokenizer: with its template.
        options: of the run.
        stored: what errors call a template that is kept in a run folder; None takes where the options have it from.

    Raises:
        ConfigError: as of :func:`chat_encoder`.
    """
    values = template_values(options)
    place = options.chat_template or options.backbone
    values |= thinking_values(tokenizer, options.thinking, place)
    encoder = Encoder(tokenizer, chat=True, values=values)
    try:
        encoder.chat_text(_PROBE)
        encoder.chat_text(_PROBE[:1], asks=True)
    except ValueError as error:
        if stored is not None:
            raise ConfigError(f"{stored} fails ({error}): put back the file that the training wrote") from None
        raise ConfigError(f"the chat template of {place} fails ({error}): --chat-template FILE gives another") from None
    return encoder


def template_values(options: PostTrainingOptions) -> dict[str, Any]:
    """Return what ``--chat-template-kwargs`` gives the template; raises :class:`ConfigError` for what is no object."""
    text = options.chat_template_kwargs
    if text is None:
        return {}
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--chat-template-kwargs {text!r} is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(f'--chat-template-kwargs must be a JSON object such as \'{{"date": "today"}}\', got {text}')
    return values


def _read(file: str) -> str:
    try:
        text = Path(file).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--chat-template {file} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from None
    if not text.strip():
        raise ConfigError(f"--chat-template {file} is empty: give a file with a Jinja chat template")
    return text
