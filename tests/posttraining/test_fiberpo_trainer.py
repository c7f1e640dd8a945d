"""FiberPO in trl's trainer: its loss beside GRPO's, what it logs, and that rollouts and loss read prompts alike."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_language import decoder, mixture, tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

from pyra import PyraConfig
from pyra.adapters import adapt
from pyra.adapters.methods import peft_config
from pyra.backbones import wrap
from pyra.backbones.joyai_checkpoint import load_model
from pyra.errors import ConfigError
from pyra.tasks.posttraining import FiberLevel, FiberPOConfig, FiberPOTrainer, fiberpo_log_gate
from pyra.tasks.posttraining.fiberpo_trainer import trajectory_mean

SHARED = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "activation_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "max_completion_length": 6,
    "num_generations": 4,
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
}
PROMPTS = Dataset.from_dict({"prompt": [f"Question: Tom has {count} apples . Answer:" for count in range(8)]})


@pytest.fixture(autouse=True)
def nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GRPOTrainer, "_send_telemetry", lambda self: None, raising=False)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return tokenizer(pad=True)


def varied(completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def trainer_of(
    kind: type[GRPOTrainer],
    model: nn.Module,
    words: PreTrainedTokenizerFast,
    folder: Path,
    prompts: Dataset = PROMPTS,
    **options: Any,
) -> Any:
    config = FiberPOConfig if issubclass(kind, FiberPOTrainer) else GRPOConfig
    options = {"loss_type": "grpo", **SHARED, **options}
    return kind(
        model=model,
        reward_funcs=[varied],
        args=config(output_dir=str(folder), **options),
        train_dataset=prompts,
        processing_class=words,
    )


def rollouts(seed: int = 0, old: Tensor | None = None) -> dict[str, Any]:
    """Four answers to two prompts of other lengths; the last answer has no token that counts."""
    generator = torch.Generator().manual_seed(seed)
    prompt_ids = torch.randint(3, 400, (4, 5), generator=generator)
    prompt_mask = torch.tensor([[1] * 5, [1] * 5, [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]])
    completion_ids = torch.randint(3, 400, (4, 7), generator=generator)
    completion_mask = (torch.arange(7) < torch.tensor([7, 3, 1, 0])[:, None]).long()
    found = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.5, 0.7, -2.0]),
        "num_items_in_batch": completion_mask.sum(),
    }
    return found if old is None else {**found, "old_per_token_logps": old}


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    gradients = {name: one.grad for name, one in trainer.model.named_parameters() if one.grad is not None}
    return float(loss.detach()), {name: one.clone() for name, one in gradients.items()}


@pytest.fixture(params=["llama", "joyai"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> nn.Module:
    if request.param == "llama":
        return decoder(positions=64)
    return load_model(str(mixture(tmp_path / "backbone", num_hidden_layers=2)))


@torch.no_grad()
def logps_of(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    found: Tensor = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 7)[0]
    return found


def test_on_policy_the_gradient_is_grpos(model: nn.Module, words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    inputs = rollouts()
    ours = loss_and_gradients(trainer_of(FiberPOTrainer, copy.deepcopy(model), words, tmp_path), inputs)
    theirs = loss_and_gradients(trainer_of(GRPOTrainer, copy.deepcopy(model), words, tmp_path), inputs)
    assert ours[0] == pytest.approx(theirs[0], abs=1e-6)
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) > 10
    for name, gradient in ours[1].items():
        torch.testing.assert_close(gradient, theirs[1][name], rtol=1e-4, atol=1e-6)
    assert max(float(gradient.abs().max()) for gradient in ours[1].values()) > 1e-3


@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0])
def test_off_policy_the_loss_is_the_formula(
    model: nn.Module, words: PreTrainedTokenizerFast, tmp_path: Path, scale: float
) -> None:
    other = trainer_of(GRPOTrainer, copy.deepcopy(model), words, tmp_path)
    trainer = trainer_of(FiberPOTrainer, model, words, tmp_path)
    inputs = rollouts()
    generator = torch.Generator().manual_seed(1)
    moved = scale * torch.randn(4, 7, generator=generator)
    inputs["old_per_token_logps"] = logps_of(trainer, inputs) - moved
    mask = inputs["completion_mask"]
    gate = fiberpo_log_gate(moved.double(), mask, c_plus=0.15, c_minus=0.1, eps=0.05).exp() * mask
    by_trajectory = (gate * inputs["advantages"][:, None]).sum(1) / mask.sum(1).clamp(min=1)
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert loss == pytest.approx(-float(by_trajectory.mean()), abs=1e-5)
    theirs, _ = loss_and_gradients(other, inputs)
    saturates = scale > 0.05  # below, both are the ratio
    assert (abs(loss - theirs) > 1e-4) == saturates
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_tokens_of_tools_and_rows_without_any_do_not_count(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    trainer = trainer_of(FiberPOTrainer, decoder(), words, tmp_path)
    inputs = rollouts()
    inputs["old_per_token_logps"] = logps_of(trainer, inputs) - torch.linspace(-0.1, 0.1, 7)
    alone = loss_and_gradients(trainer, inputs)
    tools = {**inputs, "tool_mask": torch.ones(4, 7, dtype=torch.long)}
    tools["tool_mask"][0, 2:] = 0
    shorter = {**inputs, "completion_mask": inputs["completion_mask"] * tools["tool_mask"]}
    assert loss_and_gradients(trainer, tools)[0] == pytest.approx(loss_and_gradients(trainer, shorter)[0], abs=1e-6)
    assert loss_and_gradients(trainer, tools)[0] != pytest.approx(alone[0], abs=1e-4)
    nothing = {**inputs, "completion_mask": torch.zeros(4, 7, dtype=torch.long)}
    loss, gradients = loss_and_gradients(trainer, nothing)
    assert loss == 0 and all(gradient.isfinite().all() for gradient in gradients.values())


def test_the_divergence_from_a_reference_is_grpos(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapt(decoder(), peft=peft_config("lora", 4, 0.0, ["q_proj", "v_proj"]))
    ours = trainer_of(FiberPOTrainer, copy.deepcopy(model), words, tmp_path, beta=0.5)
    theirs = trainer_of(GRPOTrainer, copy.deepcopy(model), words, tmp_path, beta=0.5)
    inputs = rollouts()
    inputs["ref_per_token_logps"] = logps_of(ours, inputs) - 0.4 * torch.rand(4, 7)
    found, gradients = loss_and_gradients(ours, inputs)
    expected, others = loss_and_gradients(theirs, inputs)
    assert found == pytest.approx(expected, abs=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, others[name], rtol=1e-4, atol=1e-6)
    assert ours._metrics["train"]["kl"][0] == pytest.approx(theirs._metrics["train"]["kl"][0], abs=1e-6) != 0


GROUPS: dict[str, Any] = {"group_c_plus": 0.08, "group_c_minus": 0.06, "group_eps": 0.03}


def moved_rollouts(trainer: Any) -> tuple[dict[str, Any], Tensor]:
    """Two prompts with two answers each, of which one pair drifts as a whole; and what their tokens have moved by."""
    inputs = rollouts()
    inputs["prompt_ids"][1], inputs["prompt_ids"][3, 2:] = inputs["prompt_ids"][0], inputs["prompt_ids"][2, 2:]
    inputs["completion_mask"][3, :2] = 1
    moved = torch.tensor([0.08, 0.1, -0.02, 0.01])[:, None] + 0.01 * torch.linspace(-1, 1, 7)
    inputs["old_per_token_logps"] = logps_of(trainer, inputs) - moved
    return inputs, moved


def by_hand(trainer: Any, inputs: dict[str, Any], levels: list[FiberLevel]) -> Tensor:
    """The loss in the trainer's own precision."""
    mask = inputs["completion_mask"]
    log_ratio = logps_of(trainer, inputs) - inputs["old_per_token_logps"]
    gate = fiberpo_log_gate(log_ratio, mask, c_plus=0.15, c_minus=0.1, eps=0.05, levels=levels).exp()
    return trajectory_mean(-gate * inputs["advantages"][:, None], mask).mean()


def test_without_the_level_of_prompts_the_loss_is_that_of_two_levels_to_the_bit(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = trainer_of(FiberPOTrainer, decoder(), words, tmp_path)
    inputs, _ = moved_rollouts(trainer)
    assert loss_and_gradients(trainer, inputs)[0] == float(by_hand(trainer, inputs, []))
    logged = trainer._metrics["train"]
    assert "fiberpo/trajectories/passing" in logged and not any("groups" in name for name in logged)
    assert "fiberpo/trajectories/clipped" not in logged


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
def test_the_level_of_prompts_is_the_gates(words: PreTrainedTokenizerFast, tmp_path: Path, order: list[int]) -> None:
    trainer = trainer_of(FiberPOTrainer, decoder(), words, tmp_path, **GROUPS)
    inputs, moved = moved_rollouts(trainer)
    inputs = {name: value[order] if value.ndim else value for name, value in inputs.items()}
    members = torch.tensor([4, 4, 1, 1])[order]
    loss, gradients = loss_and_gradients(trainer, inputs)
    assert loss == float(by_hand(trainer, inputs, [FiberLevel(members, 0.08, 0.06, 0.03)]))
    precise = fiberpo_log_gate(
        moved[order].double(), inputs["completion_mask"], c_plus=0.15, c_minus=0.1, eps=0.05,
        levels=[FiberLevel(members, 0.08, 0.06, 0.03)],
    ).exp()  # fmt: skip
    losses = trajectory_mean(-precise * inputs["advantages"][:, None], inputs["completion_mask"])
    assert loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert abs(loss - float(by_hand(trainer, inputs, []))) > 1e-3
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    shares = [logged[f"fiberpo/groups/{name}"] for name in ("passing", "rolling_back", "zeroed")]
    assert shares == [0.5, 0.5, 0]
    assert logged["fiberpo/trajectories/passing"] == 1 and logged["fiberpo/trajectories/clipped"] == 0


def test_only_those_answers_of_a_group_count_that_are_in_the_batch(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    trainer = trainer_of(FiberPOTrainer, decoder(), words, tmp_path, **GROUPS)
    inputs, _ = moved_rollouts(trainer)
    part = {name: value[[1, 2]] if value.ndim else value for name, value in inputs.items()}
    levels = [FiberLevel(torch.tensor([0, 1]), 0.08, 0.06, 0.03)]
    found = loss_and_gradients(trainer, part)[0]
    assert found == float(by_hand(trainer, part, levels))
    both = by_hand(trainer, inputs, [FiberLevel(torch.tensor([0, 0, 1, 1]), 0.08, 0.06, 0.03)])
    assert abs(found - float(both)) > 1e-3


def test_several_updates_drift_and_the_first_of_a_rollout_does_not(
    words: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = decoder(spread=0.05)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = trainer_of(FiberPOTrainer, model, words, tmp_path, max_steps=8, learning_rate=1e-2, num_iterations=4)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 8
    shares = [f"fiberpo/trajectories/{name}" for name in ("passing", "rolling_back", "zeroed")]
    for place, entry in enumerate(steps):
        assert sum(entry[name] for name in shares) == pytest.approx(1)
        assert sum(entry[name.replace("trajectories", "tokens")] for name in shares) == pytest.approx(1)
        assert entry["entropy"] > 0
        if place % 4 == 0:
            assert entry["ratio/mean"] == pytest.approx(1, abs=1e-5) == entry["ratio/farthest"]
            assert entry[shares[0]] == 1 and entry["fiberpo/tokens/clipped"] == 0
            assert entry["completions/mean_length"] <= 6
    assert any(entry["fiberpo/tokens/clipped"] > 0 for entry in steps)
    assert max(entry["ratio/farthest"] for entry in steps) > 1.01
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


@pytest.mark.parametrize("rule", ["importance", "drop"])
def test_rollouts_and_loss_merge_the_same_prompts(words: PreTrainedTokenizerFast, tmp_path: Path, rule: str) -> None:
    """The probabilities that answers were drawn with are those of the loss, and not those without merging."""
    model = wrap(decoder(), PyraConfig(keep={0: 0.5}, rule=rule, reactivation=False))
    trainer = trainer_of(FiberPOTrainer, model, words, tmp_path)
    prompts = [words(text)["input_ids"] for text in (" ".join(["a fine film"] * 20), " ".join(["a bore"] * 16))]
    width = max(map(len, prompts))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    trainer.model.eval()
    drawn = trainer.model.generate(
        input_ids=ids, attention_mask=mask, do_sample=True, max_new_tokens=7, min_new_tokens=7,
        return_dict_in_generate=True, output_logits=True, pad_token_id=2,
    )  # fmt: skip
    answers = drawn.sequences[:, width:]
    sampled = torch.stack(drawn.logits, 1).log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    inputs = {"prompt_ids": ids, "prompt_mask": mask, "completion_ids": answers}
    inputs["completion_mask"] = torch.ones_like(answers)
    found = logps_of(trainer, inputs)
    torch.testing.assert_close(found, sampled, rtol=0, atol=1e-4)
    whole = trainer_of(FiberPOTrainer, decoder(), words, tmp_path)
    assert (logps_of(whole, inputs) - sampled).abs().max() > 1e-2


def test_a_model_that_merges_is_trained_on_its_own_rollouts(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = adapt(
        decoder(spread=0.05),
        pyra=PyraConfig(keep={0: 0.5}),
        peft=peft_config("lora", 4, 0.0, ["q_proj", "v_proj"]),
    )
    longer = Dataset.from_dict({"prompt": [" ".join(["a fine film"] * 15) + f" {count}" for count in range(8)]})
    options = {"max_steps": 2, "num_iterations": 2, "learning_rate": 1e-2}
    trainer = trainer_of(FiberPOTrainer, model, words, tmp_path, longer, **options)
    trained = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    assert any("reactivation" in name for name in trained)
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert first["ratio/mean"] == pytest.approx(1, abs=1e-5)
    assert second["ratio/farthest"] > 1 + 1e-4
    moved = [name for name, value in trained.items() if not torch.equal(value, dict(model.named_parameters())[name])]
    assert any("reactivation" in name for name in moved) and any("lora" in name for name in moved)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"c_minus": 0.2}, "c_minus must be below c_plus, got 0.2 and 0.15"),
        ({"fiber_eps": 0.0}, "fiber_eps must be a number above 0"),
        ({"group_c_plus": 0.1, "group_eps": 0.01}, "given together or not at all: group_c_minus is missing"),
        ({**GROUPS, "group_c_plus": 0.2}, "group_c_plus must be below that of an answer, 0.15, got 0.2"),
        ({**GROUPS, "group_eps": -1.0}, "group_eps must be a number above 0, got -1.0"),
        ({"loss_type": "dapo"}, "loss_type='dapo' belongs to another loss"),
        ({"epsilon": 0.1, "importance_sampling_level": "sequence"}, "importance_sampling_level='sequence' belongs"),
        ({"entropy_coef": 0.1}, "entropy_coef=0.1 belongs to another loss"),
    ],
)
def test_options_of_other_losses_are_refused(tmp_path: Path, changed: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        FiberPOConfig(output_dir=str(tmp_path), **{**SHARED, **changed})
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_the_config_must_be_fiberpos(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="args must be a FiberPOConfig, got GRPOConfig"):
        FiberPOTrainer(
            model=decoder(),
            reward_funcs=[varied],
            args=GRPOConfig(output_dir=str(tmp_path), **SHARED),
            train_dataset=PROMPTS,
            processing_class=words,
        )
