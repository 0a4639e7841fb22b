"""What the training commands understand beyond LightningCLI: packaged configs, --run and --output."""

from dataclasses import dataclass
from pathlib import Path

from . import configs, runs
from .errors import UserError


@dataclass(kw_only=True)
class Request:
    """A command whose short forms were replaced by what LightningCLI understands."""

    argv: list[str]
    run: Path | None
    output: Path | None


def expand(argv: list[str]) -> Request:
    """Replace ``--run DIR`` by its config and checkpoint, and each ``-c NAME`` by a path.

    Raises:
        UserError: a config or a run that does not exist, or a command that needs one and has none.
    """
    command, rest = argv[0], list(argv[1:])
    run_name, output = _take(rest, "--run"), _take(rest, "--output")
    rest = _find_configs(rest)
    run = runs.existing(run_name) if run_name is not None else None
    if run is not None:
        rest = _from_run(command, run, rest)
    elif command != "fit" and not _has(rest, "--ckpt_path") and not _asks_for_help(rest):
        raise UserError(f"{command} needs a trained model: give --run DIR, or -c CONFIG and --ckpt_path FILE")
    return Request(argv=[command, *rest], run=run, output=Path(output) if output is not None else None)


def _take(arguments: list[str], name: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            del arguments[index]
            return argument.partition("=")[2]
        if argument == name:
            if index + 1 == len(arguments):
                raise UserError(f"{name} needs a folder after it")
            value = arguments[index + 1]
            del arguments[index : index + 2]
            return value
    return None


def _has(arguments: list[str], name: str) -> bool:
    return any(argument.partition("=")[0] == name for argument in arguments)


def _asks_for_help(arguments: list[str]) -> bool:
    return any(
        argument in ("-h", "--help") or argument.partition("=")[0].endswith(".help") for argument in arguments
    ) or _has(arguments, "--print_config")


def _find_configs(arguments: list[str]) -> list[str]:
    found: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if found and found[-1] in ("-c", "--config"):
            found.append(str(configs.find(argument)))
        elif equals and name in ("-c", "--config"):
            found += ["-c", str(configs.find(value))]
        else:
            found.append(argument)
    return found


def _from_run(command: str, run: Path, rest: list[str]) -> list[str]:
    given = _take(rest, "--ckpt_path")
    checkpoint = Path(given) if given else None
    if given in (None, "best", "last"):
        checkpoint = runs.checkpoint(run, given or ("last" if command == "fit" else "best"))
        if not checkpoint.is_file() and command == "fit" and given is None:
            checkpoint = None  # it was killed in its first epoch, which the same config and seed repeat
        elif not checkpoint.is_file():
            raise UserError(f"the run has no {checkpoint}{_instead(run)}")
    trained = ["--ckpt_path", str(checkpoint)] if checkpoint is not None else []
    return ["-c", str(runs.config(run)), *trained, *rest]


def _instead(run: Path) -> str:
    if runs.checkpoint(run, "last").is_file():
        return ": it trained without validation; `--ckpt_path last` takes the last one"
    return f" yet; `mainstem fit --run {run}` continues it"
