"""The guide: its Python runs, and what it names is there."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from jsonargparse import set_parsing_settings

from mainstem.domains.pointcloud.metrics.ranges import Range
from mainstem.tools import train
from mainstem.tools.arguments import expand

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "pointcloud.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """The code blocks in a language."""
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.DOTALL)


def test_the_python_of_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(compile(block, "docs/pointcloud.md", "exec"), names)
    assert names["Mine"]()[3].names.tolist() == ["Forklift"]
    assert names["features"].equal(names["voxels"].features)
    assert names["bev"].shape == (2, 32 * 4, 128, 128)
    assert names["bev"].isfinite().all()
    assert names["scores"]["mAP"] == 100
    assert names["scores"]["car/3d@0.7/moderate"] == 100
    assert names["scores"]["0-30m/mAP"] == 100
    assert list(names["near_and_far"]) == [Range(0, 30), Range(30, 60)]
    assert len(names["geometry"]) > 0
    assert len(names["frames"]) == 3
    assert len(names["frames"][0].boxes) > 0


def test_the_configuration_of_the_guide_names_what_exists() -> None:
    (text,) = blocks("yaml")
    data = yaml.safe_load(text)["data"]
    assert data["init_args"]["train"] == data["init_args"]["val"] == data["init_args"]["test"]
    for path in (data["class_path"], data["init_args"]["train"]["class_path"]):
        module, _, name = path.rpartition(".")
        assert hasattr(import_module(module), name)


def test_the_configuration_of_the_guide_fits_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    points, labels = tmp_path / "own" / "points", tmp_path / "own" / "labels"
    points.mkdir(parents=True)
    labels.mkdir()
    np.zeros((5, 4), np.float32).tofile(points / "000.bin")
    (labels / "000.txt").write_text("10 0 -1 4 2 1.5 0 Car\n")
    (tmp_path / "own.yaml").write_text(blocks("yaml")[0])
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    words = ["fit", "-c", "pointcloud/demo.yaml", "-c", "own.yaml", "--trainer.accelerator=cpu"]
    made = train.MainstemCLI(expand(words), execute=False)
    assert made.model.classes == made.datamodule.classes == ("Car", "Pedestrian")
    assert made.datamodule.scenes("train")[0].names.tolist() == ["Car"]


def test_every_file_and_reader_that_the_guide_names_exists() -> None:
    configs = set(re.findall(r"-c ((?:pointcloud|mixers)/\w+\.yaml)", GUIDE))
    configs |= {f"pointcloud/{name}.yaml" for name in re.findall(r"`(lion_\w+)`", GUIDE)}
    assert len(configs) == 7
    links = re.findall(r"\]\((images/[\w.]+)\)", GUIDE)
    assert links
    wanted = [ROOT / "configs" / name for name in configs] + [ROOT / "docs" / name for name in links]
    assert [path for path in wanted if not path.is_file()] == []
    readers = import_module("mainstem.domains.pointcloud.readers")
    rows = re.findall(r"^\| `([A-Z]\w+)` \|", GUIDE, re.MULTILINE)
    assert len(rows) == 7
    assert [name for name in rows if not hasattr(readers, name)] == []
