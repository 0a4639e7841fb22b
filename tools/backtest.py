"""`mainstem backtest`: errors of a run over a rolling origin in the test rows, with or without refitting."""

import argparse
from pathlib import Path

PROGRAM = "mainstem backtest"


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what it does not know overrides the configuration of the run."""
    parser = argparse.ArgumentParser(PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, metavar="DIR", help="folder of the run")
    parser.add_argument("--refit", type=int, metavar="N", help="refit the ridge every N cutoffs (never)")
    parser.add_argument(
        "--residual-epochs", type=int, default=0, metavar="N", help="and train the residual for N epochs (0)"
    )
    parser.add_argument("--stride", type=int, default=1, metavar="K", help="rows between cutoffs (1)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="table of the cutoffs (DIR/backtest.csv)")
    return parser.parse_known_args(argv)


def main(argv: list[str]) -> int:
    """Run the backtest, print the mean errors and write the table of the cutoffs."""
    arguments, overrides = parse(argv)

    from ..core.files import write_whole
    from ..domains.forecasting import Forecaster
    from ..domains.forecasting.backtest import backtest
    from . import train
    from .errors import UserError
    from .progress import console
    from .tables import metric_table

    cli = train.load(["test", f"--run={arguments.run}", *overrides])
    if not isinstance(cli.model, Forecaster):
        raise UserError(f"--run {arguments.run} holds a {cli.model.kind()}; only forecasting has a backtest")
    result = backtest(
        cli.model,
        cli.datamodule,
        refit_every=arguments.refit,
        residual_epochs=arguments.residual_epochs,
        stride=arguments.stride,
    )
    shown = {
        str(name): {metric: float(row[metric]) for metric in Forecaster.summary_metrics if metric in row}
        for name, row in result.summary.to_dict("index").items()
    }
    console.print(f"{len(result.cutoffs)} cutoffs")
    console.print(metric_table(Forecaster, shown.pop("model"), shown))
    target = arguments.output or Path(arguments.run) / "backtest.csv"
    write_whole(target, lambda path: result.cutoffs.to_csv(path, index=False))
    console.print(f"wrote {target}")
    return 0
