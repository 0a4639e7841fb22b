import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import set_parsing_settings

from mainstem.domains.pointcloud import Simulator
from mainstem.domains.pointcloud.metrics import Argoverse2AP, KittiAP, NuScenesAP, OnceAP
from mainstem.tools import cli, train
from mainstem.tools.arguments import expand

CONFIG = """
data:
  class_path: mainstem.domains.pointcloud.PointCloudData
  init_args:
    classes: [Car, Pedestrian]
    features: [intensity]
    train: &street
      class_path: mainstem.domains.pointcloud.Simulator
      init_args: {frames: 2, seed: 1, sensor: beams16}
    val: *street
    test: *street
    augmentation: {rotation: 0.1}
    sample: {Car: 8}
    database: objects.npz
    keep: true
    batch_size: 2
model:
  class_path: mainstem.domains.pointcloud.PointCloudDetector
  init_args:
    classes: ${data.init_args.classes}
    features: ${data.init_args.features}
    grid: {low: [0.0, -12.8, -3.0], high: [25.6, 12.8, 1.0], voxel: [0.8, 0.8, 0.5]}
    backbone: {mixer: gla, dim: 8, depth: 1, heads: 2, bidirectional: true, channel_mixer: none}
    lion:
      class_path: mainstem.domains.pointcloud.lion.Lion
      init_args:
        stages: [{window: [9, 9, 8], group: 64}]
        closing: {window: [9, 9, 4], group: 64}
    bev:
      class_path: mainstem.domains.pointcloud.bev.PlainBEV
      init_args: {layers: [1], strides: [1], channels: [8], up_strides: [1], up_channels: [8]}
    head:
      class_path: mainstem.domains.pointcloud.heads.CenterHead
      init_args: {width: 8, separate: false, iou: false}
    threshold: 0.0
    pictures: 1
    min_points: 5
trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false}
"""
# Class of the reader, root of the data, head and metric of each configuration.
SHIPPED: dict[str, tuple[str, str, str, type]] = {
    "lion_kitti": ("Kitti", "data/kitti", "AnchorHead", KittiAP),
    "lion_waymo": ("Folder", "data/waymo/training", "CenterHead", OnceAP),
    "lion_nuscenes": ("NuScenes", "data/nuscenes", "TransFusionHead", NuScenesAP),
    "lion_once": ("Once", "data/once", "CenterHead", OnceAP),
    "lion_argoverse2": ("Argoverse2", "data/argoverse2", "SparseCenterHead", Argoverse2AP),
}
FIRST, *OTHERS = SHIPPED
CONFIGS = [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
NO_DATA = ["--data.train=null", "--data.val=null", "--data.test=null", "--trainer.accelerator=cpu"]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("tiny.yaml").write_text(CONFIG)
        run = train.run(["fit", "-c", "tiny.yaml"]).run_dir
    assert run is not None
    return folder / run


def made(config: str, *words: str) -> train.MainstemCLI:
    """What a training would start from."""
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return train.MainstemCLI(expand(["fit", "-c", config, *words]), execute=False)


def cloud() -> Any:
    return Simulator(frames=1, seed=5, sensor="beams16")[0].points


def test_fit_leaves_a_run(trained: Path) -> None:
    assert trained.relative_to(trained.parents[2]) == Path("runs/pointcloud/1")
    rows = list(csv.DictReader((trained / "metrics.csv").open()))
    validations = [row for row in rows if row["val/loss"]]
    assert [row["step"] for row in validations] == ["0", "0", "1"]
    assert all(0 < float(row["val/loss"]) < 100 and row["val/mAP"] for row in validations)
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 2
    assert losses[1] < losses[0]
    assert (trained.parents[2] / "objects.npz").is_file()
    assert (trained / "checkpoints/best.ckpt").is_file()


def test_test_tells_of_model_and_baseline(
    trained: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tested = train.run(["test", "--run", str(trained)])
    written = json.loads((trained / "metrics.json").read_text())
    assert written["metrics"] == tested.metrics
    assert {"mAP", "loss", "car 3d@0.7 moderate", "pedestrian bev@0.25 easy r11"} <= set(tested.metrics)
    assert written["baselines"]["clustering"]["car bev@0.5 moderate"] > 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.split()]
    assert ["metric", "model", "clustering", "better", "unit"] in lines
    names = [line[0] for line in lines]
    assert "mAP" in names
    assert not any("easy" in line or "r11" in line for line in lines)
    assert not (in_folder / "objects.npz").exists()


def test_predict_a_file(trained: Path, in_folder: Path) -> None:
    cloud().tofile("cloud.bin")
    words = ["predict", "--run", str(trained), "--output=out", "--data.predict=cloud.bin"]
    done = train.run([*words, "--model.format=kitti"])
    assert done.predictions[0] == Path("out/cloud.txt")
    assert all(len(line.split()) == 16 for line in done.predictions[0].read_text().splitlines())
    assert done.predictions[1].parent == Path("out/pictures")


def test_predict_a_folder_without_the_training_data(trained: Path, in_folder: Path) -> None:
    Path("clouds/deep").mkdir(parents=True)
    np.save("clouds/one.npy", cloud())
    cloud()[:0].tofile("clouds/deep/none.bin")
    none = ["--data.train=null", "--data.val=null", "--data.test=null", "--data.predict=clouds"]
    with pytest.warns(UserWarning, match=r"1 of 2 frames, such as deep/none: the cloud holds no point"):
        done = train.run(["predict", "--run", str(trained), "--output=out", "--model.threshold=0.9", *none])
    assert done.predictions[:2] == [Path("out/deep/none.json"), Path("out/one.json")]
    assert json.loads(done.predictions[0].read_text())["boxes"] == []


def test_a_bad_file_among_good_ones_is_named_in_one_sentence(
    trained: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("clouds").mkdir()
    cloud().tofile("clouds/a.bin")
    Path("clouds/b.bin").write_bytes(cloud().tobytes()[:1001])
    words = ["predict", "--run", str(trained), "--data.predict=clouds", "--output=out"]
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(
        "mainstem: point cloud 'clouds/b.bin': 1001 bytes are not a whole number of points"
    )
    assert shown.count("\n") == 1
    assert not Path("out").exists() or list(Path("out").iterdir()) == []


ERRORS = {
    "--data.predict=nowhere": "path='nowhere' does not exist",
    "--model.classes=[Car]": "the checkpoint has classes=['Car', 'Pedestrian'], the model classes=['Car']",
    "--model.grid.voxel=[0.7,0.8,0.5]": "grid: along x the range 0.0…25.6 m holds 36.571 voxels of 0.7 m",
    "--data.features=[intensity,time]": "model.features=['intensity'] but data.features=",
}


@pytest.mark.parametrize("word", ERRORS)
def test_a_mistake_is_told_in_one_sentence(
    word: str, trained: Path, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["predict", "--run", str(trained), "--output=out", word]) == 2
    shown = capsys.readouterr().err
    assert ERRORS[word] in shown
    assert shown.count("\n") == 1


def test_the_demo_is_what_it_says(in_folder: Path) -> None:
    built = made("pointcloud/demo.yaml")
    model, data = built.model, built.datamodule
    assert model.classes == data.classes == ("Car", "Pedestrian", "Cyclist", "Truck")
    assert model.features == data.features == ("intensity",)
    assert [len(data.scenes(name)) for name in ("train", "val", "test")] == [360, 20, 100]
    seeds = {source.seed for source in data.sources.values() if isinstance(source, Simulator)}
    assert len(seeds) == 3
    assert model.model.head.stride == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_shipped_configuration_misses_only_its_data(
    config: str, in_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fit", "-c", f"pointcloud/{config}.yaml"]) == 2
    shown = capsys.readouterr().err
    assert SHIPPED[config][1] in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("config", CONFIGS)
def test_a_shipped_configuration_builds(config: str, in_folder: Path) -> None:
    built = made(f"pointcloud/{config}.yaml", *NO_DATA)
    model, data = built.model, built.datamodule
    _, _, head, metric = SHIPPED[config]
    assert model.classes == data.classes
    assert model.features == data.features
    assert type(model.model.head).__name__ == head
    assert type(model.scores["val"]) is metric
    assert set(data.sample or {}) == set(data.classes)
    assert torch.Size(model.grid.size)[0] == 32


DEFAULTS = """
data: {class_path: mainstem.domains.pointcloud.PointCloudData, init_args: {classes: [Car]}}
model:
  class_path: mainstem.domains.pointcloud.PointCloudDetector
  init_args:
    classes: [Car]
    grid: {low: [0.0, -40.0, -3.0], high: [70.4, 40.0, 1.0], voxel: [0.4, 0.4, 0.25]}
    backbone: {mixer: gla, dim: 8, depth: 1, heads: 2, bidirectional: true, channel_mixer: none}
    bev: {class_path: mainstem.domains.pointcloud.bev.PlainBEV}
    head: {class_path: mainstem.domains.pointcloud.heads.AnchorHead}
trainer: {accelerator: cpu}
"""
OWN_ANCHOR = "{Car: {size: [4.0, 2.0, 1.5], bottom: -1.7, positive: 0.6, negative: 0.4}}"


def test_a_class_named_in_a_configuration_takes_its_own_defaults(in_folder: Path) -> None:
    """Not those of another class: the published network of KITTI, to the parameter."""
    model = made("pointcloud/lion_kitti.yaml", *NO_DATA).model
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_226_696
    assert model.model.head.nms == 0.01


@pytest.mark.parametrize(
    "words",
    [[], [f"--model.head.anchors={OWN_ANCHOR}"]],
    ids=["defaults", "own anchors"],
)
def test_the_configuration_of_a_run_makes_the_same_model_again(words: list[str], in_folder: Path) -> None:
    Path("defaults.yaml").write_text(DEFAULTS)
    built = made("defaults.yaml", *words)
    config = built.config["fit"]
    built._parser("fit").save(config, "saved.yaml", skip_unset=False, overwrite=True)
    again = made("saved.yaml")
    shapes = [{name: value.shape for name, value in one.model.state_dict().items()} for one in (built, again)]
    assert shapes[0] == shapes[1]
    heads = [one.model.model.head for one in (built, again)]
    assert type(heads[0]) is type(heads[1])
    assert getattr(heads[0], "anchors", None) == getattr(heads[1], "anchors", None)
    if words:
        assert heads[1].anchors[0].size == (4.0, 2.0, 1.5)
