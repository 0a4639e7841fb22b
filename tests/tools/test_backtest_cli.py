from pathlib import Path

import pandas as pd
import pytest

from mainstem.tools import cli, train


def test_a_forecasting_run_is_backtested(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fit the ridge alone on the series of the demo, and move the origin through its test rows."""
    quick = ["--model.residual=false", "--trainer.enable_progress_bar=false"]
    run = train.run(["fit", "-c", "forecasting/demo.yaml", *quick]).run_dir
    assert run == Path("runs/forecasting/1")
    capsys.readouterr()

    assert cli.main(["backtest", f"--run={run}", "--stride=52"]) == 0
    shown = capsys.readouterr().out
    cutoffs = pd.read_csv(run / "backtest.csv")
    assert f"{len(cutoffs)} cutoffs" in shown
    assert cutoffs["cutoff"].is_monotonic_increasing
    assert (cutoffs["model/mae"] == cutoffs["ridge/mae"]).all()

    assert cli.main(["backtest", f"--run={run}", "--stride=52", "--refit=1", "--output=refitted.csv"]) == 0
    refitted = pd.read_csv("refitted.csv")
    assert len(refitted) == len(cutoffs)
    assert not refitted["model/mae"].equals(cutoffs["model/mae"])

    assert cli.main(["backtest", f"--run={run}", "--stride=0"]) == 2
    assert capsys.readouterr().err.startswith("mainstem: stride=0 must be at least 1")


def test_another_domain_has_no_backtest(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train.run(["fit", "-c", "toy.yaml", "--trainer.max_epochs=1", "--output=toy"])
    assert cli.main(["backtest", "--run=toy"]) == 2
    assert "only forecasting has a backtest" in capsys.readouterr().err
