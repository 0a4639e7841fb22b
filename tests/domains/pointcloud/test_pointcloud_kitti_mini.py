"""The configuration kitti_mini on real frames, through the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from real_kitti import DRIVE, add_drive, drives, object_frames, real, split_by_drive, write_layout

from mainstem.domains.pointcloud.readers import Kitti
from mainstem.tools import configs, train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*could not find the monitored key"),
]
CONFIG = ["-c", "pointcloud/kitti_mini.yaml", "--data.train.root=kitti"]
SHORT = ["--trainer.max_steps=1", "--trainer.enable_progress_bar=false"]


def test_the_simulators_checkpoint_fits() -> None:
    mini, demo = (
        yaml.safe_load(configs.find(f"pointcloud/{name}.yaml").read_text()) for name in ("kitti_mini", "demo")
    )
    assert mini["data"]["init_args"]["classes"] == demo["data"]["init_args"]["classes"]
    for part in ("grid", "backbone", "lion", "bev", "head"):
        assert mini["model"]["init_args"][part] == demo["model"]["init_args"][part]


@real
def test_no_drive_is_on_both_sides() -> None:
    split, drive = split_by_drive(), drives()
    assert {name: len(frames) for name, frames in split.items()} == {"mini_train": 52, "mini_val": 15}
    assert sorted(split["mini_train"] + split["mini_val"]) == sorted(object_frames())
    train_drives, val_drives = ({drive[frame] for frame in frames} for frames in split.values())
    assert not train_drives & val_drives
    assert DRIVE in train_drives


@real
def test_a_scan_of_the_drive_is_as_in_the_object_benchmark(tmp_path: Path) -> None:
    write_layout(tmp_path, {"own": ["000310"], "other": ["000339"]})
    with pytest.raises(ValueError, match=f"the list other has frames of the drive {DRIVE} too"):
        add_drive(tmp_path, "own", every=136)
    (tmp_path / "ImageSets" / "other.txt").unlink()
    assert add_drive(tmp_path, "own", every=136) == ["0005_000000", "0005_000136"]
    source = Kitti(tmp_path, "own")
    [same, _, scan] = [source[i] for i in range(len(source))]
    assert same.names.tolist() == scan.names.tolist()
    np.testing.assert_array_equal(same.points, scan.points)
    np.testing.assert_allclose(same.boxes, scan.boxes, atol=0.02)
    assert same.attributes["occlusion"].tolist() == scan.attributes["occlusion"].tolist()


@real
def test_from_layout_to_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    lists = {"mini_train": ["000010", "000217"], "mini_val": ["000002", "000008", "001497"]}
    assert all(set(frames) <= set(split_by_drive()[name]) for name, frames in lists.items())
    write_layout(tmp_path / "kitti", lists)
    monkeypatch.chdir(tmp_path)
    run = train.run(["fit", *CONFIG, *SHORT, "--output=scratch"]).run_dir
    assert run == Path("scratch")
    trained = torch.load("scratch/checkpoints/last.ckpt", weights_only=True)
    assert trained["global_step"] == 1

    tested = train.run(["test", "--run=scratch", "--ckpt_path=last"])
    assert tested.model.scores["test"].devkit
    assert len(tested.datamodule.scenes("test")) == 3
    assert json.loads(Path("scratch/metrics.json").read_text())["metrics"] == tested.metrics
    # Geometry alone finds cars at once.
    found, baseline = tested.metrics, tested.baselines["clustering"]
    assert baseline["car bev@0.5 moderate"] > 3
    assert found["car bev@0.5 moderate"] < baseline["car bev@0.5 moderate"]

    # Another training, which would begin with other weights, starts from all of these: one step is short.
    start = ["--model.weights=scratch/checkpoints/last.ckpt", "--seed_everything=1"]
    train.run(["fit", *CONFIG, *SHORT, *start, "--output=more"])
    assert not [warning for warning in recwarn if "start anew" in str(warning.message)]
    more = torch.load("more/checkpoints/last.ckpt", weights_only=True)
    for name, value in trained["state_dict"].items():
        if value.is_floating_point() and "running" not in name:
            torch.testing.assert_close(more["state_dict"][name], value, atol=2e-4, rtol=0)
