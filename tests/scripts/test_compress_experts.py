"""``pyra compress-experts`` and ``pyra evaluate`` of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_language import mixture, write_sums

from pyra.scripts import pretrain_tiny_joyai, study_experts
from pyra.scripts.main import main


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRA_DATA", raising=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a mixture and small files of gsm8k."""
    folder = tmp_path_factory.mktemp("compress")
    mixture(folder / "tiny")
    write_sums(folder)
    return folder


def test_compressed_and_evaluated(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--backbone", str(place / "tiny"), "--data", str(place / "gsm8k"), "--device", "cpu"]
    asked = [*given, "--keep", "4", "--compare-active", "1", "--output", str(place / "pruned")]
    assert main(["compress-experts", *asked]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split()[:4] == ["model", "experts", "active", "parameters"]
    assert [line.split("  ")[0] for line in lines[2:5]] == ["original", "original, 1 active", "by reap, written"]
    assert "opened again as DeepseekV3ForCausalLM: logits differ by 0.0e+00 at most" in said
    assert "24 training examples of gsm8k" in said and f"next: pyra evaluate {place / 'pruned'}" in said

    assert main(["compress-experts", *asked]) == 2
    assert "already holds a compression: pass --overwrite" in capsys.readouterr().err
    assert main(["compress-experts", *asked, "--score", "frequency", "--overwrite"]) == 0
    capsys.readouterr()

    assert main(["evaluate", str(place / "pruned"), "--max-new-tokens", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "experts-frequency" in said and "nats a token" in said
    row = json.loads((place / "pruned" / "evaluation.json").read_text())
    assert (row["method"], row["num_test"], row["settings"]["experts"]) == ("experts-frequency", 6, 4)
    assert main(["results", str(place / "pruned"), "--evaluations"]) == 0
    assert "experts-frequency" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--kep", "0.5"], "unknown flag '--kep' (did you mean '--keep'"),
        (["--keep", "half"], "--keep: 'half' is not a number"),
        ([], "--backbone is missing"),
        (["--backbone", "nowhere"], "nowhere: no config.json there; give the folder of a checkpoint"),
        (["--backbone", "x", "--keep", "0", "--device", "tpu"], "--keep must be a share in (0, 1]"),
    ],
)
def test_wrong_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress-experts", *arguments]) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_a_file_gives_options_and_flags_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text("backbone: tiny\nkeep: 128\ncompare_active: [6, 4]\n")
    with pytest.raises(SystemExit) as left:
        main(["compress-experts", "--config", str(tmp_path / "c.yaml"), "--keep", "0.25", "--print-config"])
    shown = capsys.readouterr().out
    assert left.value.code == 0 and "keep: 0.25\n" in shown and "compare_active:\n- 6\n- 4\n" in shown


def test_flags_of_evaluate_that_do_not_go_with_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "made").mkdir()
    (place / "made" / "compression.json").write_text('{"kind": "experts"}')
    for flags, said in (
        (["--output", "x"], "--output goes with --backbone"),
        (["--rate", "0.5"], "is for runs on images"),
        (["--root", "a", "--data", "b"], "give --root or --data, not both"),
        ([], "is no record of a compression"),
    ):
        assert main(["evaluate", str(place / "made"), *flags]) == 2
        assert said in capsys.readouterr().err


def test_a_tiny_mixture_learns_and_is_studied(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--steps 60 --batch-size 4 --length 32 --hidden-size 32 --experts 4 --active 2 --layers 3 --vocabulary 300"
    folder = place / "learned"
    given = [*sizes.split(), "--root", str(place), "--output", str(folder)]
    assert pretrain_tiny_joyai.main(given) == 0
    training = json.loads((folder / "training.json").read_text())
    score = training["test"]["gsm8k"]
    assert score["model"] < score["unigram"] and len(training["losses"]) == 60
    with pytest.raises(ValueError, match="is there already"):
        pretrain_tiny_joyai.main(given)

    rows = place / "rows.json"
    asked = f"--backbone {folder} --root {place} --keep 0.5 --active 1 --draws 1 --device cpu --output {rows}"
    assert study_experts.main(asked.split()) == 0
    written = json.loads(rows.read_text())
    names = ["original", "1 active", "reap", "frequency", "reap, lowest", "first", "random 0"]
    assert [row["name"] for row in written["rows"]] == names
    assert written["rows"][2]["experts"] == 2 and written["rows"][1]["active"] == 1
    assert written["backbone_training"]["test"] == training["test"] and str(place) not in rows.read_text()
    assert "nats a token" in capsys.readouterr().out
