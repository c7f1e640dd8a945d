"""What is exported: a copy of the model in float32 on the CPU, its PEFT layers folded, without gradients."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from pyra.errors import ExportError


def folded_copy(model: nn.Module) -> nn.Module:
    """Copy a model in evaluation mode with float32 weights, and fold PEFT layers into them.

    Args:
        model: left as it is. Its float32 tensors that need no change are copied once, nothing more.

    Raises:
        ExportError: for a PEFT method whose layers cannot be folded, such as prompts.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ExportError("the model has tensors on the meta device, which have no values: load its weights first")
    copied: Any = copy.deepcopy(model).float().cpu().eval()
    if hasattr(copied, "peft_config") and not hasattr(copied, "merge_and_unload"):
        raise ExportError(
            f"{type(copied).__name__} has no layers that fold into weights (prompts add tokens): fold or remove the "
            "adapter first, or train a method that folds, such as LoRA"
        )
    if hasattr(copied, "merge_and_unload"):
        try:
            copied = copied.merge_and_unload()
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ExportError(f"the adapter cannot be folded: {' '.join(str(error).split())[:200]}") from None
    folded: nn.Module = copied.requires_grad_(False)
    return folded
