"""The model card, and what is pushed to the hub: the upload is replaced at the edge."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import peft
import pytest
import timm
import torch
from backbone_families import build, config, images, result, run
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from torch import nn

from pyra import PyraConfig
from pyra.adapters import BottleneckConfig, CardInfo, adapt, load_adapter, push_adapter, save_adapter
from pyra.errors import CheckpointError, ConfigError, OutputError


def lora(**options: Any) -> nn.Module:
    return adapt(build("timm-vit"), pyra=config(**options), peft=peft.LoraConfig(r=2))


def test_front_matter_and_table(tmp_path: Path) -> None:
    save_adapter(lora(), tmp_path, CardInfo(task="eurosat", metric="accuracy", value=0.875))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.base_model == "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    assert card.data.tags == ["pyra", "token-merging", "lora"]
    (measured,) = card.data.eval_results
    assert (measured.task_type, measured.dataset_name) == ("image-classification", "eurosat")
    assert (measured.metric_type, measured.metric_value) == ("accuracy", 0.875)
    text = card.text
    assert "| method | LORA |" in text
    assert "tokens removed in each block: [0, 8, 5]" in text
    assert "re-activated, bipartite; " in text
    assert "| accuracy | 0.875 |" in text
    assert "from pyra.adapters import load_adapter" in text


@pytest.mark.parametrize(
    ("make", "method", "tags"),
    [
        (lambda: adapt(build("timm-vit")), "none (head alone)", ["pyra"]),
        (
            lambda: adapt(build("timm-vit"), pyra=config()),
            "none (head and re-activation weights alone)",
            ["pyra", "token-merging"],
        ),
        (lambda: adapt(build("hf-vit"), peft=BottleneckConfig(width=2)), "BOTTLENECK", ["pyra", "bottleneck"]),
        (lambda: adapt(build("timm-vit"), peft=peft.IA3Config()), "IA3", ["pyra", "ia3"]),
    ],
)
def test_other_methods(make: Any, method: str, tags: list[str], tmp_path: Path) -> None:
    save_adapter(make(), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == tags
    assert f"| method | {method} |" in card.text
    assert card.data.eval_results is None
    assert ("| merging | none |" in card.text) == ("token-merging" not in tags)


def test_the_backbone_is_named_and_paths_of_this_machine_are_not(tmp_path: Path) -> None:
    def card(model: nn.Module, **info: Any) -> ModelCard:
        save_adapter(model, tmp_path / "adapter", CardInfo(**info))
        return ModelCard.load(tmp_path / "adapter" / "README.md")

    model = adapt(build("hf-vit"), peft=peft.LoraConfig(r=2))
    assert card(model).data.base_model is None
    assert "| backbone | not recorded |" in card(model).text
    model.get_base_model().config._name_or_path = "google/vit-base-patch16-224"
    assert card(model).data.base_model == "google/vit-base-patch16-224"
    model.get_base_model().config._name_or_path = str(tmp_path)
    assert card(model).data.base_model is None
    assert str(tmp_path) not in (tmp_path / "adapter" / "README.md").read_text()
    assert card(model, base_model="me/mine").data.base_model == "me/mine"
    tagless = timm.create_model("test_vit", pretrained=False, num_classes=3)
    assert card(adapt(tagless)).data.base_model == "timm/test_vit.r160_in1k"


def test_a_card_that_somebody_wrote_stays_and_ours_is_renewed(tmp_path: Path) -> None:
    save_adapter(adapt(build("timm-vit"), peft=peft.LoraConfig(r=2)), tmp_path)
    save_adapter(adapt(build("timm-vit"), peft=peft.IA3Config()), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "IA3" in card
    assert "LORA" not in card
    (tmp_path / "README.md").write_text("mine: " + card.replace("<!-- pyra writes", "<!-- once pyra wrote"))
    save_adapter(adapt(build("timm-vit"), peft=peft.LoraConfig(r=2)), tmp_path)
    assert (tmp_path / "README.md").read_text().startswith("mine: ")


@pytest.mark.parametrize(
    "wrong",
    [
        {"metric": "accuracy", "value": 1.0},
        {"task": "x", "metric": "accuracy"},
        {"task": "x", "value": 1.0},
        {"task": "x", "metric": "accuracy", "value": float("nan")},
        {"task": "x", "metric": "accuracy", "value": "0.5"},
    ],
)
def test_results_come_whole(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="CardInfo"):
        CardInfo(**wrong)


class Hub:
    """Stands in for the hub: keeps what was uploaded, and the card that lies there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, card: Path | None = None) -> None:
        self.created: list[tuple[str, Any]] = []
        self.calls: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.card = card
        monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **k: self.create(name, **k))
        monkeypatch.setattr(HfApi, "upload_folder", lambda _, **k: self.upload(**k))
        monkeypatch.setattr(HfApi, "hf_hub_download", lambda _, repo, name, **k: self.download(name))

    def create(self, name: str, *, private: bool | None, exist_ok: bool) -> Any:
        assert exist_ok
        self.created.append((name, private))
        return SimpleNamespace(repo_id=name)

    def upload(self, *, folder_path: str, **call: Any) -> Any:
        self.calls.append(call)
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def download(self, name: str) -> str:
        assert name == "README.md"
        if self.card is None:
            raise RemoteEntryNotFoundError("no such file", response=MagicMock())
        return str(self.card)


def test_the_hub_gets_the_files_of_save_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model, info = Hub(monkeypatch), lora(), CardInfo(task="eurosat")
    url = push_adapter(model, "me/mine", card=info, private=True, revision="dev", commit_message="First")
    assert url == "https://hub/commit/1"
    assert hub.created == [("me/mine", True)]
    (call,) = hub.calls
    assert (call["repo_id"], call["revision"], call["commit_message"]) == ("me/mine", "dev", "First")
    save_adapter(model, tmp_path / "saved", info)
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert set(hub.files) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "pyra_config.json"}
    assert call["delete_patterns"] == []

    (tmp_path / "pulled").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "pulled" / name).write_bytes(content)
    with torch.no_grad():
        expected = result(run(model.eval(), images()))
        pulled = result(run(load_adapter(build("timm-vit"), tmp_path / "pulled"), images()))
    torch.testing.assert_close(pulled, expected)


def test_what_an_older_adapter_left_on_the_hub_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    push_adapter(adapt(build("timm-vit")), "me/mine")
    assert set(hub.files) == {"README.md", "adapter_model.safetensors"}
    assert hub.calls[0]["delete_patterns"] == ["adapter_config.json", "pyra_config.json"]


def test_a_card_on_the_hub_that_somebody_wrote_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("mine")
    hub = Hub(monkeypatch, card=tmp_path / "README.md")
    push_adapter(lora(), "me/mine")
    assert "README.md" not in hub.files
    save_adapter(lora(), tmp_path / "ours")
    hub = Hub(monkeypatch, card=tmp_path / "ours" / "README.md")
    push_adapter(lora(), "me/mine")
    assert "README.md" in hub.files


def test_refusals_of_the_hub_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)

    def refuse(*_: Any, **__: Any) -> Any:
        raise HfHubHTTPError("403 Forbidden: you may not write to me/mine", response=MagicMock())

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(OutputError, match=r"me/mine was not written: 403 Forbidden.*hf auth login"):
        push_adapter(lora(), "me/mine")
    assert not hub.calls

    hub = Hub(monkeypatch)

    def unreachable(*_: Any, **__: Any) -> Any:
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(HfApi, "hf_hub_download", unreachable)
    with pytest.raises(OutputError, match="cannot reach the hub"):
        push_adapter(lora(), "me/mine")
    assert not hub.calls


def test_nothing_is_sent_where_saving_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, model = Hub(monkeypatch), lora()
    model.get_base_model().norm.requires_grad_(True)
    with pytest.raises(ConfigError, match="PEFT does not save them"):
        push_adapter(model, "me/mine")
    assert (hub.created, hub.calls) == ([], [])


def test_a_rate_is_told_as_the_macs_it_saves(tmp_path: Path) -> None:
    save_adapter(adapt(build("timm-vit"), pyra=PyraConfig(rate=0.4)), tmp_path)
    card = (tmp_path / "README.md").read_text()
    share = float(card.partition("% fewer MACs")[0].rpartition(" ")[2])
    assert 40 <= share < 42


def test_push_to_hub_is_that_of_peft_and_says_what_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, pushed = lora(), tmp_path / "pushed"

    def upload(_: Any, folder: str, repo_id: str, **call: Any) -> str:
        assert repo_id == "me/mine" and call["commit_message"] == "First"
        shutil.copytree(folder, pushed)
        return "https://hub/commit/1"

    monkeypatch.setattr(HfApi, "create_repo", lambda _, name, **k: SimpleNamespace(repo_id=name))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: ModelCard("# mine"))
    monkeypatch.setattr(peft.PeftModel, "_upload_modified_files", upload)
    assert model.push_to_hub("me/mine", commit_message="First") == "https://hub/commit/1"
    save_adapter(model, tmp_path / "saved")
    for name in ("adapter_config.json", "adapter_model.safetensors", "pyra_config.json"):
        assert (pushed / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_an_adapter_comes_from_the_hub_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora()
    save_adapter(model, tmp_path / "hub")

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (name, revision) == ("me/mine", "dev")
        assert all(pattern.endswith((".safetensors", ".json")) for pattern in allow_patterns)
        return str(tmp_path / "hub")

    monkeypatch.setattr("pyra.adapters.fetching.snapshot_download", fetch)
    with torch.no_grad():
        expected = result(run(model.eval(), images()))
        loaded = result(run(load_adapter(build("timm-vit"), "me/mine", revision="dev"), images()))
    torch.testing.assert_close(loaded, expected)


def test_a_name_that_the_hub_does_not_know_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise HfHubHTTPError("401 Client Error: Repository Not Found", response=MagicMock())

    monkeypatch.setattr("pyra.adapters.fetching.snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"me/mine is no folder here.*Repository Not Found"):
        load_adapter(build("timm-vit"), "me/mine")
    with pytest.raises(CheckpointError, match=r"no adapter_model.safetensors there"):
        load_adapter(build("timm-vit"), "./me/mine")
