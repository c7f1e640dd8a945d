"""Decoders whose prompts merge: what they answer, alone and in batches, trained and generating."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    QuantizedCache,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer

from pyra import PyraConfig, UnsupportedModelError, macs, schedule_for, set_rate, unwrap, wrap
from pyra.adapters import adapt, fold_adapter, load_adapter, save_adapter
from pyra.backbones import geometry, joyai
from pyra.backbones.hf_decoder_cache import PromptLayer, key_value_bytes
from pyra.errors import ConfigError, ExportError, ScheduleError
from pyra.export import export_model
from pyra.prompt_matching import FIRST, LAST

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPT = 70


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).eval()


def qwen(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**{**SMALL, "head_dim": 8, **changes})).eval()


def joy(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = joyai.tiny_config(num_hidden_layers=6, vocab_size=97, eos_token_id=None, **changes)
    return joyai.JoyAIForCausalLM(config).eval()


MAKERS: list[Callable[..., nn.Module]] = [llama, qwen, joy]


def ids(count: int = 80, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


def prompt_mask(tokens: Tensor, length: int = PROMPT) -> Tensor:
    return (torch.arange(tokens.shape[1]) < length).expand_as(tokens)


def trained(model: nn.Module) -> nn.Module:
    """Give re-activation weights that change something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("channel_weight"):
            parameter.data.normal_(generator=generator)
    return model


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def model(request: pytest.FixtureRequest) -> Any:
    return trained(wrap(request.param(), PyraConfig(rate=0.3, size_bias=True)))


@torch.no_grad()
def test_a_rate_of_zero_and_unwrapping_leave_the_model_as_it_was() -> None:
    for make in MAKERS:
        model, tokens = make(), ids()
        names, stock = list(model.state_dict()), model(tokens).logits
        wrap(model, PyraConfig(rate=0))
        assert torch.equal(model(tokens).logits, stock) and "generate" not in model.__dict__
        wrap(model, PyraConfig(rate=0.4))
        assert not torch.equal(model(tokens, prompt_mask=prompt_mask(tokens)).logits, stock)
        unwrap(model)
        assert torch.equal(model(tokens).logits, stock) and list(model.state_dict()) == names


@torch.no_grad()
def test_merging_nothing_answers_as_the_model_does() -> None:
    """The merging layers' own body, their masks and rotations, where no token goes."""
    for make in MAKERS:
        for implementation in ("sdpa", "eager"):
            model, tokens = make(attn_implementation=implementation), ids()
            stock = model(tokens).logits
            wrap(model, PyraConfig(keep={1: 0.5, 3: 0.4}, size_bias=True))
            merging = model(tokens, prompt_mask=prompt_mask(tokens)).logits
            for layer in model.model.layers[1:]:
                object.__setattr__(layer.step, "share", 1.0)
            assert torch.allclose(model(tokens, prompt_mask=prompt_mask(tokens)).logits, stock, atol=1e-6)
            assert not torch.allclose(merging, stock, atol=1e-3)


@torch.no_grad()
def test_the_cache_says_what_a_whole_forward_says(model: Any) -> None:
    tokens = ids()
    whole = model(tokens, prompt_mask=prompt_mask(tokens)).logits
    read = model(tokens[:, :PROMPT], use_cache=True, logits_to_keep=1)
    several = model(tokens[:, PROMPT : PROMPT + 4], past_key_values=read.past_key_values)
    one = model(tokens[:, PROMPT + 4 : PROMPT + 5], past_key_values=read.past_key_values)
    found = torch.cat([read.logits, several.logits, one.logits], 1)
    assert torch.allclose(found, whole[:, PROMPT - 1 : PROMPT + 5], atol=1e-5)
    first = next(index for index, removed in enumerate(model.model.pyra_schedule) if removed)
    lengths = [layer.get_seq_length() for layer in read.past_key_values.layers]
    assert lengths[: first + 1] == [PROMPT + 5] * (first + 1) and max(lengths[first + 1 :]) < PROMPT
    stock = DynamicCache(config=model.config)
    assert key_value_bytes(read.past_key_values) > 0 == key_value_bytes(stock)


@torch.no_grad()
def test_logits_of_completions_do_not_know_their_future(model: Any) -> None:
    tokens, mask = ids(), prompt_mask(ids())
    other = tokens.clone()
    other[:, -1] = (other[:, -1] + 1) % 97
    first, second = (model(one, prompt_mask=mask).logits for one in (tokens, other))
    assert torch.equal(first[:, :-1], second[:, :-1]) and not torch.equal(first[:, -1], second[:, -1])


@torch.no_grad()
@pytest.mark.parametrize("rule", ["importance", "bipartite", "drop", "truncate"])
@pytest.mark.parametrize("make", [llama, joy])
def test_rows_of_a_batch_answer_as_they_do_alone(make: Any, rule: str) -> None:
    keep = {1: 0.6, 3: 0.4}
    config = PyraConfig(keep=keep, rule=rule, reactivation=rule in ("importance", "bipartite"), size_bias=[3, 4, 5])
    model = trained(wrap(make(), config))
    rows = [ids(count, seed=count) for count in (90, 61, 18, 5)]
    width = max(row.shape[1] for row in rows)
    batch = torch.cat([nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    attended = torch.cat([nn.functional.pad(torch.ones_like(row), (width - row.shape[1], 0)) for row in rows])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of prompts that are too short
        together = model.generate(
            batch, attention_mask=attended, max_new_tokens=6, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        for index, row in enumerate(rows):
            alone = model.generate(
                row, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            assert alone.sequences[0, row.shape[1] :].tolist() == together.sequences[index, width:].tolist()
            for own, shared in zip(alone.logits, together.logits, strict=True):
                assert torch.allclose(own[0], shared[index], atol=2e-6)


@torch.no_grad()
def test_right_padding_and_prompts_of_any_length_train_alike(model: Any) -> None:
    rows, lengths = [ids(count, seed=count) for count in (80, 50)], [70, 20]
    labels = [torch.where(prompt_mask(row, length), -100, row) for row, length in zip(rows, lengths, strict=True)]
    batch = torch.cat([nn.functional.pad(row, (0, 80 - row.shape[1])) for row in rows])
    attended = torch.cat([nn.functional.pad(torch.ones_like(row), (0, 80 - row.shape[1])) for row in rows])
    padded = torch.cat([nn.functional.pad(row, (0, 80 - row.shape[1]), value=-100) for row in labels])
    together = model(batch, attention_mask=attended, labels=padded)
    assert together.logits.shape == (2, 80, 97)
    for index, (row, own) in enumerate(zip(rows, labels, strict=True)):
        alone = model(row, labels=own).logits[0, lengths[index] - 1 :]
        assert torch.allclose(together.logits[index, lengths[index] - 1 : row.shape[1]], alone, atol=2e-6)


def test_generate_is_what_the_whole_forward_says(model: Any) -> None:
    tokens = ids(PROMPT)
    greedy = model.generate(tokens, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        whole = model(greedy, prompt_mask=prompt_mask(greedy)).logits
    assert whole[0, PROMPT - 1 : -1].argmax(-1).tolist() == greedy[0, PROMPT:].tolist()
    looked_up = model.generate(tokens, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, greedy)
    assisted = model.generate(tokens, max_new_tokens=8, do_sample=False, assistant_model=llama(num_hidden_layers=2))
    assert torch.equal(assisted, greedy)
    torch.manual_seed(0)
    sampled = model.generate(tokens, max_new_tokens=8, do_sample=True, num_return_sequences=2)
    assert sampled.shape == (2, PROMPT + 8)


@torch.no_grad()
def test_beams_score_what_the_whole_forward_scores(model: Any) -> None:
    tokens = ids(PROMPT)
    found = model.generate(
        tokens, max_new_tokens=6, num_beams=4, do_sample=False, output_scores=True, return_dict_in_generate=True,
        length_penalty=0.0,
    )  # fmt: skip
    logits = model(found.sequences, prompt_mask=prompt_mask(found.sequences)).logits[0, PROMPT - 1 : -1]
    score = logits.log_softmax(-1).gather(1, found.sequences[0, PROMPT:, None]).sum()
    assert float(found.sequences_scores[0]) == pytest.approx(float(score), abs=1e-4)


def test_tokens_stream_and_a_second_turn_reads_the_first_one_s_cache(model: Any) -> None:
    class Heard(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None: ...

    tokens, heard = ids(PROMPT), Heard()
    first = model.generate(
        tokens, max_new_tokens=4, do_sample=False, streamer=heard, return_dict_in_generate=True, use_cache=True
    )
    assert heard.tokens == first.sequences[0].tolist()
    turn = torch.cat([first.sequences, ids(9, seed=5)], 1)
    second = model.generate(turn, past_key_values=first.past_key_values, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        whole = model(second, prompt_mask=prompt_mask(second)).logits
    assert whole[0, turn.shape[1] - 1 : -1].argmax(-1).tolist() == second[0, turn.shape[1] :].tolist()


def gradients(model: nn.Module, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(tokens, labels=labels).loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def test_gradients_are_those_of_float64_with_and_without_checkpoints(model: Any) -> None:
    tokens = ids(batch=2)
    labels = torch.where(prompt_mask(tokens), -100, tokens)
    plain = gradients(model, tokens, labels)
    assert sum("reactivation" in name for name in plain) == 4
    reference = copy.deepcopy(model).double()
    if hasattr(reference.model.layers[-1].mlp, "experts"):  # grouped products know no float64
        reference.set_experts_implementation("eager")
    exact = gradients(reference, tokens, labels)
    for name, value in plain.items():
        assert torch.allclose(value.double(), exact[name], atol=1e-5, rtol=1e-3), name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    again = gradients(model, tokens, labels)
    assert all(torch.allclose(again[name], value, atol=1e-7) for name, value in plain.items())
    enable({"use_reentrant": True})
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        gradients(model, tokens, labels)


@torch.no_grad()
def test_hidden_states_have_a_row_a_token(model: Any) -> None:
    tokens = ids()
    found = model(tokens, prompt_mask=prompt_mask(tokens), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[:2]) for state in found] == [(1, 80)] * 7


@torch.no_grad()
def test_a_copy_answers_alike(model: Any) -> None:
    tokens = ids(PROMPT)
    expected = model.generate(tokens, max_new_tokens=3, do_sample=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(tokens, max_new_tokens=3, do_sample=False), expected)
        unwrap(model)
        assert "generate" in other.__dict__
        wrap(model, PyraConfig(rate=0.3, size_bias=True))


def test_a_classifier_s_whole_text_is_a_prompt() -> None:
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SMALL, num_labels=3)).eval()
    tokens = ids(batch=2)
    with torch.no_grad():
        stock = model(tokens).logits
        wrap(model, PyraConfig(rate=0.4))
        merged = model(tokens, labels=torch.tensor([0, 2]))
    assert merged.logits.shape == (2, 3) and not torch.equal(merged.logits, stock)


@torch.no_grad()
def test_an_adapter_comes_back_with_its_merging(tmp_path: Any) -> None:
    for make in (llama, joy):
        model: Any = trained(adapt(make(), pyra=PyraConfig(rate=0.3), peft=LoraConfig(r=4)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.1)
        tokens = ids(PROMPT)
        expected = model.eval().generate(tokens, max_new_tokens=5, do_sample=False, output_logits=True,
                                         return_dict_in_generate=True)  # fmt: skip
        folder = tmp_path / make.__name__
        save_adapter(model, folder)
        again: Any = load_adapter(make(), folder)
        folded: Any = fold_adapter(load_adapter(make(), folder))
        for other in (again, folded):
            found = other.generate(tokens, max_new_tokens=5, do_sample=False, output_logits=True,
                                   return_dict_in_generate=True)  # fmt: skip
            pairs = zip(found.logits, expected.logits, strict=True)
            assert all(torch.allclose(one, two, atol=1e-5) for one, two in pairs)


def test_rates_are_saved_macs_and_prompts_keep_their_share() -> None:
    model = llama(num_hidden_layers=12)
    for rate in (0.2, 0.5, 0.7):
        schedule = schedule_for(model, rate=rate)
        assert sum(removed > 0 for removed in schedule) == 1
        assert rate <= 1 - macs(model, schedule) / macs(model) < rate + 0.002
    wrap(model, PyraConfig(rate=0.5))
    layer = next(index for index, removed in enumerate(model.model.pyra_schedule) if removed)  # type: ignore
    for tokens in (64, 300):
        read = model(ids(tokens), use_cache=True, logits_to_keep=1)
        sizes = geometry(model, tokens)
        scaled = macs(model, input_size=tokens)
        left = read.past_key_values.layers[-1].get_seq_length()
        expected = [0] * 12
        expected[layer] = tokens - left
        assert macs(model, expected, input_size=tokens) == scaled and sizes.tokens == tokens
    with pytest.warns(UserWarning, match=r"rate 0.20 is outside what these weights are for \(rate 0.50\)"):
        set_rate(model, 0.2)
    assert 0.2 <= 1 - macs(model) / macs(model, [0] * 12) < 0.202
    tokens = ids(PROMPT)
    with pytest.warns(UserWarning, match="outside"), torch.no_grad():
        set_rate(model, 0)
        stock = llama(num_hidden_layers=12)(tokens).logits
        assert torch.equal(model(tokens).logits, stock)
    assert model.generate(tokens, max_new_tokens=2, do_sample=False).shape == (1, PROMPT + 2)


def test_macs_are_those_that_are_counted() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for make in MAKERS:
        model, tokens = make(attn_implementation="eager"), ids(200)
        head = 97 * model.config.hidden_size * 200
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(tokens)
        # The counter does not see grouped products of experts.
        routed = 0 if make is not joy else 200 * 5 * 2 * 3 * 64 * 32
        assert counter.get_total_flops() // 2 - head == pytest.approx(macs(model, input_size=200) - routed, rel=0.02)


def test_presets_and_shares() -> None:
    model = llama(num_hidden_layers=12)
    assert [bool(removed) for removed in schedule_for(model, preset="safe")].index(True) == 8
    fast = schedule_for(model, preset="fast")
    assert fast == schedule_for(model, rate=0.5) and fast.index(max(fast)) < 6
    wrap(model, PyraConfig(keep={4: 0.5, 8: 0.25}))
    assert [*model.model.pyra_schedule] == [0, 0, 0, 0, 512, 0, 0, 0, 256, 0, 0, 0]  # type: ignore[union-attr]
    with pytest.raises(ScheduleError, match=r"at most 0\.\d+ .* asked for 0\.500; preset='fast' merges earlier"):
        wrap(model, PyraConfig(rate=0.5, preset="safe"))
    with pytest.raises(ScheduleError, match="layer 11 is the last one"):
        wrap(model, PyraConfig(keep={11: 0.5}))
    with pytest.raises(ScheduleError, match="keep names layer 12"):
        wrap(model, PyraConfig(keep={12: 0.5}))
    with pytest.raises(ScheduleError, match="keep grows at layer 6"):
        wrap(model, PyraConfig(keep={4: 0.5, 6: 0.7}))
    with pytest.raises(ConfigError, match=r"matching='local'.*option of image models"):
        wrap(model, PyraConfig(rate=0.5, matching="local"))


REFUSED_FORWARDS: list[tuple[str, Callable[[Any, Tensor], Any], str]] = [
    ("nothing is said", lambda m, t: m(t), r"prompt_mask=\[B, N\].*labels that are -100.*generate"),
    ("no label is masked", lambda m, t: m(t, labels=t), "no label is -100"),
    (
        "a label would merge",
        lambda m, t: m(t, labels=torch.where(prompt_mask(t, 60), -100, t), prompt_mask=prompt_mask(t)),
        "prompt_mask covers labels",
    ),
    ("a hole", lambda m, t: m(t, prompt_mask=torch.arange(80)[None] % 7 > 0), "one run of tokens a row"),
    ("a late prompt", lambda m, t: m(t, prompt_mask=torch.arange(80)[None] > 9), "from its first token on"),
    ("another length", lambda m, t: m(t, prompt_mask=prompt_mask(t)[:, 1:]), r"\[B, N\] = \[1, 80\], got \[1, 79\]"),
    ("no tensor", lambda m, t: m(t, prompt_mask=70), r"got int"),
    (
        "packed",
        lambda m, t: m(t, prompt_mask=prompt_mask(t), position_ids=torch.arange(80)[None] % 40),
        "position_ids begin anew",
    ),
    (
        "a mask of pairs",
        lambda m, t: m(t, prompt_mask=prompt_mask(t), attention_mask=torch.ones(1, 1, 80, 80)),
        r"attention mask \[B, N\], this one is \[1, 1, 80, 80\]",
    ),
    (
        "a mask of a prefix",
        lambda m, t: m(t, prompt_mask=prompt_mask(t), attention_mask=torch.ones(1, 90)),
        "of 90 tokens, the input of 80",
    ),
    ("a static cache", lambda m, t: m(t, past_key_values=static(m), logits_to_keep=1), "this is a StaticCache"),
    (
        "a cache as tuples",
        lambda m, t: m(t, past_key_values=((t, t),), logits_to_keep=1),
        "must be a Cache of transformers",
    ),
    ("static generation", lambda m, t: m.generate(t, cache_implementation="static"), "cache_implementation='static'"),
    ("quantised", lambda m, t: m.generate(t, cache_implementation="quantized"), "cache_implementation='quantized'"),
    ("no cache", lambda m, t: m.generate(t, use_cache=False), "use_cache=False: the prompt would merge anew"),
    ("chunks", lambda m, t: m.generate(t, prefill_chunk_size=8), "prefill_chunk_size=8: a prompt merges as a whole"),
    (
        "drafts",
        lambda m, t: m.generate(t, use_mtp=True),
        "use_mtp=True: the (model has no|layer that)",
    ),
]


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=100)


@pytest.mark.parametrize(("call", "said"), [one[1:] for one in REFUSED_FORWARDS], ids=[o[0] for o in REFUSED_FORWARDS])
@pytest.mark.parametrize("make", [llama, joy])
def test_what_cannot_merge_is_refused(make: Any, call: Any, said: str) -> None:
    model = wrap(make(), PyraConfig(rate=0.3))
    with torch.no_grad(), pytest.raises(ValueError, match=said):
        call(model, ids())


@torch.no_grad()
def test_a_prefix_read_elsewhere_is_refused_and_so_is_cropping_into_a_prompt() -> None:
    model, tokens = llama(), ids()
    prefix = model(tokens[:, :40], use_cache=True).past_key_values
    wrap(model, PyraConfig(rate=0.3))
    with pytest.raises(ConfigError, match="a shared prefix"):
        model(tokens[:, 40:], past_key_values=prefix, logits_to_keep=1)
    read = model(tokens, use_cache=True, prompt_mask=prompt_mask(tokens)).past_key_values
    read.crop(-10)
    assert read.layers[0].get_seq_length() == PROMPT
    with pytest.raises(ConfigError, match="reach into the prompt"):
        read.crop(-LAST)
    with pytest.raises(ConfigError, match="prompt_mask goes with an empty cache"):
        model(tokens[:, :3], past_key_values=read, prompt_mask=prompt_mask(tokens[:, :3]))


def test_a_cache_can_be_reset_repeated_and_selected() -> None:
    model, tokens = wrap(llama(), PyraConfig(rate=0.3, size_bias=True)), ids(batch=2)
    with torch.no_grad():
        read = model(tokens, use_cache=True, logits_to_keep=1).past_key_values
        expected = model(ids(1, 2), past_key_values=copy.deepcopy(read)).logits
        repeated = copy.deepcopy(read)
        repeated.batch_repeat_interleave(2)
        found = model(ids(1, 2).repeat_interleave(2, 0), past_key_values=repeated).logits
        assert torch.allclose(found, expected.repeat_interleave(2, 0), atol=1e-6)
        selected = copy.deepcopy(read)
        selected.batch_select_indices(torch.tensor([1]))
        assert torch.allclose(model(ids(1, 2)[1:], past_key_values=selected).logits, expected[1:], atol=1e-6)
        read.reset()
        assert all(layer.size is None for layer in read.layers if isinstance(layer, PromptLayer))
        again = model(tokens, past_key_values=read, logits_to_keep=1).past_key_values
        assert torch.allclose(model(ids(1, 2), past_key_values=again).logits, expected, atol=1e-6)


def test_prompts_that_are_too_short_stay_and_it_is_said() -> None:
    model, tokens = llama(), ids(FIRST + LAST)
    with torch.no_grad():
        stock = model(tokens).logits
        wrap(model, PyraConfig(rate=0.3, size_bias=True))
        with pytest.warns(UserWarning, match="at most 17 tokens stay as they are"):
            merged = model(tokens, prompt_mask=torch.ones_like(tokens, dtype=torch.bool)).logits
    assert torch.allclose(merged, stock, atol=1e-6)


def test_models_whose_tokens_have_no_place_to_go() -> None:
    sliding = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=16))
    with pytest.raises(UnsupportedModelError, match="slides over a window"):
        wrap(sliding, PyraConfig(rate=0.3))
    wrap(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)), PyraConfig(rate=0.3))
    with pytest.raises(UnsupportedModelError, match=r"GPT2\w+ cannot be merged"):
        wrap(GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50)), PyraConfig(rate=0.3))


def test_a_quantised_cache_given_by_hand_is_refused() -> None:
    model = wrap(llama(), PyraConfig(rate=0.3))
    try:
        cache = QuantizedCache("hqq", model.config)
    except ImportError:
        cache = DynamicCache(config=model.config)
        cache.layers[2] = type("OtherLayer", (PromptLayer,), {})()
    with torch.no_grad(), pytest.raises(ConfigError, match="DynamicCache of plain layers"):
        model(ids(), past_key_values=cache, logits_to_keep=1)


def test_exports_are_for_images(tmp_path: Any) -> None:
    with pytest.raises(ExportError, match="is for image models"):
        export_model(wrap(llama(), PyraConfig(rate=0.3)), tmp_path, "onnx", example_input=torch.rand(1, 3, 8, 8))
