"""PEFT methods that leave their targets open, on latent attention (JoyAI), which PEFT has no choice for."""

from __future__ import annotations

import peft
import pytest
import torch
from expert_models import IDS, logits, make

from pyra.adapters import adapt
from pyra.adapters.methods import PEFT_METHODS, peft_config
from pyra.errors import ConfigError

OF_TEXT = sorted(set(PEFT_METHODS) - {"bottleneck", "adaptformer", "prompts", "prompts-shallow"})


@pytest.mark.parametrize("method", OF_TEXT)
def test_every_method_trains(method: str) -> None:
    plain = logits(make())
    model = adapt(make(), peft=peft_config(method, 8, 0.0, None))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = (logits(model.eval()) - plain).abs().max()
    assert trained and moved > 1e-4


def test_oft_leaves_out_what_peft_takes_for_an_image() -> None:
    model = adapt(make(), peft=peft.OFTConfig(oft_block_size=8))
    names = {name.rpartition(".")[2] for name, _ in model.named_modules() if hasattr(_, "oft_R")}
    assert "q_b_proj" in names and "kv_b_proj" not in names
    with pytest.raises(ConfigError, match="OFT of peft fails on kv_b_proj, whose input has four dimensions"):
        adapt(make(), peft=peft.OFTConfig(oft_block_size=8, target_modules=["kv_b_proj"]))
