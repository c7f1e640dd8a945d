"""The ``PeftModel`` of a backbone that merges: it saves what merges, and its adapters bring their rates.

``save_pretrained``, and with it ``push_to_hub`` and the checkpoints of ``transformers.Trainer``, would else leave
``pyra_config.json`` out.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from peft import PeftModel

from pyra.adapters.folder import PICKLED, PYRA_FILE, WEIGHTS, merging_record
from pyra.backbones import wrapped_config
from pyra.files import write_json


class SavesMerging:
    """Mixed into the class of a ``PeftModel``; the instance stays one, under its class's name."""

    base: Any

    def save_pretrained(
        self,
        save_directory: str,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write what PEFT writes, and ``pyra_config.json`` beside each adapter whose tokens merge."""
        from pyra.adapters.several import merging_of, settle  # which imports this module

        model: Any = self
        settle(model)
        self.base.save_pretrained(
            model,
            save_directory,
            safe_serialization=safe_serialization,
            selected_adapters=selected_adapters,
            save_embedding_layers=save_embedding_layers,
            is_main_process=is_main_process,
            **kwargs,
        )
        if not is_main_process:
            return
        for name in model.peft_config if selected_adapters is None else selected_adapters:
            folder = Path(save_directory) / ("" if name == "default" else name)
            (folder / (PICKLED if safe_serialization else WEIGHTS)).unlink(missing_ok=True)  # of an earlier saving
            config, schedule = merging_of(model, name)
            file = folder / PYRA_FILE
            if config is None:
                file.unlink(missing_ok=True)
            else:
                write_json(file, merging_record(config, schedule))

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Make an adapter the active one, with its rate."""
        from pyra.adapters.several import apply_rate, note_rate  # which imports this module

        model: Any = self
        note_rate(model)
        self.base.set_adapter(model, adapter_name, inference_mode=inference_mode)
        apply_rate(model, adapter_name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that this one is made of."""
        return _blank, (self.base,), self.__dict__


def saving_merging(model: PeftModel) -> None:
    """Have a ``PeftModel`` that merges save what does, from now on."""
    if not isinstance(model, SavesMerging) and wrapped_config(model) is not None:
        kind: Any = type(model)
        model.__class__ = _with_merging(kind)


@functools.cache
def _with_merging(base: Any) -> Any:
    return type(base.__name__, (SavesMerging, base), {"__module__": __name__, "__doc__": base.__doc__, "base": base})


def _blank(base: Any) -> Any:
    cls = _with_merging(base)
    return cls.__new__(cls)
