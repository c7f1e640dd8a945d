"""The configuration of an exported model of transformers, which ``AutoConfig`` knows once this module is imported."""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig


class MergedConfig(PreTrainedConfig):
    """Configuration of an exported model.

    Args:
        backbone: configuration of the model whose tokens merge.
        pyra: what merges in it; None where nothing does.
        kwargs: of every configuration, such as ``id2label``.
    """

    model_type = "pyra"

    def __init__(
        self, backbone: dict[str, Any] | None = None, pyra: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.backbone, self.pyra = backbone or {}, pyra


AutoConfig.register(MergedConfig.model_type, MergedConfig, exist_ok=True)
