"""Whether a template can be told to think is found by rendering."""

from __future__ import annotations

import pytest
from tiny_language import tokenizer

from pyra.errors import ConfigError
from pyra.tasks.language.thinking import thinking_switch, thinking_values

TURNS = "{%- for m in messages -%}{{- m['role'] + ': ' + m['content'] -}}{%- endfor -%}"
TEMPLATES = {
    "enable_thinking": TURNS
    + "{%- if add_generation_prompt -%}{{- 'A:' -}}{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{- '<think></think>' -}}{%- endif -%}{%- endif -%}",
    "thinking": TURNS + "{%- if add_generation_prompt -%}{{- '<think>' if thinking else '</think>' -}}{%- endif -%}",
    # Heeded in what was said alone, and by a template that fails where nothing was said yet.
    "thinking, said": "{%- if messages | length < 2 -%}{{- raise_exception('say more') -}}{%- endif -%}"
    + TURNS
    + "{%- if thinking -%}{{- '!' -}}{%- endif -%}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_switch_is_found(name: str) -> None:
    words = tokenizer()
    words.chat_template = TEMPLATES[name]
    switch = name.split(",")[0]
    assert thinking_switch(words) == switch
    assert thinking_values(words, "on", "x") == {switch: True}
    assert thinking_values(words, "off", "x") == {switch: False}
    assert thinking_values(words, "auto", "x") == {}


@pytest.mark.parametrize(
    "template",
    [
        None,
        TURNS,
        TURNS + "{# thinking, enable_thinking: only written about #}",
        "{%- set thinking = 1 -%}" + TURNS,
        "{{- raise_exception('no') -}}",
    ],
    ids=["none", "plain", "a comment", "its own", "fails"],
)
def test_a_template_without_one_is_told(template: str | None) -> None:
    words = tokenizer()
    words.chat_template = template
    assert thinking_switch(words) is None
    assert thinking_values(words, "auto", "tiny") == {}
    with pytest.raises(
        ConfigError, match="--thinking off: the chat template of tiny heeds neither enable_thinking nor"
    ):
        thinking_values(words, "off", "tiny")
