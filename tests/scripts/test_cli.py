"""Options from a dataclass, flags and YAML; the verbs table; errors without a traceback."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from pyra.errors import ConfigError, DataError
from pyra.scripts import cli
from pyra.scripts.main import VERBS, main


@dataclass
class Options:
    """One field of every supported type."""

    run: Path | None = field(default=None, metadata={"help": "the run folder"})
    image_size: int = field(default=224, metadata={"help": "side of the input, 100 % of it"})
    lr: float = 1e-3
    rate: str = field(default="0", metadata={"help": "one rate or a comma list"})
    method: str = field(default="pyra", metadata={"choices": ["linear", "lora", "pyra"]})
    protocol: Literal["validation", "published"] = "validation"
    schedule: list[int] | None = None
    seeds: list[int] = field(default_factory=lambda: [0])
    overwrite: bool = False
    device: str | None = None


@dataclass
class Required:
    """A field without a default."""

    run: str
    format: str = "hf"


def parse(*argv: str, options: type[Any] = Options, positional: str | None = "run") -> Any:
    return cli.parse(
        options, argv, prog="pyra try", description="Try it.", example="pyra try runs/a", positional=positional
    )


def error_of(*argv: str, **kwargs: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(*argv, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_nothing_given_is_the_defaults() -> None:
    assert parse() == Options()


def test_every_type_from_flags() -> None:
    flags = "--image-size 112 --lr 1e-4 --rate 0.3,0.7 --method lora --protocol published --seeds 1,2 --overwrite"
    assert parse("runs/a", *flags.split(), "--device", "cpu", "--schedule", "8,8") == Options(
        run=Path("runs/a"),
        image_size=112,
        lr=1e-4,
        rate="0.3,0.7",
        method="lora",
        protocol="published",
        schedule=[8, 8],
        seeds=[1, 2],
        overwrite=True,
        device="cpu",
    )


@pytest.mark.parametrize("argv", [("--image_size", "96"), ("--image_size=96",), ("--image-size=96",)])
def test_underscores_are_accepted(argv: tuple[str, ...]) -> None:
    assert parse(*argv).image_size == 96


@pytest.mark.parametrize("argv", [("runs/a", "--overwrite"), ("--overwrite", "runs/a"), ("--lr", "1", "runs/a")])
def test_the_positional_stands_anywhere(argv: tuple[str, ...]) -> None:
    assert parse(*argv).run == Path("runs/a")


def test_negative_values_are_values() -> None:
    options = parse("--schedule", "-1,2", "--lr", "-1e-3", "--rate", "-0.5")
    assert (options.schedule, options.lr, options.rate) == ([-1, 2], -1e-3, "-0.5")


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "image-size: 96\nlr: 1e-4\nrate: [0.3, 0.7]\nseeds: [1, 2]\noverwrite: true\ndevice: null\nrun: b\n"
    )
    options = parse("a", "--config", str(file), "--image-size", "64", "--no-overwrite")
    assert options == Options(run=Path("a"), image_size=64, lr=1e-4, rate="0.3,0.7", seeds=[1, 2])


def test_print_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("runs/a", "--rate", "0.3,0.7", "--schedule", "1,2", "--overwrite", "--lr", "1e-5")
    with pytest.raises(SystemExit) as caught:
        parse(*argv, "--print-config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["schedule"] == [1, 2]
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert parse("--config", str(file)) == parse(*argv) != Options()


def test_none_undoes_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("schedule: 1,2\n")
    assert parse("--config", str(file)).schedule == [1, 2]
    assert parse("--config", str(file), "--schedule", "none").schedule is None


def test_unknown_flags_come_together_with_suggestions() -> None:
    message = error_of("--image-sise", "1", "--metod=lora")
    assert (
        "unknown flags '--image-sise' (did you mean '--image-size'?), '--metod' (did you mean '--method'?)" in message
    )
    assert "pyra try --help" in message


def test_a_positional_written_as_a_flag_is_told_apart() -> None:
    assert "--run is no flag here: give its value by itself" in error_of("--run", "runs/a")


def test_abbreviations_are_not_guessed() -> None:
    assert "unknown flag '--over'" in error_of("--over")


def test_unknown_keys_come_together_with_suggestions(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("image_sise: 1\nxyzzy: 2\nlr: 1\n")
    message = error_of("--config", str(file))
    assert "'image_sise' (did you mean 'image_size'?)" in message
    assert "'xyzzy'" in message and "'lr'" not in message


def test_wrong_values_come_together(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("overwrite: perhaps\nseeds: [1, x]\nrate: {a: 1}\nimage_size: 2.5\n")
    message = error_of("--config", str(file), "--method", "lorra", "--lr", "fast")
    assert "overwrite: 'perhaps' is not true or false" in message
    assert "seeds: 'x' is not a whole number" in message
    assert "rate: {'a': 1} is not text" in message
    assert "image_size: '2.5' is not a whole number" in message
    assert "--lr: 'fast' is not a number" in message
    assert "--method: 'lorra' is not one of linear, lora, pyra (did you mean 'lora'?)" in message
    assert str(file) in message


def test_choices_hold_for_the_file_and_for_literals(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("protocol: publised\n")
    assert "'publised' is not one of validation, published (did you mean 'published'?)" in error_of(
        "--config", str(file)
    )


def test_missing_values() -> None:
    assert "--lr: expected one argument" in error_of("--lr")
    assert "RUN is missing" in error_of("--format", "hf", options=Required)
    assert "--run is missing" in error_of(options=Required, positional=None)


def test_stray_arguments() -> None:
    assert "unexpected argument 'runs/b'" in error_of("runs/a", "runs/b")


@pytest.mark.parametrize(
    ("text", "message"), [("- 1\n", "not a list"), ("a: [\n", "not valid YAML"), (None, "No such file")]
)
def test_unusable_files(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    assert message in error_of("--config", str(file))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("# nothing yet\n")
    assert parse("--config", str(tmp_path / "run.yaml")) == Options()


def test_help_shows_dashes_defaults_choices_and_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "--image-size" in text and "--image_size" not in text
    assert "100 % of it (default: 224)" in " ".join(text.split())
    assert "{linear,lora,pyra}" in text
    assert "example:\n  pyra try runs/a" in text


def test_an_unsupported_type_is_the_developers_error() -> None:
    @dataclass
    class Nested:
        inner: dict[str, int] = field(default_factory=dict)

    with pytest.raises(TypeError, match="'inner'"):
        parse(options=Nested, positional=None)


def test_main_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in VERBS)
    assert "Traceback" not in text


def test_main_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("pyra 0.")


def test_main_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pyra: error: unknown verb 'trian' (did you mean 'train'?)")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (DataError("no such task 'x'"), 2, "pyra: error: no such task 'x'\n"),
        (KeyboardInterrupt(), 130, "pyra: interrupted\n"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "pyra: error: cannot use /a/b: Permission denied\n"),
        (
            OSError(28, "No space left", "/a/b"),
            2,
            "pyra: error: cannot write /a/b: No space left; free some space there, or choose another --output\n",
        ),
    ],
)
def test_main_turns_errors_into_a_line_and_a_status(
    raised: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: list[str]) -> int:
        raise raised

    module = types.ModuleType("pyra.scripts.failing")
    monkeypatch.setattr(module, "main", fail, raising=False)
    monkeypatch.setitem(sys.modules, "pyra.scripts.failing", module)
    monkeypatch.setitem(VERBS, "fail", ("pyra.scripts.failing", "fails"))
    assert main(["fail"]) == status
    assert capsys.readouterr().err == message


def test_one_of_several_processes_leaves_the_telling_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(_: float) -> None:  # as a launcher ends it
        raise SystemExit(143)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("pyra.scripts.main.time.sleep", ended)
    with pytest.raises(SystemExit):
        main(["tasks", "validate", "nosuch"])
    assert capsys.readouterr().err == ""


def test_main_keeps_the_traceback_of_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pyra.scripts.failing")
    monkeypatch.setattr(module, "main", lambda argv: 1 / 0, raising=False)
    monkeypatch.setitem(sys.modules, "pyra.scripts.failing", module)
    monkeypatch.setitem(VERBS, "fail", ("pyra.scripts.failing", "fails"))
    with pytest.raises(ZeroDivisionError):
        main(["fail"])


def test_env_reports_versions(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {"python", "pyra-adapt", "torch", "timm", "transformers", "peft", "platform", "cpus", "cuda"} <= facts.keys()
    assert facts["torch"] is not None
    assert main(["env"]) == 0
    assert "torch" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_a_run_must_be_named(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    assert "RUN is missing" in capsys.readouterr().err
