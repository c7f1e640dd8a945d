"""Whether a chat template can be told that a model should think before it answers, and by which name."""

from __future__ import annotations

from typing import Any

from pyra.errors import ConfigError

THINKING = ("auto", "on", "off")
"""What ``--thinking`` takes; ``auto`` leaves it to the template."""
SWITCHES = ("enable_thinking", "thinking")
"""Names that templates have for the switch. Which one a template heeds, if any, is found by rendering with it."""

_ASKED = [{"role": "user", "content": "a"}]
_ANSWERED = [*_ASKED, {"role": "assistant", "content": "b"}]


def thinking_switch(tokenizer: Any) -> str | None:
    """Return the name of the switch that changes what a tokenizer's chat template writes, or None.

    Args:
        tokenizer: of transformers; one without a chat template has no switch.
    """
    return next((name for name in SWITCHES if _heeds(tokenizer, name)), None)


def thinking_values(tokenizer: Any, thinking: str, backbone: str) -> dict[str, bool]:
    """Return what a chat template is given for ``--thinking``; nothing for ``auto``.

    Args:
        tokenizer: of transformers, with a chat template.
        thinking: one of :data:`THINKING`.
        backbone: what errors call the model.

    Raises:
        ConfigError: where the template has no switch.
    """
    if thinking == "auto":
        return {}
    name = thinking_switch(tokenizer)
    if name is None:
        raise ConfigError(
            f"--thinking {thinking}: the chat template of {backbone} heeds neither {' nor '.join(SWITCHES)}; leave it "
            "out, or give another template"
        )
    return {name: thinking == "on"}


def _heeds(tokenizer: Any, name: str) -> bool:
    """Whether a chat comes out differently with the switch on and off."""
    if not getattr(tokenizer, "chat_template", None):
        return False

    def rendered(messages: list[dict[str, str]], asks: bool, value: bool) -> str:
        options = {"tokenize": False, "add_generation_prompt": asks, name: value}
        return str(tokenizer.apply_chat_template(messages, **options))

    for messages, asks in ((_ASKED, True), (_ANSWERED, False)):
        try:
            if rendered(messages, asks, True) != rendered(messages, asks, False):
                return True
        except Exception:  # of a template, which may raise what it pleases
            continue
    return False
