"""``save_pretrained`` of an adapted model: PEFT's files, and what merges beside them."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from backbone_families import build, config, images, result, run
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from pyra import PyraConfig, unwrap, wrap
from pyra.adapters import adapt, add_adapter, load_adapter, save_adapter, switch_adapter
from pyra.errors import CheckpointError


def values(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return result(run(model.eval(), images()))


def lora(**options: Any) -> Any:
    torch.manual_seed(1)
    model = adapt(build("timm-vit"), pyra=config(), peft=peft.LoraConfig(r=2, init_lora_weights=False, **options))
    for name, parameter in model.named_parameters():
        if name.endswith("default.channel_weight"):
            nn.init.normal_(parameter)
    return model


def test_it_is_a_peft_model_and_its_files_load(tmp_path: Path) -> None:
    model = lora()
    assert isinstance(model, peft.PeftModel) and type(model).__name__ == "PeftModel"
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(values(load_adapter(build("timm-vit"), tmp_path)), values(model))
    save_adapter(model, tmp_path / "ours")
    assert (tmp_path / "pyra_config.json").read_bytes() == (tmp_path / "ours" / "pyra_config.json").read_bytes()


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_it_too(twin: Any, tmp_path: Path) -> None:
    model = lora()
    other = twin(model)
    other.save_pretrained(str(tmp_path))
    torch.testing.assert_close(values(load_adapter(build("timm-vit"), tmp_path)), values(model))
    model.set_rate(0.1)
    assert json.loads((tmp_path / "pyra_config.json").read_text())["rate"] == other.pyra_config.rate


def test_a_loaded_model_and_one_that_merges_later_save_it(tmp_path: Path) -> None:
    save_adapter(lora(), tmp_path / "a")
    load_adapter(build("timm-vit"), tmp_path / "a").save_pretrained(str(tmp_path / "b"))
    assert (tmp_path / "b" / "pyra_config.json").read_bytes() == (tmp_path / "a" / "pyra_config.json").read_bytes()
    later = adapt(peft.get_peft_model(build("timm-vit"), peft.LoraConfig(r=2, target_modules=["qkv"])), pyra=config())
    later.save_pretrained(str(tmp_path / "c"))
    assert (tmp_path / "c" / "pyra_config.json").is_file()


def test_an_earlier_saving_of_the_other_kind_goes(tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(str(tmp_path))
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is pickled, which is never read"):
        load_adapter(build("timm-vit"), tmp_path)
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "adapter_model.bin").exists()
    torch.testing.assert_close(values(load_adapter(build("timm-vit"), tmp_path)), values(model))


def test_what_no_longer_merges_says_so(tmp_path: Path) -> None:
    model = lora()
    model.save_pretrained(str(tmp_path))
    unwrap(model)
    model.save_pretrained(str(tmp_path))
    assert not (tmp_path / "pyra_config.json").exists()
    model = adapt(build("timm-vit"), peft=peft.LoraConfig(r=2))
    assert type(model) is peft.PeftModel, "what does not merge is PEFT's own"


def test_each_of_several_adapters_says_what_merges_with_it(tmp_path: Path) -> None:
    for name, rate in (("slow", 0.1), ("fast", 0.3)):
        pyra = PyraConfig(rate=rate)
        save_adapter(adapt(build("timm-vit"), pyra=pyra, peft=peft.LoraConfig(r=2)), tmp_path / name)
    save_adapter(adapt(build("timm-vit"), peft=peft.LoraConfig(r=2)), tmp_path / "still")
    model = load_adapter(build("timm-vit"), tmp_path / "slow")
    add_adapter(model, tmp_path / "fast", "fast")
    add_adapter(model, tmp_path / "still", "still")
    switch_adapter(model, "still")
    model.save_pretrained(str(tmp_path / "all"))
    assert json.loads((tmp_path / "all" / "pyra_config.json").read_text())["rate"] == 0.1
    assert json.loads((tmp_path / "all" / "fast" / "pyra_config.json").read_text())["rate"] == 0.3
    assert json.loads((tmp_path / "all" / "still" / "pyra_config.json").read_text())["rate"] == 0.0
    for name in ("slow", "fast", "still"):
        folder = tmp_path / "all" / ("" if name == "slow" else name)
        switch_adapter(model, "default" if name == "slow" else name)
        torch.testing.assert_close(values(load_adapter(build("timm-vit"), folder)), values(model))


def test_a_checkpoint_of_the_trainer_loads(tmp_path: Path) -> None:
    class Classifier(Trainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            logits = result(run(model, {"pixel_values": inputs["pixel_values"]}))
            return nn.functional.cross_entropy(logits, inputs["labels"])

    pixels = images()["pixel_values"]
    data = [{"pixel_values": pixels[i % len(pixels)], "labels": i % 3} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        save_steps=2,
        learning_rate=0.01,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    trainer = Classifier(model=lora(), args=arguments, train_dataset=data)
    trainer.train()
    loaded = load_adapter(build("timm-vit"), tmp_path / "checkpoint-2")
    torch.testing.assert_close(values(loaded), values(trainer.model))


def test_merging_on_a_stock_peft_model_is_saved_by_save_adapter(tmp_path: Path) -> None:
    model = peft.get_peft_model(build("timm-vit"), peft.LoraConfig(r=2, target_modules=["qkv"]))
    wrap(model, config())
    save_adapter(model, tmp_path)
    assert (tmp_path / "pyra_config.json").is_file()
