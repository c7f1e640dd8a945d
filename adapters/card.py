"""The model card of an adapter folder: what the hub reads from its front matter, and what people read below it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from peft import PeftModel
from torch import Tensor, nn

from pyra.adapters.adapting import is_image_model
from pyra.backbones import macs, wrapped_config, wrapped_schedule
from pyra.errors import ConfigError

MARK = "<!-- pyra writes this file anew with every save_adapter; without this line it is yours and stays -->"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_TEMPLATE = """---
{front}
---
{mark}

# Adapter

|  |  |
|---|---|
{table}

```python
from pyra.adapters import load_adapter

base = ...  # the backbone with its pretrained weights, and a head of the same size
model = load_adapter(base, "this folder")
```
{note}"""


@dataclass(frozen=True)
class CardInfo:
    """What a model card is to say beyond what the model knows.

    Args:
        base_model: the backbone's name on the hub; None takes it from the model (timm: the pretrained tag of its
            configuration), where it tells.
        task: data set or task the adapter was trained for.
        metric: what was measured on it, such as ``"accuracy"``.
        value: the outcome, given together with ``task`` and ``metric``.
        backbone: what the table calls the backbone where the hub has no name for it.

    Raises:
        ConfigError: for a metric without task or value, or a value that is no finite number.
    """

    base_model: str | None = None
    task: str | None = None
    metric: str | None = None
    value: float | None = None
    backbone: str | None = None

    def __post_init__(self) -> None:
        """Check that a result is a whole one."""
        if (self.metric is None) != (self.value is None) or (self.metric is not None and self.task is None):
            raise ConfigError(
                f"CardInfo: a result is task, metric and value together; got {self.task!r}, {self.metric!r} and "
                f"{self.value!r}"
            )
        number = isinstance(self.value, (int, float)) and not isinstance(self.value, bool)
        if self.value is not None and not (number and math.isfinite(self.value)):
            raise ConfigError(f"CardInfo: value must be a finite number, got {self.value!r}")


def is_ours(path: Path) -> bool:
    """Whether a card may be written: none is there, or one that :func:`model_card` made."""
    try:
        return MARK in path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return True
    except (OSError, UnicodeDecodeError):
        return False


@dataclass(frozen=True)
class Described:
    """What a card says of an adapted model by itself; it outlives the model's folding.

    Attributes:
        base: the backbone's name on the hub, as far as the model tells.
        method: what is trained.
        merging: which tokens merge, in words; None for none.
        weights: how many numbers the file holds.
        task_type: as the hub calls it.
    """

    base: str | None
    method: str
    merging: str | None
    weights: int
    task_type: str

    @classmethod
    def of(cls, model: nn.Module, weights: int) -> Described:
        """Describe a model from :func:`pyra.adapters.adapt`."""
        schedule = wrapped_schedule(model)
        merging = _merging(model, schedule) if schedule is not None and any(schedule) else None
        task_type = "image-classification" if is_image_model(model) else "text-generation"
        return cls(base_model(model), method_name(model), merging, weights, task_type)

    def card(self, info: CardInfo) -> str:
        """Return the card as Markdown with YAML front matter."""
        base = info.base_model or self.base
        rows = [
            ("backbone", base or info.backbone or "not recorded"),
            ("method", self.method),
            ("merging", self.merging or "none"),
            ("weights in the file", f"{self.weights:,}"),
        ]
        if info.task is not None:
            rows.append(("task", info.task))
        if info.metric is not None:
            rows.append((info.metric, f"{info.value:g}"))
        table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
        merges = self.merging is not None
        note = (
            "\nTokens merge only through `load_adapter`: stock peft reads the PEFT weights alone.\n" if merges else ""
        )
        front = _front_matter(base, self.method, merges, info, self.task_type)
        return _TEMPLATE.format(front=front, mark=MARK, table=table, note=note)


def model_card(model: nn.Module, weights: Mapping[str, Tensor], info: CardInfo) -> str:
    """Write the card of an adapted model as Markdown with YAML front matter.

    Args:
        model: from :func:`pyra.adapters.adapt`.
        weights: the tensors in the file.
        info: what the model does not know.
    """
    return Described.of(model, sum(tensor.numel() for tensor in weights.values())).card(info)


def base_model(model: nn.Module) -> str | None:
    """Return the backbone's name on the hub, as far as the model tells: never a path of this machine."""
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    source = getattr(plain, "pretrained_cfg", None) or {}
    hub, architecture, tag = source.get("hf_hub_id"), source.get("architecture"), source.get("tag")
    if hub:  # timm: an owner, to which the name is added, or a whole name
        if not hub.endswith("/"):
            return str(hub)
        return f"{hub}{architecture}{f'.{tag}' if tag else ''}" if architecture else None
    name = str(getattr(getattr(plain, "config", None), "_name_or_path", "") or "")
    return name if _HUB_ID.fullmatch(name) and not Path(name).exists() else None


def method_name(model: nn.Module) -> str:
    """Return the PEFT method as PEFT calls it, or what trains without one."""
    if not isinstance(model, PeftModel):
        return "none (head and re-activation weights alone)" if wrapped_config(model) else "none (head alone)"
    kind = model.peft_config[model.active_adapter].peft_type
    return str(getattr(kind, "value", kind))


def _merging(model: nn.Module, schedule: list[int] | None) -> str:
    config = wrapped_config(model)
    assert config is not None
    assert schedule is not None
    saved = 1 - macs(model) / macs(model, [0] * len(schedule))
    how = "re-activated" if config.reactivation else "plain"
    return f"{how}, {config.matching}; {saved:.1%} fewer MACs; tokens removed in each block: {schedule}"


def _front_matter(base: str | None, method: str, merges: bool, info: CardInfo, task_type: str) -> str:
    results = None
    if info.metric is not None and info.task is not None:
        results = [
            EvalResult(
                task_type=task_type,
                dataset_type=info.task,
                dataset_name=info.task,
                metric_type=info.metric,
                metric_value=info.value,
            )
        ]
    tags = ["pyra", *(["token-merging"] if merges else []), *([] if method.startswith("none") else [method.lower()])]
    data = ModelCardData(
        base_model=base if base and _HUB_ID.fullmatch(base) else None,
        library_name="peft",
        tags=tags,
        model_name="adapter" if results else None,
        eval_results=results,
    )
    return str(data.to_yaml()).strip()


def _cell(value: str) -> str:
    return " ".join(value.replace("|", r"\|").split())
