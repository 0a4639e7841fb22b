"""`mainstem compare`: train several mixers with the same budget and number of parameters, and report."""

import argparse
from collections.abc import Sequence
from pathlib import Path

DEFAULT_MIXERS = "gla,mamba2,gated_deltanet,attention"


def names(text: str) -> list[str]:
    """Split at commas, each name once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what it does not know is passed on to `mainstem fit`."""
    parser = argparse.ArgumentParser(
        "mainstem compare",
        description=__doc__,
        epilog="Further options such as --trainer.max_epochs=3 or --model.backbone.depth=4 go to every run. "
        "A comparison that was interrupted goes on where it stopped when the same command is given again.",
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="append", required=True, help="as for `mainstem fit`")
    parser.add_argument("--mixers", type=names, default=names(DEFAULT_MIXERS), help=DEFAULT_MIXERS)
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each mixer (3)")
    parser.add_argument("--output", type=Path, help="folder of the report (compare/NAME-OF-CONFIG)")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the comparison, print the table and say where the report lies."""
    arguments, overrides = parse(argv)

    from . import report
    from .comparison import Comparison

    comparison = Comparison.prepare(
        arguments.config, overrides, arguments.mixers, arguments.seeds, arguments.output
    )
    results = comparison.run()
    command = " ".join(["mainstem compare", *argv])
    summary = report.show(results)
    for path in report.write(summary, comparison, command):
        print(f"wrote {path}")
    return 0
