"""Whether the data of a language task is what its card says, found before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pyra.errors import DataError
from pyra.tasks.language.cards import find_text_card
from pyra.tasks.language.data import Example, load_text_task

_SHOWN = 3


def check_text_task(
    name: str, root: str | None = None, data: str | None = None
) -> tuple[dict[str, int], list[str], list[str]]:
    """Check columns, labels, empty texts, counts, and that no training example is in the test split.

    Args:
        name: of the task, or a card file.
        root: folder with a folder of its files.
        data: folder with its files themselves, instead.

    Returns:
        Examples of each split, what makes the task unusable, and what is worth knowing.

    Raises:
        DataError: for an unknown task; what is wrong with its data is returned.
    """
    card, _ = find_text_card(name)
    try:
        task = load_text_task(name, root, data)
    except DataError as error:
        return {}, [str(error)], []
    counts = {split: len(examples) for split, examples in task.splits.items()}
    notes = [
        f"{split} has {counts[split]} examples, its card says {count}"
        for split, count in card.splits.items()
        if split in counts and counts[split] != count
    ]
    problems = [f"{split} is empty" for split, count in counts.items() if not count]
    problems += [
        f"{split} has no example of {', '.join(missing[:_SHOWN])}"
        for split in ("train", "test")
        if (missing := _missing(card.labels, task.splits[split]))
    ]
    notes += _shared(task.splits) + _repeated(task.splits["train"])
    return counts, problems, notes


def _missing(labels: Sequence[str], examples: Sequence[Example]) -> list[str]:
    seen = Counter(example.label for example in examples)
    return [name for label, name in enumerate(labels) if not seen[label]]


def _shared(splits: Mapping[str, Sequence[Example]]) -> list[str]:
    """Texts do repeat between splits of honest data sets ("good film"), so this is told and not refused."""
    trained = {example.texts for example in splits["train"]}
    shared = [example for example in splits["test"] if example.texts in trained]
    if not shared:
        return []
    text = " ".join(shared[0].texts[0].split())[:60]
    return [f"{len(shared)} test examples are in the training split, too, such as {text!r}"]


def _repeated(examples: Sequence[Example]) -> list[str]:
    answers: dict[str, set[str]] = {}
    for example in examples:
        answers.setdefault(example.prompt, set()).add(example.answer)
    repeated = len(examples) - len(answers)
    against = sum(len(found) > 1 for found in answers.values())
    if not repeated:
        return []
    return [f"{repeated} training examples repeat another" + (f", {against} with another answer" if against else "")]
