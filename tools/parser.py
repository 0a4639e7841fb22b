"""LightningCLI's parser with errors of one sentence instead of a list of failed subtypes."""

import ast
import difflib
import re
from dataclasses import fields
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from ..core.config import BackboneConfig
from .errors import UserError


class ConfigError(UserError):
    """A wrong key or value of a configuration or on the command line."""

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key} {problem}".strip())
        self.key, self.problem = key, problem


class Parser(LightningArgumentParser):
    """A parser that raises `ConfigError` where argparse would print its usage and exit."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # An abbreviation would accept a misspelt option.
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message made readable; an error inside a class gets the key of the class in front."""
        inner = _cause(ex)
        if inner is None:
            raise readable(message, self._options()) from ex
        keys = re.findall(r'Parser key "([^"]+)"', message)
        if not keys or not inner.key:
            raise inner from ex
        raise ConfigError(f"{keys[0]}.init_args.{inner.key}", inner.problem) from ex

    def _options(self) -> set[str]:
        known = {action.dest for action in self._actions}
        for action in self._actions:
            for parser in action.choices.values() if isinstance(action.choices, dict) else ():
                known |= {action.dest for action in parser._actions}
        return {name for name in known if name.rpartition(".")[2] not in ("help", "config", "print_config")}


def _cause(error: BaseException | None) -> ConfigError | None:
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def readable(message: str, options: set[str]) -> ConfigError:
    """Say in one sentence which key is wrong, what was given and what is accepted.

    Args:
        options: the names that the parser knows, among which a misspelt one looks for its neighbour.
    """
    for rule in (_missing, _unknown_option, _bad_class, _bad_value):
        found = rule(message, options)
        if found is not None:
            return ConfigError(*found)
    return ConfigError("", re.sub(r"\s+", " ", message).strip())


def _missing(message: str, _: set[str]) -> tuple[str, str] | None:
    match = re.search(r"the following arguments are required: (.*)", message)
    if match is None:
        return None
    names = [name.split(".", 1)[-1] for name in match[1].split(", ")]
    return "", f"no {' and no '.join(names)} given: name a configuration with -c (`mainstem info` lists them)"


def _unknown_option(message: str, options: set[str]) -> tuple[str, str] | None:
    for pattern in (
        r"Group '(?P<group>[^']+)' does not accept option '(?P<name>[^']+)'",
        r"Option '(?P<name>[^']+)' is not accepted",
        r"Subcommand '[^']+' does not accept option '(?P<name>[^']+)'",
        r"unrecognized arguments: (?P<name>.+)",
    ):
        match = re.search(pattern, message)
        if match is not None:
            group = match.groupdict().get("group")
            name = match["name"].removeprefix("--").partition("=")[0]
            name = f"{group}.{name}" if group else name
            return name, f"is unknown{_did_you_mean(name, options)}"
    return None


def _did_you_mean(name: str, options: set[str]) -> str:
    group, _, last = name.rpartition(".")
    known = {option.rpartition(".")[2] for option in options if option.rpartition(".")[0] == group}
    if group.rpartition(".")[2] == "backbone":
        known = {field.name for field in fields(BackboneConfig)}
    near = difflib.get_close_matches(last, known, n=1)
    if near:
        return f": did you mean {near[0]!r}?"
    return f": choose one of {', '.join(sorted(known))}" if known else ""


def _bad_class(message: str, _: set[str]) -> tuple[str, str] | None:
    key = re.findall(r'Parser key "([^"]+)"', message)
    problem = re.search(r"Problem with given class_path '([^']+)':\s*(.+)", message)
    if key and problem is not None:
        return f"{key[-1]}.class_path", f"= {problem[1]!r}: {problem[2]}"
    name = re.search(r"Expected a dot import path string: (\S+)", message)
    if key and name is not None:
        return key[-1], f"= {name[1]!r}: no class of that name is known here; give its full import path"
    return None


def _bad_value(message: str, _: set[str]) -> tuple[str, str] | None:
    keys = re.findall(r'Parser key "([^"]+)"', message)
    given = re.findall(r"(?:Given value|Got value): (.*)", message)
    accepted = _choices(message)
    if not keys or not given or accepted is None:
        return None
    return keys[-1], f"= {_quoted(given[-1])}: {accepted}"


def _choices(message: str) -> str | None:
    literals = re.findall(r"Literal\[(.*?)\]", message)
    if literals:
        names = dict.fromkeys(item for group in literals for item in ast.literal_eval(f"[{group}]"))
        return f"choose one of {', '.join(map(str, names))}"
    expected = re.findall(r"Expected an? (?:<class '([\w.]+)'>|([^\n.]+))", message)
    types = dict.fromkeys((name or other).strip().removeprefix("typing.") for name, other in expected)
    types = {{"NoneType": "null"}.get(name, name): None for name in types}
    return f"expected {' or '.join(types)}" if types else None


def _quoted(value: str) -> str:
    text = value.strip()
    return text if text[:1] in ("[", "{", "'", '"') else repr(text)
