"""Command-line options generated from a dataclass: flags, a YAML file, help and errors.

Plain argparse, because ``transformers.HfArgumentParser`` and jsonargparse would each need an override for nearly every
behaviour here: flags with dashes only, typed YAML, all errors at once with suggestions, help without a slow import.

A field becomes ``--field-name``. Types: ``str``, ``int``, ``float``, ``bool`` (``--x`` / ``--no-x``), ``Path``,
``Literal``, ``list`` or ``tuple`` of these (a comma list), and ``X | None`` (``none`` is the value). Field metadata:
``help``, ``choices`` (the allowed values), ``metavar``, ``repeated`` (a positional list of several arguments, in which
commas separate nothing). A union with ``str`` is text.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from pyra.errors import ConfigError, did_you_mean

Options = TypeVar("Options")

_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def parse(
    options_class: type[Options],
    argv: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    example: str,
    positional: str | None = None,
    presets: Path | None = None,
) -> Options:
    """Return an ``options_class`` made of its defaults, then ``--config file.yaml``, then the flags in ``argv``.

    ``positional`` names the one field that is given without a flag, ``presets`` a folder of YAML files that
    ``--config`` takes by name. ``--help`` and ``--print-config`` print and exit with status 0.

    Raises:
        ConfigError: unknown flags or keys, values of the wrong type, missing values; all of them in one message.

    >>> @dataclasses.dataclass
    ... class Sizes:
    ...     image_size: int = 224
    >>> parse(Sizes, ["--image-size", "112"], prog="pyra sizes", description="", example="pyra sizes")
    Sizes(image_size=112)
    """
    fields = {field.name: field for field in _fields(options_class)}
    told = {"prog": prog, "description": description, "example": example}
    parser = _build(fields.values(), **told, positional=positional, presets=presets)
    given, rest = parser.parse_known_args(_normalise(sys.argv[1:] if argv is None else argv, fields.values()))
    flags = vars(given)
    if positional is not None and fields[positional].repeated:
        flags[positional] = flags.get(positional, []) + [token for token in rest if not token.startswith("-")]
        rest = [token for token in rest if token.startswith("-")]
        if not flags[positional]:
            del flags[positional]
    if rest:
        parser.error(_unknown(rest, fields))
    config, print_config = flags.pop("config", None), flags.pop("print_config", False)

    problems: list[str] = []
    values: dict[str, Any] = {}
    config = config and _preset(config, presets)
    raw = {name: (value, config) for name, value in _read_yaml(config, fields).items()} if config else {}
    raw |= {name: (value, None) for name, value in flags.items()}
    for name, (value, source) in raw.items():
        try:
            values[name] = fields[name].convert(value)
        except ValueError as error:
            label = name if source or name == positional else _flag(name)
            problems.append(f"{f'{source}: ' if source else ''}{label}: {error}")
    for field in fields.values():
        if field.default is dataclasses.MISSING and field.name not in raw:
            problems.append(f"{field.name.upper() if field.name == positional else _flag(field.name)} is missing")
    if problems:
        parser.error("; ".join(problems))
    for name, value in values.items():
        if isinstance(value, str) and not _is_text(value):
            parser.error(f"{_flag(name)} {value!a} is not UTF-8: give another name")
    options = options_class(**values)
    if print_config:
        print(to_yaml(options), end="")
        raise SystemExit(0)
    return options


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def peek(argv: Sequence[str] | None, name: str) -> str | None:
    """Return what ``argv``, or the ``--config`` file in it, gives for one option, before anything else is parsed.

    For verbs whose options depend on it; what is wrong with the rest is told when that is parsed.

    >>> peek(["--task", "sst2", "--epochs", "3"], "task")
    'sst2'
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(_flag(name), dest="value")
    parser.add_argument("--config")
    try:
        given, _ = parser.parse_known_args(list(sys.argv[1:] if argv is None else argv))
    except argparse.ArgumentError:
        return None
    if given.value is not None or given.config is None:
        return None if given.value is None else str(given.value)
    import yaml

    try:
        content = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    value = content.get(name) if isinstance(content, dict) else None
    return None if value is None else str(value)


def listed(names: Mapping[str, str]) -> str:
    """Return names and what they are as lines of a help text."""
    return "\n".join(f"  {name:<17}{text}".rstrip() for name, text in names.items())


def to_yaml(options: Any) -> str:
    r"""Return the options as YAML that ``--config`` reads back.

    >>> @dataclasses.dataclass
    ... class Sizes:
    ...     image_size: int = 224
    >>> to_yaml(Sizes())
    'image_size: 224\n'
    """
    import yaml

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    values = {field.name: plain(getattr(options, field.name)) for field in dataclasses.fields(options) if field.init}
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=False)


@dataclasses.dataclass(frozen=True)
class _Field:
    """One option: its name, element type, default, help text and allowed values."""

    name: str
    kind: type
    default: Any
    help: str
    choices: tuple[Any, ...]
    metavar: str | None
    container: type | None
    optional: bool
    repeated: bool = False

    def convert(self, value: Any) -> Any:
        """Turn flag text or a YAML value into the field's value; ``ValueError`` says what was expected."""
        nothing = isinstance(value, str) and value.lower() == "none" and value not in self.choices
        if self.optional and (value is None or nothing):
            return None
        if self.container is None and self.kind is str and isinstance(value, list):
            return ",".join(str(item) for item in value)
        if self.container is None:
            return self._convert_one(value)
        items = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        items = items if isinstance(items, list) else [items]
        return self.container(self._convert_one(item) for item in items)

    def _convert_one(self, value: Any) -> Any:
        if value is None or isinstance(value, (dict, list)) or (isinstance(value, bool) and self.kind is not bool):
            raise ValueError(f"{value!r} is not {_EXPECTED[self.kind]}")
        if self.kind is bool:
            result: Any = _boolean(str(value))
        else:
            try:
                result = self.kind(str(value))
            except ValueError:
                raise ValueError(f"{str(value)!r} is not {_EXPECTED[self.kind]}") from None
        if self.choices and result not in self.choices:
            allowed = [str(choice) for choice in self.choices]
            raise ValueError(f"{result!r} is not one of {', '.join(allowed)}{did_you_mean(str(result), allowed)}")
        return result


_EXPECTED: dict[type, str] = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
}


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise ValueError(f"{text!r} is not true or false")
    return text.lower() in _TRUE


def _fields(options_class: type) -> list[_Field]:
    hints = typing.get_type_hints(options_class)
    return [_field(field, hints[field.name]) for field in dataclasses.fields(options_class) if field.init]


def _field(field: dataclasses.Field[Any], hint: Any) -> _Field:
    optional = typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        if str in members:  # text that the options take apart themselves
            members = [str]
        hint = members[0] if len(members) == 1 else hint
    container = typing.get_origin(hint) if typing.get_origin(hint) in (list, tuple) else None
    if container:
        hint = typing.get_args(hint)[0]
    choices = tuple(field.metadata.get("choices", ()))
    if typing.get_origin(hint) is Literal:
        choices = choices or typing.get_args(hint)
        hint = type(choices[0])
    if hint not in _EXPECTED:
        raise TypeError(
            f"field {field.name!r} has type {hint!r}; allowed are str, int, float, bool, Path and lists of them"
        )
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    return _Field(
        field.name,
        hint,
        default,
        field.metadata.get("help", ""),
        choices,
        field.metadata.get("metavar"),
        container,
        optional,
        field.metadata.get("repeated", False),
    )


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are exceptions instead of a usage wall."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message.removeprefix('argument ')} (see '{self.prog} --help')")


def _build(
    fields: typing.Iterable[_Field],
    *,
    prog: str,
    description: str,
    example: str,
    positional: str | None,
    presets: Path | None,
) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for field in fields:
        text = _help(field)
        metavar = field.metavar or ("{" + ",".join(map(str, field.choices)) + "}" if field.choices else None)
        metavar = f"{metavar}[,...]" if metavar and field.container and not field.repeated else metavar
        if field.name == positional:
            several = "*" if field.repeated else "?"
            parser.add_argument(field.name, nargs=several, metavar=metavar or field.name.upper(), help=text)
        elif field.kind is bool and not field.container:
            parser.add_argument(_flag(field.name), action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(_flag(field.name), metavar=metavar, help=text)
    read = "read options from a YAML file" + (" or a preset by name" if presets else "")
    parser.add_argument("--config", metavar="FILE", help=f"{read}; flags win over it")
    parser.add_argument("--print-config", action="store_true", help="print the resulting options as YAML and exit")
    return parser


def _help(field: _Field) -> str:
    if field.default is dataclasses.MISSING:
        note = "required"
    elif field.default is None or field.default == "" or field.default == []:
        note = ""
    else:
        value = ",".join(map(str, field.default)) if field.container else field.default
        note = f"default: {str(value).lower() if isinstance(value, bool) else value}"
    return f"{field.help}{f' ({note})' if note else ''}".strip().replace("%", "%%")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _normalise(argv: Sequence[str], fields: typing.Iterable[_Field]) -> list[str]:
    """Write ``--image_size`` as ``--image-size`` and join ``--schedule -1,2``, which argparse takes for two flags."""
    takes_value = {_flag(field.name) for field in fields if field.kind is not bool}
    result: list[str] = []
    for token in argv:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            token = name.replace("_", "-") + equals + value
        elif token[:1] == "-" and token[1:2].isdigit() and result and result[-1] in takes_value:
            token = f"{result.pop()}={token}"
        result.append(token)
    return result


def _unknown(rest: Sequence[str], fields: typing.Iterable[str]) -> str:
    """Return the message for what argparse could not place; stray values are not listed beside unknown flags."""
    known = [*map(_flag, fields), "--config", "--print-config", "--help"]
    names = [token.partition("=")[0] for token in rest if token.startswith("-")]
    if places := [name for name in names if name in known]:  # a flag in configuration files alone
        return f"{places[0]} is no flag here: give its value by itself"
    if names:
        listed = ", ".join(f"{name!r}{did_you_mean(name, known)}" for name in names)
        return f"unknown flag{'s' if len(names) > 1 else ''} {listed}"
    return f"unexpected argument{'s' if len(rest) > 1 else ''} {', '.join(map(repr, rest))}"


def _preset(config: str, presets: Path | None) -> str:
    """Return the file of a preset, or the file that was given: what lies in the folder comes first."""
    if presets is None or Path(config).name != config or Path(config).is_file():
        return config
    shipped = {file.stem: str(file) for file in sorted(presets.glob("*.yaml"))}
    if config not in shipped and not Path(config).suffix:
        raise ConfigError(
            f"--config {config} is no file and no preset{did_you_mean(config, shipped)}; presets: {', '.join(shipped)}"
        )
    return shipped.get(config, config)


def _read_yaml(file: str, fields: typing.Iterable[str]) -> dict[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read --config {file}: {getattr(error, 'strerror', None) or error}") from error
    except RecursionError:
        raise ConfigError(f"--config {file} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a date or a number that is none
        raise ConfigError(f"--config {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {file} must hold 'key: value' lines, not a {type(content).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in content.items()}
    known = list(fields)
    unknown = [f"{key!r}{did_you_mean(key, known)}" for key in values if key not in known]
    if unknown:
        raise ConfigError(f"unknown key{'s' if len(unknown) > 1 else ''} in {file}: {', '.join(unknown)}")
    return values
