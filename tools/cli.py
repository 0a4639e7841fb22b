"""The `mainstem` command: the first word picks a module, and nothing heavy is imported before that."""

import difflib
import os
import sys
from importlib import import_module

from .. import __version__

COMMANDS = {
    "fit": ("train", "train a model, or go on with a run"),
    "validate": ("train", "metrics of a run on its validation part"),
    "test": ("train", "metrics of a run on its test part, with baselines"),
    "predict": ("train", "write predictions of a run, also for data of your own"),
    "backtest": ("backtest", "metrics over a rolling origin, with or without refitting"),
    "compare": ("compare", "train several mixers with the same budget and report"),
    "bench": ("bench", "time the scans of every backend"),
    "info": ("info", "versions, devices, backends, mixers, domains, configs"),
}

USAGE = """usage: mainstem COMMAND [options]

{commands}

  mainstem fit -c forecasting/demo.yaml --model.backbone.mixer=gla
  mainstem test --run runs/forecasting/1

mainstem COMMAND --help tells more, mainstem --version the version.
"""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, 2 for a user's mistake, 130 for Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else argv
    word = arguments[0] if arguments else "--help"
    if word in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if word in ("-V", "--version"):
        print(f"mainstem {__version__}")
        return 0
    if word not in COMMANDS:
        print(f"mainstem: {unknown(word)}", file=sys.stderr)
        return 2
    return guarded(word, arguments[1:])


def usage() -> str:
    """List of the commands."""
    return USAGE.format(commands="\n".join(f"  {name:9} {text}" for name, (_, text) in COMMANDS.items()))


def unknown(word: str) -> str:
    """Say which command may have been meant."""
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(COMMANDS)}"
    return f"unknown command {word!r}: {hint}"


def guarded(command: str, arguments: list[str]) -> int:
    """Run a command with a user's mistake told in one sentence; a bug keeps its traceback."""
    from . import errors, help

    if COMMANDS[command][0] == "train":
        if {"-h", "--help"} & set(arguments):
            print(help.text(command), end="")
            return 0
        arguments = ["--help" if argument == help.ALL else argument for argument in arguments]
    try:
        module = import_module(f"{__package__}.{COMMANDS[command][0]}")
        words = [command, *arguments] if COMMANDS[command][0] == "train" else arguments
        return int(module.main(words))
    except KeyboardInterrupt as error:
        print(f"\nmainstem: {error or 'interrupted'}", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("MAINSTEM_DEBUG") or not errors.is_user_error(error):
            raise
        print(f"mainstem: {errors.sentence(error)}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
