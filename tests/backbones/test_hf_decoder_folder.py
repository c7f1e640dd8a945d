"""Decoders whose prompts merge, saved and opened as transformers does it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pyra import PyraConfig, set_rate, unwrap, wrap
from pyra.backbones import joyai
from pyra.errors import ConfigError

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_PLAIN = """
import sys
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert "pyra" not in sys.modules and not hasattr(model.model, "pyra_config"), sys.modules["pyra"]
print(type(model).__name__, sum(type(layer).__name__ == "LlamaDecoderLayer" for layer in model.model.layers))
"""


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


def joy() -> Any:
    torch.manual_seed(0)
    config = joyai.tiny_config(num_hidden_layers=6, vocab_size=97, eos_token_id=None)
    return joyai.JoyAIForCausalLM(config).eval()


def merging(model: Any, **options: Any) -> Any:
    wrap(model, PyraConfig(**(options or {"rate": 0.3, "size_bias": True})))
    for name, parameter in model.named_parameters():
        if name.endswith("channel_weight"):
            parameter.data.normal_()
    return model


@torch.no_grad()
def answer(model: Any) -> Tensor:
    tokens = torch.randint(2, 97, (1, 70), generator=torch.Generator().manual_seed(0))
    found = model.generate(tokens, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    return torch.stack(found.logits)


@pytest.mark.parametrize("make", [llama, joy])
def test_a_merging_model_comes_back_merging(make: Any, tmp_path: Path) -> None:
    model = merging(make())
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "pyra_prompts")  # a plain model may be made of it
    for kind in (AutoModelForCausalLM, type(model)):
        again, found = kind.from_pretrained(tmp_path, output_loading_info=True)
        assert type(again) is type(model) and not any(found.values())
        assert again.model.pyra_config == model.model.pyra_config and not hasattr(again.config, "pyra_prompts")
        assert torch.allclose(answer(again), answer(model), atol=1e-6)
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert torch.allclose(answer(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), answer(model), atol=1e-6)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16} and answer(half).isfinite().all()


def test_a_model_of_another_rate_comes_back_with_it_and_with_the_weights_it_has(tmp_path: Path) -> None:
    for rate in (0.5, 0):
        model = merging(llama())
        with pytest.warns(UserWarning, match="outside"):
            set_rate(model, rate)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert again.model.pyra_schedule == model.model.pyra_schedule
        if rate:
            assert list(again.state_dict()) == list(model.state_dict())
            assert torch.allclose(answer(again), answer(model), atol=1e-6)


def test_the_plain_model_is_in_the_folder_too(tmp_path: Path) -> None:
    merging(llama()).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    del config.pyra_prompts
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert torch.allclose(answer(plain), answer(llama()), atol=1e-6)
    done = subprocess.run([sys.executable, "-c", _PLAIN, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["LlamaForCausalLM", "6"], done.stderr


def test_an_unwrapped_model_is_saved_plainly_and_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    model = merging(llama())
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["pyra_prompts"]["version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"config.json, pyra_prompts: .*newer than this library"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    unwrap(model).save_pretrained(tmp_path)
    assert "pyra_prompts" not in json.loads((tmp_path / "config.json").read_text())
