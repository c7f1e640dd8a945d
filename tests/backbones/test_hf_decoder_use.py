"""Decoders whose prompts merge, used as trainers, other models and libraries use them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from pyra import PyraConfig, macs, unwrap, wrap
from pyra.errors import ConfigError, ScheduleError

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
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
KEEP = PyraConfig(keep={1: 0.6, 3: 0.4}, size_bias=[2, 4])
PROMPT = 70


def llama(layers: int = 6) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": layers})).eval()


def ids(count: int = PROMPT, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (1, count), generator=torch.Generator().manual_seed(seed))


def test_a_merging_model_drafts_for_another() -> None:
    large, drafts = llama(3), wrap(llama(), KEEP)
    for candidates in (1, 5):
        drafts.generation_config.num_assistant_tokens = candidates
        for count in (PROMPT, 18):
            expected = large.generate(ids(count), max_new_tokens=10, do_sample=False)
            found = large.generate(ids(count), max_new_tokens=10, do_sample=False, assistant_model=drafts)
            assert torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["importance", "bipartite"])
def test_the_end_of_a_prompt_can_be_read_again(rule: str) -> None:
    model = wrap(llama(), PyraConfig(keep={1: 0.6, 3: 0.4}, size_bias=True, rule=rule))
    rows = [ids(count, seed=count) for count in (PROMPT, 41)]
    tokens = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in rows])
    read = model(tokens, attention_mask=(tokens > 0).long(), use_cache=True, logits_to_keep=1)
    read.past_key_values.crop(-15)
    again = model(tokens[:, -15:], attention_mask=(tokens > 0).long(), past_key_values=read.past_key_values)
    assert torch.allclose(again.logits[:, -1], read.logits[:, -1], atol=1e-6)
    with pytest.raises(ConfigError, match="reach into the prompt"):
        read.past_key_values.crop(-16)  # the token before is one that others have folded into


def test_generation_that_cannot_merge_is_refused_before_it_begins() -> None:
    model = wrap(llama(), KEEP)
    with pytest.raises(ConfigError, match="use_cache=False"):
        model.generate(ids(), GenerationConfig(use_cache=False, max_new_tokens=2))
    with pytest.raises(ConfigError, match="assistant_early_exit=3"):
        model.generate(ids(), max_new_tokens=2, assistant_early_exit=3)
    with pytest.raises(ConfigError, match="continuous batching"):
        model.generate_batch([ids()[0].tolist()], GenerationConfig(max_new_tokens=2, eos_token_id=-1, pad_token_id=0))
    assert model.generate(ids(), max_new_tokens=2).shape == (1, PROMPT + 2)
    unwrap(model)
    assert not {"generate", "init_continuous_batching", "save_pretrained"} & vars(model).keys()


def test_labels_that_a_trainer_keeps_are_spoken_of() -> None:
    with pytest.raises(ConfigError, match="label smoothing and compute_loss_func"):
        wrap(llama(), KEEP)(ids(), attention_mask=torch.ones_like(ids()))


def test_losses_of_routers_are_refused() -> None:
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS, num_experts=4, head_dim=8))
    tokens = ids(80)
    labels = tokens.masked_fill(torch.arange(80) < PROMPT, -100)
    assert wrap(model, KEEP)(tokens, labels=labels).loss.isfinite()
    with pytest.raises(ConfigError, match="output_router_logits"):
        model(tokens, labels=labels, output_router_logits=True)
    model.config.output_router_logits = True
    with pytest.raises(ConfigError, match="output_router_logits"):
        model(tokens, labels=labels)


@torch.no_grad()
def test_rotations_may_be_complex_numbers() -> None:
    torch.manual_seed(0)
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    routed = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    sizes = {**SMALL, **EXPERTS, **latent, **routed, "num_key_value_heads": 4}
    model: Any = wrap(DeepseekV2ForCausalLM(DeepseekV2Config(**sizes)).eval(), KEEP)
    found = model.generate(ids(), max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    mask = (torch.arange(PROMPT + 4) < PROMPT)[None]
    whole = model(found.sequences, prompt_mask=mask).logits[:, PROMPT - 1 : -1]
    assert torch.allclose(torch.stack(found.logits, 1), whole, atol=1e-6)


def test_data_parallel_training_goes_on_past_prompts_that_are_too_short(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = torch.nn.parallel.DistributedDataParallel(wrap(llama(), KEEP).train())
        for prompt in (PROMPT, 12, PROMPT):
            tokens = ids(80)
            labels = tokens.masked_fill(torch.arange(80) < prompt, -100)
            model.zero_grad()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of prompts that are too short
                model(tokens, labels=labels).loss.backward()
            gates = [value.grad for name, value in model.named_parameters() if "channel_weight" in name]
            assert len(gates) == 2 and all(bool(gate.any()) == (prompt > 17) for gate in gates)
    finally:
        dist.destroy_process_group()


def test_pairs_reach_a_rate_without_the_last_layer() -> None:
    model = llama()
    plain = macs(model)
    for rate in (0.2, 0.4):
        schedule = wrap(model, PyraConfig(rate=rate, rule="bipartite")).model.pyra_schedule
        assert not schedule[-1] and 1 - macs(model) / plain >= rate
    with pytest.raises(ScheduleError, match=r"cannot save 0\.770"):
        wrap(model, PyraConfig(rate=0.77, rule="bipartite"))
    with pytest.raises(ScheduleError, match=r"asked for 0\.950$"):
        wrap(model, PyraConfig(rate=0.95))


def test_layers_of_the_size_bias_are_layers_of_the_model() -> None:
    with pytest.raises(ConfigError, match="size_bias names layer 6: the model has layers 0 to 5"):
        wrap(llama(), PyraConfig(rate=0.3, size_bias=[3, 6]))
    config = PyraConfig(rate=0.3, size_bias=(3, 4))  # type: ignore[arg-type]
    assert PyraConfig.from_dict(config.to_dict()) == config == PyraConfig(rate=0.3, size_bias=[3, 4])
