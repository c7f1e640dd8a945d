"""Which shipped task the files of a folder are, where ``--task`` does not say it."""

from __future__ import annotations

import json
from pathlib import Path

from pyra.errors import DataError
from pyra.tasks.language.cards import TextCard, find_text_card, text_task_names
from pyra.tasks.language.sources import has_columns


def infer_task(data: str | None, backbone: str | None) -> str | None:
    """Return the name of the one shipped task whose files, with its columns, lie in a folder.

    Tasks that are composed of another one's rows are not looked for: they are asked for by name.

    Args:
        data: the folder.
        backbone: of the run.

    Returns:
        None where nothing says that the data is text: no folder, or none that fits and no folder of a language model
        as backbone.

    Raises:
        DataError: where several tasks fit, or none for a language model.
    """
    if data is None:
        return None
    cards = [card for card in _plain_cards() if _fits(card, Path(data).expanduser())]
    if len(cards) == 1:
        return cards[0].name
    if cards:
        names = ", ".join(card.name for card in cards)
        raise DataError(f"--data {data} fits several tasks ({names}): name one with --task")
    if not reads_text_alone(backbone):
        return None
    known = "; ".join(f"{card.name} ({_files(card)}: {', '.join(card.columns)})" for card in _plain_cards())
    raise DataError(
        f"--data {data} has the files and columns of no shipped task, {known}: give --task NAME or FILE.yaml"
    )


def _plain_cards() -> list[TextCard]:
    cards = (find_text_card(name)[0] for name in text_task_names())
    return [card for card in cards if card.files and not card.compose]


def _fits(card: TextCard, folder: Path) -> bool:
    return all(has_columns(folder / file, card.columns) for file in card.files.values())


def _files(card: TextCard) -> str:
    return ", ".join(card.files.values())


def reads_text_alone(backbone: str | None) -> bool:
    """Whether a folder holds a model that reads text alone, by its configuration."""
    try:
        config = json.loads((Path(backbone or "").expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "vocab_size" in config and "vision_config" not in config
