"""The model card of an exported folder: what it is, what merges in it, how to open it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from torch import nn

from pyra.backbones import geometry as sizes_of
from pyra.backbones import macs

if TYPE_CHECKING:
    from pyra.export.exporting import Job

_SHOWN = 20  # class names listed


def card(model: nn.Module, job: Job) -> str:
    """Return the text of ``README.md`` for a folded model."""
    channels, height, width = job.example.shape[1:]
    facts = [f"- Input: pixel values [B, {channels}, {height}, {width}], normalised; output: logits [B, classes]."]
    told = {"backbone": "Backbone", "task": "Task", "mean": "Mean of the pixels", "std": "Their standard deviation"}
    facts += [f"- {text}: {job.metadata[key]}." for key, text in told.items() if job.metadata.get(key)]
    if job.schedule is not None:
        now, plain = macs(model), macs(model, [0] * sizes_of(model).depth)
        facts.append(
            f"- Tokens removed in each layer: {', '.join(map(str, job.schedule))}; {now / 1e9:.3g} GMACs an image, "
            f"{1 - now / plain:.0%} fewer than without merging."
        )
    labels = _labels(job.metadata.get("labels", ""))
    if labels:
        more = f" and {len(labels) - _SHOWN} more" if len(labels) > _SHOWN else ""
        facts.append(f"- Classes: {', '.join(labels[:_SHOWN])}{more}.")
    return f"""---
tags: [image-classification, token-merging]
library_name: pyra
---

# An image classifier that merges tokens

Its adapter is folded into the weights; merging happens inside the model.

{chr(10).join(facts)}

```python
from pyra.export import load_model

model = load_model(".")  # or transformers' Auto classes, for a model of transformers, after `import pyra`
```
"""


def _labels(text: str) -> list[str]:
    try:
        labels = json.loads(text)
    except ValueError:
        return []
    return [str(label) for label in labels] if isinstance(labels, list) else []
