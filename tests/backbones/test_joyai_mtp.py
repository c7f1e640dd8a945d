"""The MTP layer of JoyAI: attached, trained, written, and drafting the text that the decoder gives without it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import make
from joyai_releases import write_published
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import MtpModel

from pyra.backbones import joyai, joyai_drafting, unwrap, wrap
from pyra.backbones.joyai_checkpoint import MTP, check_checkpoint, load_model, save_checkpoint
from pyra.backbones.joyai_drafting import DraftRecord
from pyra.backbones.joyai_mtp import IGNORED, attach_mtp, detach_mtp, mtp_loss, mtp_states
from pyra.config import PyraConfig
from pyra.errors import CheckpointError, ConfigError, PyraError

PROMPTS = [torch.randint(2, 512, (1, n), generator=torch.Generator().manual_seed(n)) for n in (1, 2, 7, 40)]


def drafter(**changes: Any) -> joyai.JoyAIForCausalLM:
    """A model whose layer has learned a little: drafts are accepted and rejected."""
    model = attach_mtp(make(**changes))
    model.requires_grad_(False)
    model.mtp.requires_grad_(True)  # type: ignore[union-attr]
    ids = answer(model, PROMPTS[2], 30)
    optimizer = torch.optim.Adam(model.mtp.parameters(), lr=3e-3)  # type: ignore[union-attr]
    hidden = last_hidden(model, ids)
    for _ in range(20):
        optimizer.zero_grad()
        mtp_loss(model, hidden, ids, ids).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> joyai.JoyAIForCausalLM:
    return drafter(num_hidden_layers=2)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write_published(tmp_path / "published", joyai.tiny_config())


def last_hidden(model: Any, ids: Tensor, **told: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.model(ids, use_cache=False, **told).last_hidden_state
    return found


def answer(model: Any, ids: Tensor, count: int = 24, **told: Any) -> Any:
    asked = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    return model.generate(ids, **{"attention_mask": torch.ones_like(ids), **asked, **told})


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    own, theirs = first.state_dict(), second.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


def test_attached_and_detached_the_model_is_what_it_was() -> None:
    model = make(num_nextn_predict_layers=0)
    before, children = copy.deepcopy(model), list(dict(model.named_modules()))
    told = model.config.to_dict()
    assert attach_mtp(model) is model and model.config.num_nextn_predict_layers == 1
    assert any(name.startswith("mtp.") for name in model.state_dict())
    ids = PROMPTS[2]
    assert torch.equal(model(ids).logits, before(ids).logits)
    assert detach_mtp(model) is model and model.config.to_dict() == told and model.mtp is None
    assert states_equal(model, before) and list(dict(model.named_modules())) == children


def test_a_new_layer_begins_near_the_decoder_and_shares_its_embedding_and_head() -> None:
    model = attach_mtp(make())
    layer: Any = model.mtp
    last = model.model.layers[-1]
    assert torch.equal(layer.mtp_block.self_attn.o_proj.weight, last.self_attn.o_proj.weight)
    assert torch.equal(layer.mtp_block.mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    assert torch.equal(layer.post_norm.weight, model.model.norm.weight)
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    assert not own & {parameter.data_ptr() for parameter in model.model.parameters()}
    counted = joyai.parameter_count(joyai.tiny_config())
    assert sum(p.numel() for p in layer.parameters()) == (
        counted["with_mtp"]
        - counted["without_mtp"]
        - model.model.embed_tokens.weight.numel()
        - 3 * 8  # routers' biases
    )


def test_a_layer_without_a_dense_one_to_copy_is_drawn_by_its_seed() -> None:
    first, again, other = (
        attach_mtp(make(first_k_dense_replace=0), seed=seed).mtp.mtp_block.mlp.up_proj.weight  # type: ignore[union-attr]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("writer", ["save_checkpoint", "save_pretrained"])
def test_it_is_written_and_read_bit_for_bit(writer: str, published: Path, tmp_path: Path) -> None:
    model, folder = load_model(published, mtp=True), tmp_path / "again"
    if writer == "save_checkpoint":
        save_checkpoint(model, folder)
        assert (folder / MTP).is_file()
    else:
        model.save_pretrained(folder)
    before, after = stored(published), stored(folder)
    embedding = "model.layers.4.embed_tokens.weight"
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != embedding)
    assert torch.equal(after[embedding], before["model.embed_tokens.weight"])
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert states_equal(load_model(folder, mtp=True), model)
    (layer,) = MtpModel.from_pretrained(load_model(folder)).layers  # as transformers reads it
    assert states_equal(layer, model.mtp)  # type: ignore[arg-type]


@pytest.mark.parametrize("writer", ["save_checkpoint", "save_pretrained"])
def test_without_a_layer_the_written_configuration_has_none(writer: str, published: Path, tmp_path: Path) -> None:
    model, folder = detach_mtp(load_model(published, mtp=True)), tmp_path / "trunk"
    if writer == "save_checkpoint":
        save_checkpoint(model, folder)
    else:
        model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert check_checkpoint(folder).mtp == []
    assert model.config.num_nextn_predict_layers == 1  # of the folder it was read from


def test_a_state_that_a_trainer_gathered_is_written_alike(published: Path, tmp_path: Path) -> None:
    model = load_model(published, mtp=True)
    model.save_pretrained(tmp_path / "a", state_dict={name: 2 * value for name, value in model.state_dict().items()})
    name = "model.layers.4.mlp.up_proj.weight"
    assert torch.equal(stored(tmp_path / "a")[name], 2 * stored(published)[name])
    assert not any(name.startswith("mtp.") for name in stored(tmp_path / "a"))


def test_a_copy_and_a_state_carry_the_layer(model: joyai.JoyAIForCausalLM) -> None:
    twin = copy.deepcopy(model)
    assert states_equal(twin, model) and twin.mtp is not model.mtp
    other = attach_mtp(make(num_hidden_layers=2))
    other.load_state_dict(model.state_dict())
    assert states_equal(other, model)


# --- the loss


def slow_loss(model: Any, ids: list[int], labels: list[int]) -> list[float]:
    """The loss of each label of one sequence: a forward for each, over what comes before it and nothing else."""
    found = []
    for place in range(2, len(ids)):
        if labels[place] == IGNORED:
            continue
        hidden = last_hidden(model, torch.tensor([ids[: place - 1]]))
        states = mtp_states(model, model.mtp, hidden, torch.tensor([ids[1:place]]))
        logits = model.lm_head(states[0, -1])
        found.append(float(torch.logsumexp(logits, 0) - logits[labels[place]]))
    return found


ROWS = [([5, 9, 3, 7, 8, 2, 6], 3), ([11, 4, 4, 9], 1), ([7, 7, 2, 30, 31, 32, 33, 34, 35], 8), ([3, 4], 0), ([3], 0)]
"""Token ids, and where the answer begins."""


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("whole", [True, False])
def test_the_loss_is_that_of_one_forward_a_token(side: str, whole: bool, model: joyai.JoyAIForCausalLM) -> None:
    width = max(len(ids) for ids, _ in ROWS)
    expected, batch = [], {"ids": [], "labels": [], "mask": []}
    for ids, start in ROWS:
        labels = ids if whole else [IGNORED] * start + ids[start:]
        expected += slow_loss(model, ids, labels)
        for name, row, fill in (("ids", ids, 1), ("labels", labels, IGNORED), ("mask", [1] * len(ids), 0)):
            padding = [fill] * (width - len(ids))
            batch[name].append(padding + row if side == "left" else row + padding)
    ids, labels, mask = (torch.tensor(batch[name]) for name in ("ids", "labels", "mask"))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    hidden = last_hidden(model, ids, attention_mask=mask, position_ids=positions)
    found = mtp_loss(model, hidden, ids, labels, attention_mask=mask)
    assert len(expected) == (14 if whole else 7)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    summed = mtp_loss(model, hidden, ids, labels, attention_mask=mask, num_items=100)
    assert summed.item() == pytest.approx(sum(expected) / 100, rel=1e-5)


def test_packed_sequences_keep_apart(model: joyai.JoyAIForCausalLM) -> None:
    rows = [ids for ids, _ in ROWS]
    packed = torch.tensor([[token for ids in rows for token in ids]])
    positions = torch.tensor([[place for ids in rows for place in range(len(ids))]])
    expected = [value for ids in rows for value in slow_loss(model, ids, ids)]
    hidden = last_hidden(model, packed, position_ids=positions)
    found = mtp_loss(model, hidden, packed, packed, position_ids=positions)
    assert found.item() == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert mtp_loss(model, hidden, packed, packed).item() != pytest.approx(found.item(), rel=1e-3)


@pytest.mark.parametrize("length", [1, 2, 5])
def test_without_a_label_that_counts_the_loss_is_zero_and_has_a_gradient(length: int) -> None:
    model = attach_mtp(make())
    ids = torch.full((2, length), 7)
    labels = ids.clone()
    labels[:, 2:] = IGNORED
    mtp_loss(model, last_hidden(model, ids), ids, labels).backward()
    gradients = [parameter.grad for parameter in model.mtp.parameters()]  # type: ignore[union-attr]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_what_trains_and_are_right(frozen: bool) -> None:
    model = attach_mtp(make(first_k_dense_replace=4)).double().train()  # no routes that could change
    model.requires_grad_(not frozen)
    model.mtp.requires_grad_(True)  # type: ignore[union-attr]
    ids = torch.randint(2, 512, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0

    def loss() -> Tensor:
        hidden = model.model(ids, attention_mask=mask, use_cache=False).last_hidden_state
        return mtp_loss(model, hidden, ids, ids, attention_mask=mask)

    loss().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert all((name.startswith("mtp.") or not frozen) != (name in without) for name, _ in model.named_parameters())
    for name in ("mtp.eh_proj.weight", "mtp.mtp_block.self_attn.kv_b_proj.weight") + (
        () if frozen else ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight")
    ):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None and parameter.grad.isfinite().all()
        direction = parameter.grad / parameter.grad.norm()
        with torch.no_grad():
            values = []
            for step in (1e-2, -1e-2):
                parameter.add_(step * direction)
                values.append(float(loss()))
                parameter.sub_(step * direction)
        assert (values[0] - values[1]) / 2e-2 == pytest.approx(float(parameter.grad.norm()), rel=1e-2)


def test_half_precision_takes_its_loss_in_float32() -> None:
    model = attach_mtp(make()).bfloat16()
    ids = torch.randint(2, 512, (2, 30), generator=torch.Generator().manual_seed(0))
    hidden = last_hidden(model, ids)
    exact = mtp_loss(copy.deepcopy(model).double(), hidden.double(), ids, ids)
    states = mtp_states(model, model.mtp, hidden[:, :-2], ids[:, 1:-1])
    plain = F.cross_entropy(model.lm_head(states).float().flatten(0, 1), ids[:, 2:].flatten())
    assert abs(mtp_loss(model, hidden, ids, ids) - exact) <= 2 * abs(plain - exact) + 1e-6


# --- drafting


@pytest.mark.parametrize("count", [1, 3])
def test_drafts_change_nothing_about_greedy_answers(count: int, model: joyai.JoyAIForCausalLM) -> None:
    record = DraftRecord()
    for prompt in PROMPTS:
        expected = answer(model, prompt, 20)
        found = answer(model, prompt, 20, use_mtp=True, mtp_draft_tokens=count, mtp_record=record)
        assert torch.equal(found, expected)
    assert 0 < sum(record.accepted) < sum(record.drafted)  # some of both
    assert max(record.drafted) == count and max(record.accepted) <= count
    # the first token of each answer comes from the prompt, every other one from a verification that gave one at least
    assert sum(record.accepted) + len(record.accepted) <= len(PROMPTS) * 19


@pytest.mark.parametrize("seed", range(2))
def test_a_random_layer_drafts_the_same_text(seed: int) -> None:
    model = attach_mtp(make(), seed=seed)
    torch.manual_seed(seed)
    for parameter in model.mtp.parameters():  # type: ignore[union-attr]
        nn.init.normal_(parameter, std=0.3)
    for prompt in PROMPTS[1:3]:
        assert torch.equal(answer(model, prompt, 8, use_mtp=True, mtp_draft_tokens=3), answer(model, prompt, 8))


@pytest.mark.parametrize("count", [1, 3])
def test_the_cache_is_that_of_a_run_without_drafts(count: int, model: joyai.JoyAIForCausalLM) -> None:
    told, record = {"return_dict_in_generate": True}, DraftRecord()
    for prompt in PROMPTS[2:]:
        plain = answer(model, prompt, 20, **told).past_key_values
        asked = {"use_mtp": True, "mtp_draft_tokens": count, "mtp_record": record, **told}
        drafted = answer(model, prompt, 20, **asked).past_key_values
        assert drafted.get_seq_length() == plain.get_seq_length() == prompt.shape[1] + 20 - 1
        for own, theirs in zip(drafted.layers, plain.layers, strict=True):
            torch.testing.assert_close(own.keys, theirs.keys, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own.values, theirs.values, rtol=1e-4, atol=1e-5)
    assert 0 < sum(record.accepted) < sum(record.drafted)


def test_the_cache_of_the_layer_holds_what_the_decoder_has_computed(
    model: joyai.JoyAIForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every draft is the one that a forward over the whole text, without a cache, gives."""
    seen: list[tuple[Tensor, Tensor]] = []
    original = joyai_drafting.MtpCandidates.get_candidates

    def spy(self: Any, input_ids: Tensor, **told: Any) -> Any:
        whole, logits = original(self, input_ids, **told)
        if logits is not None:
            seen.append((input_ids, logits))
            assert self.cache.get_seq_length() == input_ids.shape[1] - 1
        return whole, logits

    monkeypatch.setattr(joyai_drafting.MtpCandidates, "get_candidates", spy)
    answer(model, PROMPTS[2], 16, use_mtp=True, mtp_draft_tokens=3)
    assert len(seen) > 3
    for ids, logits in seen:
        hidden, following = last_hidden(model, ids[:, :-1]), ids[:, 1:]
        for step in range(logits.shape[1]):
            states = mtp_states(model, model.mtp, hidden, following)
            expected = model.lm_head(states[:, -1]).float()
            torch.testing.assert_close(logits[:, step], expected, rtol=1e-4, atol=1e-4)
            hidden = torch.cat([hidden, states[:, -1:]], dim=1)
            following = torch.cat([following, expected.argmax(-1, keepdim=True)], dim=1)


@pytest.mark.parametrize("count", [1, 4])
def test_an_end_inside_a_draft_ends_the_answer(count: int, model: joyai.JoyAIForCausalLM) -> None:
    record = DraftRecord()
    whole = answer(model, PROMPTS[3], 24)[0, PROMPTS[3].shape[1] :].tolist()
    ends = sorted(set(whole), key=whole.index)
    for end in ends[2:8:3]:
        told = {"eos_token_id": end, "return_dict_in_generate": True}
        plain = answer(model, PROMPTS[3], 24, **told)
        found = answer(model, PROMPTS[3], 24, use_mtp=True, mtp_draft_tokens=count, mtp_record=record, **told)
        assert torch.equal(found.sequences, plain.sequences) and found.sequences[0, -1] == end
        assert found.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_more_tokens_than_were_asked_for(most: int, model: joyai.JoyAIForCausalLM) -> None:
    record = DraftRecord()
    found = answer(model, PROMPTS[2], most, use_mtp=True, mtp_draft_tokens=4, mtp_record=record)
    assert torch.equal(found, answer(model, PROMPTS[2], most))
    assert all(drafted <= most - 2 for drafted in record.drafted)


def test_a_padded_prompt(model: joyai.JoyAIForCausalLM) -> None:
    told = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    ids = torch.cat([torch.ones(1, 3, dtype=torch.long), PROMPTS[2]], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 7])
    plain = model.generate(ids, attention_mask=mask, **told)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_mtp=True, mtp_draft_tokens=2, **told), plain)


def test_the_generation_configuration_may_ask_for_drafts(model: joyai.JoyAIForCausalLM, tmp_path: Path) -> None:
    asked, record = copy.deepcopy(model), DraftRecord()
    asked.generation_config = GenerationConfig(use_mtp=True, mtp_draft_tokens=2)
    assert torch.equal(answer(asked, PROMPTS[2], mtp_record=record), answer(model, PROMPTS[2]))
    assert max(record.drafted) == 2
    save_checkpoint(asked, tmp_path / "a")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    record = DraftRecord()
    assert torch.equal(answer(again, PROMPTS[2], mtp_record=record), answer(model, PROMPTS[2]))
    assert max(record.drafted) == 2


def test_a_published_folder_drafts_without_attaching(published: Path) -> None:
    model, record = load_model(published).eval(), DraftRecord()
    plain = answer(model, PROMPTS[2])
    assert torch.equal(answer(model, PROMPTS[2], use_mtp=True, mtp_draft_tokens=3, mtp_record=record), plain)
    assert record.drafted and model.mtp is None


def test_an_adapter_around_it_drafts_for_itself(model: joyai.JoyAIForCausalLM) -> None:
    adapted: Any = peft.get_peft_model(
        detach_mtp(copy.deepcopy(model)), peft.LoraConfig(target_modules=["o_proj"], init_lora_weights=False)
    ).eval()
    plain = answer(adapted, PROMPTS[2])
    attach_mtp(adapted)
    assert torch.equal(answer(adapted, PROMPTS[2], use_mtp=True, mtp_draft_tokens=3), plain)
    assert not torch.equal(plain, answer(model, PROMPTS[2]))


def test_sampled_answers_are_distributed_as_without_drafts() -> None:
    """Three tokens of a model of few words: the distribution over all texts is known, and is met."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 3, "num_hidden_layers": 1, "initializer_range": 0.4}
    model = attach_mtp(joyai.JoyAIForCausalLM(joyai.tiny_config(**sizes)).eval())
    for parameter in model.mtp.parameters():  # type: ignore[union-attr]
        nn.init.normal_(parameter, std=0.5)
    prompt, runs, record = torch.tensor([[2, 0, 1, 2]]), 300, DraftRecord()
    expected = torch.zeros(3, 3, 3)
    with torch.no_grad():
        for first in range(3):
            for second in range(3):
                text = torch.cat([prompt, torch.tensor([[first, second]])], dim=1)
                chances = (model(text).logits[0, -3:] / 0.8).softmax(-1)
                expected[first, second] = chances[0, first] * chances[1, second] * chances[2]
    asked = {"do_sample": True, "temperature": 0.8, "top_k": 0, "use_mtp": True, "mtp_draft_tokens": 2}
    seen = torch.zeros(3, 3, 3)
    for _ in range(runs):
        text = answer(model, prompt, 3, mtp_record=record, **asked)[0, -3:]
        seen[tuple(text.tolist())] += 1
    assert 0.05 < record.acceptance_rate < 0.95
    chi_square = float(((seen - runs * expected) ** 2 / (runs * expected)).sum())
    assert chi_square < 54.1  # exceeded by one in a thousand of a distribution with 26 degrees of freedom
    wrong = expected.roll(1, 0)  # which the test would tell apart
    assert float(((seen - runs * wrong) ** 2 / (runs * wrong)).sum()) > 150


# --- prompts that merge


@pytest.mark.parametrize(
    ("count", "options"), [(1, {}), (3, {"rule": "bipartite"}), (3, {"rule": "drop"}), (3, {"size_bias": True})]
)
def test_drafts_change_nothing_where_prompts_merge(
    count: int, options: dict[str, Any], model: joyai.JoyAIForCausalLM
) -> None:
    merging = wrap(copy.deepcopy(model), PyraConfig(keep={0: 0.6}, reactivation=False, **options))
    record, told = DraftRecord(), {"return_dict_in_generate": True}
    prompt = torch.randint(2, 512, (1, 90), generator=torch.Generator().manual_seed(5))
    plain = answer(merging, prompt, 30, **told)
    found = answer(merging, prompt, 30, use_mtp=True, mtp_draft_tokens=count, mtp_record=record, **told)
    assert torch.equal(found.sequences, plain.sequences)
    assert record.drafted and sum(record.accepted) < sum(record.drafted)
    lengths = [[layer.get_seq_length() for layer in each.past_key_values.layers] for each in (found, plain)]
    assert lengths[0] == lengths[1] and min(lengths[0]) < max(lengths[0])
    for own, theirs in zip(found.past_key_values.layers, plain.past_key_values.layers, strict=True):
        torch.testing.assert_close(own.keys, theirs.keys, rtol=1e-4, atol=1e-5)
        if hasattr(theirs, "size"):
            assert torch.equal(own.size, theirs.size)
    assert not torch.equal(plain.sequences, answer(model, prompt, 30))


def test_a_layer_trains_on_prompts_that_merge_and_stays_when_they_no_longer_do() -> None:
    model = attach_mtp(wrap(make(), PyraConfig(rate=0.5)))
    ids = torch.randint(2, 512, (2, 90), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[:, :80] = IGNORED
    outputs = model(ids, labels=labels, output_hidden_states=-1, use_cache=False)
    loss = mtp_loss(model, outputs.hidden_states[-1], ids, labels)
    (outputs.loss + 0.1 * loss).backward()
    assert all(parameter.grad is not None for parameter in model.mtp.parameters())  # type: ignore[union-attr]
    assert unwrap(model).mtp is not None


# --- what is refused, in one line


def refused(error: type[PyraError], said: str, run: Any) -> None:
    with pytest.raises(error, match=said) as caught:
        run()
    assert "\n" not in str(caught.value)


def test_models_and_folders_that_do_not_fit(published: Path, tmp_path: Path) -> None:
    model = load_model(published)
    save_checkpoint(model, tmp_path / "bare")
    other = write_published(tmp_path / "other", joyai.tiny_config(num_hidden_layers=3))
    small = LlamaForCausalLM(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    refused(ConfigError, "has no MTP layer: attach_mtp", lambda: detach_mtp(model))
    refused(ConfigError, "for a JoyAIForCausalLM, got LlamaForCausalLM", lambda: attach_mtp(small))
    refused(CheckpointError, "bare holds no MTP weights", lambda: attach_mtp(model, tmp_path / "bare"))
    refused(CheckpointError, "bare holds no MTP weights", lambda: load_model(tmp_path / "bare", mtp=True))
    refused(CheckpointError, "follows 3 layers of width 64, the model has 4", lambda: attach_mtp(model, other))
    refused(CheckpointError, "no config.json there", lambda: attach_mtp(model, tmp_path))
    attach_mtp(model, published)
    refused(ConfigError, "has an MTP layer already", lambda: attach_mtp(model))
    refused(ConfigError, "attached: leave mtp=", lambda: save_checkpoint(model, tmp_path / "c", mtp=published))
    assert not (tmp_path / "c").exists()


def rewritten(published: Path, **changes: Any) -> Path:
    (published / MTP).rename(published / "old")
    tensors = load_file(published / "old")
    index = json.loads((published / "model.safetensors.index.json").read_text())
    for name, value in changes.items():
        full = f"model.layers.4.{name.replace('__', '.')}"
        index["weight_map"].pop(full, None)
        tensors.pop(full, None)
        if value is not None:
            tensors[full], index["weight_map"][full] = value, MTP
    save_file(tensors, published / MTP)
    (published / "old").unlink()
    (published / "model.safetensors.index.json").write_text(json.dumps(index))
    return published


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eh_proj__weight": None}, "lacks model.layers.4.eh_proj.weight"),
        ({"eh_proj__weight": torch.zeros(64, 64)}, "has other sizes of model.layers.4.eh_proj.weight"),
        ({"mlp__experts__0__up_proj__weight": torch.zeros(2, 2)}, "also holds model.layers.4.mlp.experts.0"),
    ],
)
def test_layers_that_are_not_joyais(changes: dict[str, Any], said: str, published: Path) -> None:
    folder = rewritten(published, **changes)
    refused(CheckpointError, said, lambda: load_model(folder, mtp=True))


def test_drafts_of_a_model_that_has_no_layer(published: Path, tmp_path: Path) -> None:
    save_checkpoint(load_model(published), tmp_path / "bare")
    for model in (load_model(tmp_path / "bare"), AutoModelForCausalLM.from_pretrained(tmp_path / "bare"), make()):
        refused(
            ConfigError, "use_mtp=True: the model has no MTP layer", lambda m=model: answer(m, PROMPTS[2], use_mtp=True)
        )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"mtp_draft_tokens": 0}, "must be a whole number from 1 on, got 0"),
        ({"mtp_draft_tokens": 1.5}, "got 1.5"),
        ({"mtp_draft_tokens": True}, "got True"),
        ({"mtp_record": []}, "must be a DraftRecord, got list"),
        ({"use_mtp": "no"}, "use_mtp must be True or False, got 'no'"),
        ({"attention_mask": torch.zeros(1, 30)}, "attention_mask hides the whole prompt"),
        ({"use_mtp": False, "mtp_draft_tokens": 2}, "mtp_draft_tokens: say use_mtp=True, too"),
        ({"num_beams": 2}, "does not go with num_beams=2"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences=2"),
        ({"guidance_scale": 2.0}, "guidance_scale=2.0"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens=2"),
        ({"use_cache": False}, "use_cache=False"),
        ({"stop_strings": ["a"]}, "does not go with stop_strings="),
        ({"stopping_criteria": [lambda ids, scores: False]}, "does not go with stopping_criteria"),
        ({"inputs_embeds": torch.zeros(1, 3, 64)}, "give input_ids in place of inputs_embeds"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "output_hidden_states=True"),
        ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions=True"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"num_beams": 2, "use_cache": False}, "num_beams=2, use_cache=False"),
    ],
)
def test_requests_that_do_not_go_with_drafts(asked: dict[str, Any], said: str, model: joyai.JoyAIForCausalLM) -> None:
    refused(ConfigError, said, lambda: answer(model, PROMPTS[2], **{"use_mtp": True, **asked}))


def test_a_cache_that_holds_tokens_is_refused(model: joyai.JoyAIForCausalLM) -> None:
    cache = DynamicCache()
    assert torch.equal(answer(model, PROMPTS[2], use_mtp=True, past_key_values=cache), answer(model, PROMPTS[2]))
    said = "begins with an empty cache, this one holds 30 tokens"
    refused(ConfigError, said, lambda: answer(model, PROMPTS[2], use_mtp=True, past_key_values=cache))


def test_several_prompts_at_once_are_refused(model: joyai.JoyAIForCausalLM) -> None:
    ids = PROMPTS[2].repeat(2, 1)
    refused(ConfigError, "answers one prompt at a time, got 2", lambda: answer(model, ids, use_mtp=True))


def test_shapes_that_do_not_fit(model: joyai.JoyAIForCausalLM) -> None:
    ids, hidden = PROMPTS[2], last_hidden(model, PROMPTS[2])
    for told in ((hidden[0], ids, ids), (hidden[:, 1:], ids, ids), (hidden, ids, ids[:, 1:])):
        refused(ConfigError, "takes hidden states", lambda t=told: mtp_loss(model, *t))
    refused(ConfigError, "has no MTP layer", lambda: mtp_loss(make(), hidden, ids, ids))
