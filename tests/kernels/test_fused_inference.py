"""With the adapter folded and gradients off, a merging model adds this package's operations to the plain model's."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from backbone_families import FAMILIES, SCHEDULE, build, config, run
from peft import LoraConfig
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyra.adapters import adapt, fold_adapter
from pyra.kernels.choice import interpreted

pytestmark = pytest.mark.skipif(
    not (interpreted() or torch.cuda.is_available()), reason="needs a GPU, or TRITON_INTERPRET=1 (make test-kernels)"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The last layer gives every original token its row back: an index and a look-up.
SPREADING = Counter({"aten.arange": 1, "aten.mul": 1, "aten.add": 1, "aten.embedding": 1})
VIEWS = {"detach", "transpose", "view", "unsqueeze", "alias", "slice", "expand", "_unsafe_view", "permute", "select"}
TARGETS = {"timm-vit": "qkv", "hf-dinov2": "q_proj", "timm-eva-perception": "qkv"}


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher, but for views, which compute nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        # On a GPU a mask brings another kernel of attention, and is padded for it.
        if name.removesuffix("_copy") not in VIEWS and "attention" not in name and name != "constant_pad_nd":
            self.seen[f"{namespace}.{name}"] += 1
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, family: str) -> Counter[str]:
    inputs = {name: value.to(DEVICE) for name, value in FAMILIES[family].inputs().items()}
    with torch.no_grad():
        run(model, inputs)
        with Operations() as counted:
            run(model, inputs)
    return counted.seen


@pytest.mark.parametrize("family", ["timm-vit", "hf-dinov2"])
def test_nothing_else_is_added(family: str) -> None:
    plain = build(family).to(DEVICE)
    with_peft = adapt(
        copy.deepcopy(plain), pyra=config(backend="triton"), peft=LoraConfig(target_modules=[TARGETS[family]])
    )
    adapted = operations(with_peft.eval(), family)
    merging = fold_adapter(with_peft).eval()
    before, after = operations(plain, family), operations(merging, family)
    merges = sum(map(bool, SCHEDULE))
    own = Counter(dict.fromkeys(("pyra.match_tokens", "pyra.merge_tokens", "pyra.follow_tokens"), merges))
    own["pyra.size_bias"] = merges - 1  # the layers after the first that merges
    assert after - before == own + SPREADING
    assert before - after == Counter()
    assert adapted.total() > after.total()
