"""Few-shot settings as a modifier of any task: so many training images a class, the test split as it is.

The settings of few-shot work on fine-grained tasks (such as arXiv 2206.04673) are 1, 2, 4, 8 and 16 images a class.
"""

from __future__ import annotations

import dataclasses

from pyra.errors import DataError
from pyra.tasks.data.draws import few_of_each, rows_by_class
from pyra.tasks.data.task import Task

_VALIDATION = ("validation", "val200")
_NAMED = 5


def few_shot(task: Task, shots: int, seed: int = 0) -> Task:
    """Return the task with ``shots`` training images of each class.

    With a smaller number, the images are a part of those of a larger one. Of each validation split as many images of a
    class are left, or all where it has fewer. A task with ``train800`` and ``val200`` draws its training images from
    the former, so that no image both trains and chooses; ``train`` is then ``train800``.

    Args:
        task: of any kind.
        shots: images a class, at least 1.
        seed: of the draw; nothing else depends on it.

    Raises:
        DataError: where a class has fewer training images, with the classes.
    """
    if shots < 1:
        raise DataError(f"--shots is {shots}; it must be at least 1 image a class")
    splits = dict(task.splits)
    source = "train800" if "train800" in splits else "train"
    labels = splits[source]["label"][:]
    there = rows_by_class(labels)
    few = {name: len(there.get(label, ())) for label, name in enumerate(task.labels)}
    few = {name: count for name, count in few.items() if count < shots}
    if few:
        listed = ", ".join(f"{name} ({count})" for name, count in list(few.items())[:_NAMED])
        more = f" and {len(few) - _NAMED} more" if len(few) > _NAMED else ""
        least = min(few.values())
        hint = f"--shots can be at most {least}" if least else "a class without any cannot be learned"
        raise DataError(
            f"task {task.name}: {len(few)} of {len(task.labels)} classes have fewer than {shots} images in {source}: "
            f"{listed}{more}; {hint}"
        )
    splits[source] = splits[source].select(few_of_each(labels, shots, seed, "train"))
    splits["train"] = splits[source]
    for name in _VALIDATION:
        if name in splits:
            chosen = few_of_each(splits[name]["label"][:], shots, seed, "validation")
            splits[name] = splits[name].select(chosen)
    return dataclasses.replace(
        task,
        name=f"{task.name}-{shots}shot",
        splits=splits,
        description=f"{task.description} ({shots} training images a class, draw {seed})".strip(),
    )
