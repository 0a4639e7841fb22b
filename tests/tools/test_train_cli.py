import csv
import importlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mainstem.tools import cli, train
from mainstem.tools.errors import Interrupted, UserError

TEST = Path(__file__).parent


def state(run: Path, which: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(run / "checkpoints" / f"{which}.ckpt", weights_only=True)
    return content


def assert_same_training(run: Path, other: Path) -> None:
    one, two = state(run, "last"), state(other, "last")
    assert one["global_step"] == two["global_step"]
    torch.testing.assert_close(one["state_dict"], two["state_dict"], rtol=0, atol=0)
    torch.testing.assert_close(one["optimizer_states"], two["optimizer_states"], rtol=0, atol=0)
    assert (run / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    assert state(run, "best")["global_step"] == state(other, "best")["global_step"]


@pytest.fixture
def trained(in_folder: Path) -> Path:
    """Folder of a run of three epochs."""
    run_dir = train.run(["fit", "-c", "toy.yaml"]).run_dir
    assert run_dir is not None
    return run_dir


def test_fit_leaves_a_run(in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = train.run(["fit", "-c", "toy.yaml"]).run_dir
    assert trained == Path("runs/toy_domain/1")
    files = sorted(path.relative_to(trained).as_posix() for path in trained.rglob("*") if path.is_file())
    assert files == ["checkpoints/best.ckpt", "checkpoints/last.ckpt", "config.yaml", "metrics.csv"]
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    validations = [row["step"] for row in rows if row["val/mse"]]
    assert validations == ["0", "3", "7", "11"]  # the first one before training
    shown = capsys.readouterr().out
    assert "toy_domain · gla 8×2 · backend auto (cpu) · 5 parameters · cpu → runs/toy_domain/1" in shown
    assert "best val/mse" in shown
    assert "next mainstem test --run runs/toy_domain/1" in shown
    assert train.run(["fit", "-c", "toy.yaml", "--trainer.max_epochs=1"]).run_dir == Path("runs/toy_domain/2")


def test_a_run_is_reused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tested = train.run(["test", "--run", str(trained)])
    written = json.loads((trained / "metrics.json").read_text())
    assert written["metrics"] == tested.metrics
    assert set(written["metrics"]) == {"mse", "r2"}
    assert set(written["baselines"]["zero"]) == {"mse"}
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["metric"] == ["metric", "model", "zero", "better", "unit"]
    assert lines["mse"][-2:] == ["lower", "y²"]
    assert float(lines["mse"][1]) == pytest.approx(tested.metrics["mse"], rel=1e-3)

    validated = train.run(["validate", "--run", str(trained)])
    best = state(trained, "best")["callbacks"]
    assert validated.metrics["mse"] == pytest.approx(
        min(float(one["best_model_score"]) for one in best.values() if one.get("monitor") == "val/mse")
    )

    assert train.run(["predict", f"--run={trained}"]).predictions == [trained / "predictions/predictions.csv"]
    there = Path("there/deep")
    done = train.run(["predict", "--run", str(trained), "--output", str(there), "--data.rows=3"])
    assert done.predictions == [there / "predictions.csv"]
    assert len(done.predictions[0].read_text().splitlines()) == 3


def test_a_failed_prediction_leaves_nothing(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_CANNOT_WRITE", "1")
    with pytest.raises(RuntimeError, match="disk full"):
        train.run(["predict", f"--run={trained}", "--output=there"])
    assert list(Path("there").iterdir()) == []


@pytest.mark.parametrize("step", [1, 6])
def test_an_interrupted_run_goes_on_bit_for_bit(
    trained: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_STOPS_AT", str(step))
    with pytest.raises(Interrupted, match=r"mainstem fit --run runs/toy_domain/2` continues it"):
        train.run(["fit", "-c", "toy.yaml"])
    monkeypatch.delenv("TOY_STOPS_AT")
    resumed = train.run(["fit", "--run", "runs/toy_domain/2"]).run_dir
    assert resumed is not None
    assert_same_training(trained, resumed)


def test_a_killed_run_goes_on_bit_for_bit_elsewhere(trained: Path) -> None:
    command = [sys.executable, "-m", "mainstem.tools.cli", "fit", "-c", "toy.yaml", "--output=killed"]
    environment = {**os.environ, "TOY_DIES_AT": "9", "PYTHONPATH": str(TEST)}
    assert subprocess.run(command, env=environment, check=False, capture_output=True).returncode == -9
    shutil.move("killed", "moved")
    train.run(["fit", "--run", "moved"])
    assert_same_training(trained, Path("moved"))


def test_a_finished_run_can_be_lengthened(trained: Path) -> None:
    train.run(["fit", "--run", str(trained), "--trainer.max_epochs=5"])
    longer = train.run(["fit", "-c", "toy.yaml", "--trainer.max_epochs=5"]).run_dir
    assert longer is not None
    assert_same_training(longer, trained)
    assert yaml.safe_load((trained / "config.yaml").read_text())["ckpt_path"] is None


def test_the_untrained_model_wins_if_training_makes_it_worse(in_folder: Path) -> None:
    optimizer = ["--model.optimizer=SGD", "--model.optimizer.lr=10.0"]
    run = train.run(["fit", "-c", "toy.yaml", *optimizer, "--trainer.max_epochs=2"]).run_dir
    assert run is not None
    assert state(run, "best")["global_step"] == 0
    assert state(run, "last")["global_step"] == 8
    values = [float(row["val/mse"]) for row in csv.DictReader((run / "metrics.csv").open()) if row["val/mse"]]
    tested = train.run(["test", f"--run={run}"])
    assert tested.metrics["mse"] == pytest.approx(values[0])
    assert values[0] < min(values[1:])


def test_configs_merge_from_left_to_right_and_values_follow(in_folder: Path) -> None:
    Path("more.yaml").write_text(
        "data: {init_args: {features: 7}}\nmodel: {init_args: {backbone: {dim: 16}}}"
    )
    loaded = train.run(
        ["fit", "-c", "toy.yaml", "-c", "more.yaml", "--config=mixers/lru.yaml", "--trainer.max_epochs=0"]
    )
    assert loaded.model.net[1].in_features == 7
    assert loaded.model.backbone_config.dim == 16
    assert loaded.model.backbone_config.mixer == "lru"
    loaded = train.run(["fit", "-c", "toy.yaml", "--data.features=3", "--trainer.max_epochs=0"])
    assert loaded.model.net[1].in_features == 3


ERRORS = {
    "mixer": (
        "--model.backbone.mixer=nope",
        "model.init_args.backbone.mixer = 'nope': choose one of attention, ",
    ),
    "mixer in a list": (
        "--model.backbone.mixer=[gla,nope]",
        "model.init_args.backbone.mixer = ['gla', 'nope']: choose one of attention, ",
    ),
    "backbone key": (
        "--model.backbone.dmi=3",
        "model.init_args.backbone.dmi is unknown: did you mean 'dim'?",
    ),
    "backbone value": ("--model.backbone.heads=3", "backbone.heads = 3 must divide backbone.dim = 8"),
    "model key": ("--model.featurs=3", "model.init_args.featurs is unknown: did you mean 'features'?"),
    "model value": ("--model.warmup_steps=-3", "warmup_steps=-3 must not be negative"),
    "data value": ("--data.rows=many", "data.init_args.rows = 'many': expected int"),
    "trainer key": ("--trainer.max_epoch=3", "trainer.max_epoch is unknown: did you mean 'max_epochs'?"),
    "trainer value": ("--trainer.max_epochs=x", "trainer.max_epochs = 'x': expected int or null"),
    "top key": ("--modle=3", "modle is unknown: did you mean 'model'?"),
    "class": ("--model=toy_domain.Nope", "model.class_path = 'toy_domain.Nope': module 'toy_domain' has no"),
    "missing file": ("--data.path=nowhere.csv", "path='nowhere.csv' is not a file"),
    "interpolation": (
        "--model.features=${data.init_args.nope}",
        "model.init_args.features = ${data.init_args.nope}: the configuration has no data.init_args.nope",
    ),
    "monitor": (
        "--trainer.callbacks=EarlyStopping --trainer.callbacks.monitor=val/nope",
        "EarlyStopping monitors 'val/nope', which is not logged: choose one of val/mse, val/r2, val/zero/mse",
    ),
    "config": ("-c nope.yaml", "config 'nope.yaml' is neither a file nor one of: forecasting/demo.yaml, "),
    "mixer in a file": (
        "-c bad_mixer.yaml",
        "model.init_args.backbone.mixer = 'nope': choose one of attention",
    ),
    "key in a file": ("-c bad_key.yaml", "trainer.max_epoch is unknown: did you mean 'max_epochs'?"),
    "not yaml": ("-c broken.yaml", "Problems parsing config"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_mistake_is_told_in_one_sentence(
    name: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bad_mixer.yaml").write_text("model: {init_args: {backbone: {mixer: nope}}}")
    Path("bad_key.yaml").write_text("trainer: {max_epoch: 3}")
    Path("broken.yaml").write_text("model: [3")
    words, message = ERRORS[name]
    assert cli.main(["fit", "-c", "toy.yaml", *words.split(" ")]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"mainstem: {message}")
    assert shown.count("\n") == 1
    assert not Path("runs").exists()


COMMANDS = {
    "fit": "no data and no model given: name a configuration with -c",
    "test": "test needs a trained model: give --run DIR, or -c CONFIG and --ckpt_path FILE",
    "predict --run .": "--run . is not the folder of a run: it holds no config.yaml",
    "fit --run": "--run needs a folder after it",
    "test -c toy.yaml --ckpt_path nope.ckpt": "checkpoint nope.ckpt does not exist",
}


@pytest.mark.parametrize("words", COMMANDS)
def test_an_incomplete_command(words: str, in_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words.split()) == 2
    assert capsys.readouterr().err.startswith(f"mainstem: {COMMANDS[words]}")


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("exploded"),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_bad_checkpoints(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = (trained / "checkpoints/best.ckpt").read_bytes()
    Path("truncated.ckpt").write_bytes(good[: len(good) // 2])
    Path("empty.ckpt").write_bytes(b"")
    Path("text.ckpt").write_text("model: 3")
    torch.save({"state_dict": {}, "bomb": Bomb()}, "bomb.ckpt")
    Path("pickle.ckpt").write_bytes(pickle.dumps(Bomb()))
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": {}}, "foreign.ckpt")
    for name, message in {
        "truncated": "truncated.ckpt is truncated or is not a checkpoint",
        "empty": "empty.ckpt is truncated or is not a checkpoint",
        "text": "text.ckpt is not a checkpoint",
        "bomb": "bomb.ckpt holds more than tensors and plain values",
        "pickle": "checkpoint pickle.ckpt ",
        "list": "list.ckpt holds no model: it has no state_dict",
        "foreign": "foreign.ckpt: the checkpoint holds a model of another program, not a toy_domain.Toy",
    }.items():
        assert cli.main(["test", f"--run={trained}", f"--ckpt_path={name}.ckpt"]) == 2
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.count("\n") == 1
    assert not Path("exploded").exists()
    assert not (trained / "metrics.json").exists()
    assert cli.main(["test", f"--run={trained}", "--model=toy_domain.OtherToy"]) == 2
    assert "holds a toy_domain.Toy, not a toy_domain.OtherToy" in capsys.readouterr().err
    assert cli.main(["test", f"--run={trained}", "--model.features=5", "--data.features=5"]) == 2
    assert "does not fit the model of the config" in capsys.readouterr().err


def test_a_named_folder_is_not_overwritten(in_folder: Path) -> None:
    arguments = ["fit", "-c", "toy.yaml", "--trainer.max_epochs=1", "--output=mine"]
    assert train.run(arguments).run_dir == Path("mine")
    with pytest.raises(UserError, match="--output mine holds a run already"):
        train.run(arguments)


def test_a_checkpoint_of_the_command_line_loads_in_python(trained: Path) -> None:
    toy = importlib.import_module("toy_domain").Toy
    loaded = toy.load_from_checkpoint(trained / "checkpoints/best.ckpt", weights_only=True)
    torch.testing.assert_close(loaded.state_dict(), state(trained, "best")["state_dict"])
    assert loaded.backbone_config.dim == 8


@pytest.mark.slow
def test_two_processes(in_folder: Path) -> None:
    command = [sys.executable, "-m", "mainstem.tools.cli"]
    environment = {**os.environ, "PYTHONPATH": str(TEST)}
    ddp = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    fit = [*command, "fit", "-c", "toy.yaml", *ddp]
    done = subprocess.run(fit, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert os.listdir("runs/toy_domain") == ["1"]
    assert done.stdout.count("best val/mse") == 1
    assert state(Path("runs/toy_domain/1"), "last")["global_step"] == 6
    test = [*command, "test", "--run", "runs/toy_domain/1", "--trainer.devices=1", "--trainer.strategy=auto"]
    subprocess.run(test, env=environment, check=True, capture_output=True)
