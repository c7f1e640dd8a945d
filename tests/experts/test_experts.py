"""Experts scored on text, cut away, and written as a checkpoint that transformers opens without pyra."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import load_model, save_checkpoint
from pyra.errors import ConfigError, DataError, UnsupportedModelError
from pyra.experts import (
    ExpertScores,
    choose_experts,
    choose_task_experts,
    only_experts,
    prune_experts,
    score_experts,
    set_active_experts,
)
from pyra.experts.balancing import BalancedExperts
from pyra.experts.layers import expert_layers


def make(**changes: Any) -> joyai.JoyAIForCausalLM:
    torch.manual_seed(0)
    model = joyai.JoyAIForCausalLM(joyai.tiny_config(**changes)).eval()
    for name, value in model.state_dict().items():
        if not name.endswith("norm.weight"):
            nn.init.normal_(value, std=0.2)
    return model


@pytest.fixture
def model() -> joyai.JoyAIForCausalLM:
    return make()


def tokens(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randint(2, 512, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def reference(model: nn.Module, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and saliency by the definition, in float64, from what enters the mixtures."""
    layers = expert_layers(model)
    entered: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda _, given, name=name: entered.update({name: given[0]}))
        for name, layer in layers.items()
    ]
    model(ids, attention_mask=mask)
    for hook in hooks:
        hook.remove()
    counts, saliency = [], []
    for name, layer in layers.items():
        x = entered[name][mask.bool()]
        _, gates, chosen = layer.gate(x)
        x = x.double()
        one = []
        for expert in range(layer.experts.num_experts):
            gate, up = (x @ layer.experts.gate_up_proj[expert].double().T).chunk(2, -1)
            norm = ((nn.functional.silu(gate) * up) @ layer.experts.down_proj[expert].double().T).norm(dim=-1)
            share = (gates.double() * (chosen == expert)).sum(-1)
            routed = (chosen == expert).any(-1)
            one.append((int(routed.sum()), float((share * norm)[routed].mean()) if routed.any() else 0.0))
        counts.append([count for count, _ in one])
        saliency.append([value for _, value in one])
    return torch.tensor(counts), torch.tensor(saliency, dtype=torch.float64)


def test_scores_are_those_of_the_definition(model: joyai.JoyAIForCausalLM) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    found = score_experts(model, [{"input_ids": tokens(), "attention_mask": mask}])
    with torch.no_grad():
        counts, saliency = reference(model, tokens(), mask)
    assert found.layers == tuple(f"model.layers.{i}.mlp" for i in (1, 2, 3))
    assert torch.equal(found.tokens, counts) and found.tokens.sum() == 3 * 19 * 2
    assert torch.allclose(found.saliency, saliency, rtol=1e-4)


def test_batches_add_up_and_the_model_is_left_as_it_was(model: joyai.JoyAIForCausalLM) -> None:
    before = logits(model, tokens())
    model.train()
    two = score_experts(model, ({"input_ids": tokens(seed=seed)} for seed in (1, 2)))
    assert model.training
    one = [score_experts(model, [{"input_ids": tokens(seed=seed)}]) for seed in (1, 2)]
    assert torch.equal(two.tokens, one[0].tokens + one[1].tokens)
    sums = [scores.saliency * scores.tokens for scores in one]
    assert torch.allclose(two.saliency * two.tokens, sums[0] + sums[1])
    assert torch.equal(logits(model.eval(), tokens()), before)
    assert not any(layer.experts._forward_pre_hooks for layer in expert_layers(model).values())


def scores(*rows: list[float]) -> ExpertScores:
    saliency = torch.tensor(rows, dtype=torch.float64)
    return ExpertScores(tuple(map(str, range(len(rows)))), saliency.flip(1).long(), saliency)


def test_the_best_are_chosen_in_order() -> None:
    measured = scores([1, 9, 3, 9], [4, 0, 0, 0])
    assert choose_experts(measured, 2).tolist() == [[1, 3], [0, 1]]  # of equals the first
    assert choose_experts(measured, 2, "frequency").tolist() == [[0, 2], [0, 3]]
    assert choose_experts(measured, 4).tolist() == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_a_number_to_keep_that_is_none(keep: int) -> None:
    with pytest.raises(ConfigError, match="keep must be a number of experts from 1 to 4"):
        choose_experts(scores([1, 2, 3, 4]), keep)
    with pytest.raises(ValueError, match="method must be one of reap, frequency"):
        choose_experts(scores([1, 2, 3, 4]), 2, "random")


def test_groups_keep_as_many_each() -> None:
    measured = scores([9, 8, 7, 1, 2, 3])
    assert choose_experts(measured, 2).tolist() == [[0, 1]]
    assert choose_experts(measured, 2, groups=2).tolist() == [[0, 5]]
    assert choose_experts(measured, 4, groups=2).tolist() == [[0, 1, 4, 5]]
    for keep, groups in ((3, 2), (4, 4), (2, 0)):
        with pytest.raises(ConfigError, match=f"{groups} groups do not divide {keep} of 6 experts"):
            choose_experts(measured, keep, groups=groups)


@pytest.mark.parametrize("changes", [{}, {"n_group": 2, "topk_group": 1}])
def test_closed_experts_are_as_if_they_were_gone(changes: dict[str, int]) -> None:
    model, kept = make(**changes), [[0, 2, 5, 6], [1, 3, 4, 7], [0, 1, 6, 7]]
    before = logits(model, tokens())
    with only_experts(model, kept):
        closed = logits(model, tokens())
    with only_experts(model, kept, active=1):
        fewer = logits(model, tokens())
    assert torch.equal(logits(model, tokens()), before) and model.config.num_experts_per_tok == 2
    prune_experts(model, kept)
    assert torch.allclose(closed, logits(model, tokens()), rtol=0, atol=1e-5) and not torch.allclose(closed, before)
    assert torch.allclose(fewer, logits(set_active_experts(model, 1), tokens()), rtol=0, atol=1e-5)
    assert not torch.allclose(fewer, closed)


def test_a_model_is_left_as_it_was_where_experts_cannot_be_closed(model: joyai.JoyAIForCausalLM) -> None:
    before = logits(model, tokens())
    for kept, active, said in (
        ([[0]] * 3, None, "1 experts stay"),
        (None, 9, "1 to 8 experts"),
        ([[8, 1]] * 3, 1, "of 8"),
    ):
        with pytest.raises(ConfigError, match=said), only_experts(model, kept, active):
            pass
    with pytest.raises(ZeroDivisionError), only_experts(model, [[0, 1]] * 3, 1):
        raise ZeroDivisionError
    assert torch.equal(logits(model, tokens()), before) and model.config.num_experts_per_tok == 2


def test_busy_experts_are_chosen_less(model: joyai.JoyAIForCausalLM) -> None:
    layers = list(expert_layers(model).values())
    biases = [layer.gate.e_score_correction_bias.clone() for layer in layers]
    busy = score_experts(model, [{"input_ids": tokens()}]).tokens
    with BalancedExperts(model) as balanced:
        model(tokens())
        balanced.step()
        for layer, bias, count in zip(layers, biases, busy, strict=True):
            moved = layer.gate.e_score_correction_bias - bias
            assert torch.allclose(moved, 0.001 * (count.double().mean() - count).sign().float(), atol=1e-6)
        assert not torch.stack(balanced.counts).any()
    model(tokens())
    assert not torch.stack(balanced.counts).any()  # no hook is left


def test_experts_that_no_token_needs_change_nothing(model: joyai.JoyAIForCausalLM) -> None:
    """Their gates are made so low that no token is sent to them."""
    kept = [[0, 2, 3, 5, 6], [1, 2, 4, 6, 7], [0, 1, 2, 3, 4]]
    for index, layer in zip(kept, expert_layers(model).values(), strict=True):
        layer.gate.e_score_correction_bias[[i for i in range(8) if i not in index]] = -10
    before = logits(model, tokens())
    pruned = prune_experts(model, kept)
    assert pruned is model and model.config.n_routed_experts == 5
    assert [tuple(layer.experts.gate_up_proj.shape) for layer in expert_layers(model).values()] == [(5, 64, 64)] * 3
    assert torch.allclose(logits(model, tokens()), before, rtol=0, atol=1e-5)


def test_gates_of_those_left_are_shares_of_their_own_sum(model: joyai.JoyAIForCausalLM) -> None:
    prune_experts(model, [[0, 1, 2]] * 3)
    layer = next(iter(expert_layers(model).values()))
    _, gates, chosen = layer.gate(torch.randn(20, 64))
    assert torch.allclose(gates.sum(-1), torch.full((20,), 2.5)) and chosen.max() <= 2


def test_a_pruned_checkpoint_opens_without_pyra_with_equal_logits(
    model: joyai.JoyAIForCausalLM, tmp_path: Path
) -> None:
    measured = score_experts(model, [{"input_ids": tokens()}])
    prune_experts(model, choose_experts(measured, 4))
    save_checkpoint(model, tmp_path / "pruned", model_type="deepseek_v3")
    torch.save({"ids": tokens(), "logits": logits(model, tokens())}, tmp_path / "expected.pt")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM
assert not any(name.partition(".")[0] == "pyra" for name in sys.modules)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
expected = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    same = torch.equal(model(expected["ids"]).logits, expected["logits"])
print(type(model).__name__, model.config.n_routed_experts, same)
"""
    given = [str(tmp_path / "pruned"), str(tmp_path / "expected.pt")]
    done = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True, cwd="/")
    assert done.stdout.split() == ["DeepseekV3ForCausalLM", "4", "True"], done.stderr
    names = load_file(tmp_path / "pruned" / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names and "experts.4." not in " ".join(names)
    assert torch.equal(logits(load_model(tmp_path / "pruned").eval(), tokens()), logits(model, tokens()))
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["model_type"] == "deepseek_v3"
    with pytest.raises(ConfigError, match="model_type must be one of joyai_llm_flash, deepseek_v3, got 'llama'"):
        save_checkpoint(model, tmp_path / "other", model_type="llama")


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ([[0, 1, 2]] * 2, r"kept must be whole numbers \[3, K\]"),
        ([[]] * 3, r"kept must be whole numbers \[3, K\]"),
        ([[0.5, 1.5]] * 3, r"kept must be whole numbers \[3, K\]"),
        ([[0, 1, 8]] * 3, "kept names expert 8, of 8"),
        ([[-1, 1, 2]] * 3, "kept names expert -1, of 8"),
        ([[0, 1, 1]] * 3, "kept names an expert twice in a layer"),
        ([[0]] * 3, "1 experts stay, and a token is sent to 2: lower that first"),
    ],
)
def test_experts_that_cannot_stay(kept: list[list[float]], said: str, model: joyai.JoyAIForCausalLM) -> None:
    before = logits(model, tokens())
    with pytest.raises(ConfigError, match=said):
        prune_experts(model, torch.tensor(kept))
    assert torch.equal(logits(model, tokens()), before) and model.config.n_routed_experts == 8


def test_groups_of_the_router_limit_the_number() -> None:
    model = make(n_group=2, topk_group=1)
    with pytest.raises(ConfigError, match="5 experts do not make the router's 2 groups"):
        prune_experts(model, [[0, 1, 2, 3, 4]] * 3)
    prune_experts(model, [[0, 1, 4, 5]] * 3)
    assert logits(model, tokens()).isfinite().all()


def test_fewer_active_experts() -> None:
    model = make()
    set_active_experts(model, 1)
    fresh = make(num_experts_per_tok=1)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(model, tokens()), logits(fresh, tokens()))
    assert model.config.num_experts_per_tok == 1
    for number in (0, 9):
        with pytest.raises(ConfigError, match=f"a token can be sent to 1 to 8 experts, got {number}"):
            set_active_experts(model, number)


def test_other_mixtures_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(
        **sizes, head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, vocab_size=512
    )
    model = Qwen3MoeForCausalLM(config).eval()
    measured = score_experts(model, [{"input_ids": tokens()}])
    assert measured.tokens.sum(1).tolist() == [48, 48]
    prune_experts(model, choose_experts(measured, 4, "frequency"))
    assert model.config.num_experts == 4
    again = Qwen3MoeForCausalLM(model.config).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again, tokens()), logits(model, tokens()))


def test_what_cannot_be_scored(model: joyai.JoyAIForCausalLM) -> None:
    with pytest.raises(UnsupportedModelError, match="Linear has no layer with stacked experts"):
        score_experts(nn.Linear(2, 2), [])
    with pytest.raises(DataError, match="has no tokens"):
        score_experts(model, [])
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(float("inf"))
    with pytest.raises(DataError, match="not finite"):
        score_experts(model, [{"input_ids": tokens()}])


def test_gates_are_summed(model: joyai.JoyAIForCausalLM) -> None:
    found = score_experts(model, [{"input_ids": tokens()}])
    assert found.gates is not None
    assert torch.allclose(
        found.gates.sum(1), torch.full((3,), 2.5 * 24, dtype=torch.float64)
    )  # each token's add to 2.5
    assert torch.equal(found.gates > 0, found.tokens > 0)


GIVEN = ExpertScores(
    ("a", "b"),
    tokens=torch.tensor([[1, 2, 3, 4], [10, 0, 0, 0]]),
    saliency=torch.zeros(2, 4),
    gates=torch.tensor([[5.0, 2.0, 2.0, 1.0], [0.0, 1.0, 1.0, 0.0]]),
)


@pytest.mark.parametrize(
    ("share", "by", "expected"),
    [
        (0.1, "gate", {"a": [0], "b": [1]}),
        (0.5, "gate", {"a": [0], "b": [1]}),  # exactly what the first holds
        (0.51, "gate", {"a": [0, 1], "b": [1, 2]}),  # of equals the first
        (1.0, "gate", {"a": [0, 1, 2, 3], "b": [1, 2]}),  # none that was given nothing
        (0.4, "token", {"a": [3], "b": [0]}),
        (0.7, "token", {"a": [2, 3], "b": [0]}),
        (None, "gate", {"a": [0], "b": [1]}),
        (None, "token", {"a": [3], "b": [0]}),
    ],
)
def test_the_smallest_sets_that_hold_a_share(share: float | None, by: str, expected: dict[str, list[int]]) -> None:
    assert choose_task_experts(GIVEN, share, by) == expected


def test_shares_that_are_none() -> None:
    for share in (0, -0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="share must be above 0 and at most 1"):
            choose_task_experts(GIVEN, share)
    with pytest.raises(ConfigError, match=r"by must be one of gate, token, got 'tokens' .*did you mean 'token'"):
        choose_task_experts(GIVEN, 0.1, "tokens")
    with pytest.raises(ConfigError, match="hold no gates"):
        choose_task_experts(scores([1, 2]), 0.1)


@pytest.mark.parametrize(("batch", "said"), [(torch.ones(1, 4, dtype=torch.long), "Tensor"), ({"x": 1}, r"\['x'\]")])
def test_what_is_no_batch_is_told(batch: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=f"batches with input_ids and attention_mask, got {said}"):
        score_experts(joyai.JoyAIForCausalLM(joyai.tiny_config()), [batch])
