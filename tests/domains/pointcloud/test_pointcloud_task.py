import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mainstem import BackboneConfig
from mainstem.domains.pointcloud import PointCloudData, PointCloudDetector, Simulator
from mainstem.domains.pointcloud.batch import SceneBatch, collate
from mainstem.domains.pointcloud.bev import PlainBEV
from mainstem.domains.pointcloud.cloud_checks import CloudStatistics
from mainstem.domains.pointcloud.detections import Detections
from mainstem.domains.pointcloud.grid import Grid
from mainstem.domains.pointcloud.heads import CenterHead
from mainstem.domains.pointcloud.lion import Lion, Stage
from mainstem.domains.pointcloud.readers.folder import Folder
from mainstem.domains.pointcloud.scene import Scene, SceneSource

GRID = Grid((0.0, -12.8, -3.0), (25.6, 12.8, 1.0), (0.8, 0.8, 0.5))
PARTS: dict[str, Any] = {
    "lion": partial(
        Lion,
        stages=[Stage(window=(9, 9, 8), group=64), Stage(window=(9, 9, 4), group=64)],
        closing=Stage(window=(9, 9, 2), group=64),
        generation=0.2,
    ),
    "bev": partial(
        PlainBEV, layers=[1], strides=[1], channels=[32], up_strides=[1], up_channels=[32], momentum=0.3
    ),
    "head": partial(CenterHead, width=32, separate=False, iou=False),
}


class Frames(SceneSource):
    classes = ("Car", "Pedestrian", "Cyclist", "Truck")

    def __init__(self, scenes: Sequence[Scene]) -> None:
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        return self.scenes[index]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers")
        warnings.filterwarnings("ignore", message=".*is deprecated")
        warnings.filterwarnings("ignore", message="Checkpoint directory .* exists")
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`, callbacks")
        yield


@pytest.fixture(scope="module")
def streets() -> Frames:
    """Two frames with eight cars in the range."""
    simulator = Simulator(frames=2, seed=1, sensor="beams16")
    return Frames([simulator[0], simulator[1]])


def detector(classes: Sequence[str] = ("Car",), **keywords: Any) -> PointCloudDetector:
    torch.manual_seed(0)
    backbone = BackboneConfig(
        mixer="gla",
        dim=16,
        depth=1,
        heads=2,
        bidirectional=True,
        channel_mixer="none",
        layer_scale=0.05,
    )
    settings = {
        "min_points": 5,
        "momentum": 0.3,
        "schedule": "cosine",
        "warmup_steps": 3,
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        **PARTS,
        **keywords,
    }
    return PointCloudDetector(backbone, GRID, list(classes), **settings)


def data_of(source: SceneSource, classes: Sequence[str] = ("Car",), **keywords: Any) -> PointCloudData:
    sources = {"train": source, "val": source, "test": source, "seed": 0}
    return PointCloudData(list(classes), **{**sources, **keywords})


def trainer(directory: Path, epochs: int = 1, *callbacks: Any) -> Trainer:
    return Trainer(
        default_root_dir=directory,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        callbacks=list(callbacks),
    )


def test_results(model: PointCloudDetector, data: PointCloudData, **keywords: Any) -> dict[str, float]:
    return dict(trainer(Path(), 1).test(model, data, verbose=False, **keywords)[0])


test_results.__test__ = False  # type: ignore[attr-defined]


@dataclass
class Trained:
    """A detector that knows two frames by heart."""

    model: PointCloudDetector
    data: PointCloudData
    checkpoint: Path
    untrained: dict[str, float]
    loss: float
    results: dict[str, float]


@pytest.fixture(scope="module")
def trained(streets: Frames, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    model, data, folder = detector(), data_of(streets, keep=True), tmp_path_factory.mktemp("trained")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        untrained = test_results(model, data)
        last = ModelCheckpoint(folder, save_last=True)
        run = trainer(folder, 30, last)
        run.fit(model, data)
        loss = float(run.callback_metrics["train/loss"])
        results = test_results(model, data)
    return Trained(model, data, Path(last.last_model_path), untrained, loss, results)


def batch_of(*scenes: Scene) -> SceneBatch:
    return collate(scenes, ("Car",))


def assert_same(found: Detections, expected: Detections) -> None:
    assert len(found) == len(expected)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.labels, expected.labels)


def test_training_learns_the_frames(trained: Trained) -> None:
    assert trained.untrained["test/car bev@0.5 moderate"] < 1
    assert trained.results["test/car bev@0.5 moderate"] > 50
    assert trained.results["test/car 3d@0.5 moderate"] > 40
    assert trained.results["test/mAP"] == trained.results["test/car 3d@0.7 moderate"]
    assert trained.untrained["test/mAP"] == trained.untrained["test/car 3d@0.7 moderate"] == 0
    assert trained.results["test/loss"] < 0.5 * trained.untrained["test/loss"]
    assert trained.loss < 0.5 * trained.untrained["test/loss"]


def test_the_clustering_baseline_is_scored_beside_it(trained: Trained, streets: Frames) -> None:
    assert trained.untrained["test/clustering/mAP"] == trained.results["test/clustering/mAP"]
    assert trained.results["test/clustering/car bev@0.5 moderate"] > 0
    assert "test/clustering/loss" not in trained.results
    without = test_results(detector(baseline=False), data_of(streets))
    assert not any("clustering" in name for name in without)
    assert without["test/loss"] == pytest.approx(trained.untrained["test/loss"], rel=1e-4)


def test_ranges_are_scored_too(streets: Frames) -> None:
    results = test_results(detector(baseline=False, ranges=[0, 10, 20]), data_of(streets))
    assert "test/0-10m car 3d@0.7 moderate" in results
    assert PointCloudDetector.shown("car 3d@0.7 moderate")
    assert not PointCloudDetector.shown("0-10m car 3d@0.7 moderate")
    assert not PointCloudDetector.shown("car 3d@0.7 easy")


def test_a_frame_alone_and_in_a_batch(trained: Trained, streets: Frames) -> None:
    model = trained.model.eval()
    one, two = streets.scenes
    empty = replace(one, id="empty", points=one.points[:0])
    with torch.no_grad():
        together = model(batch_of(one, empty, two))
        alone = [model(batch_of(scene))[0] for scene in (one, empty, two)]
    assert len(together[0]) > 0
    assert len(together[2]) > 0
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)


def test_a_loaded_checkpoint_gives_the_same_detections(trained: Trained, streets: Frames) -> None:
    batch = batch_of(*streets.scenes)
    loaded = PointCloudDetector.load_from_checkpoint(
        trained.checkpoint, weights_only=True, map_location="cpu", **PARTS
    )
    assert loaded.grid == GRID
    assert loaded.classes == ("Car",)
    assert loaded.typical == trained.model.typical
    with torch.no_grad():
        expected = trained.model.eval()(batch)
        found = loaded.eval()(batch)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.boxes, two.boxes)
        assert torch.equal(one.scores, two.scores)
    path = {"ckpt_path": str(trained.checkpoint), "weights_only": True}
    assert test_results(detector(), trained.data, **path) == trained.results


def test_the_checkpoint_knows_what_the_clouds_look_like(trained: Trained, streets: Frames) -> None:
    content = torch.load(trained.checkpoint, weights_only=True)
    expected = CloudStatistics.of(streets.scenes, GRID)
    assert CloudStatistics(**content["typical"]) == expected
    assert content["model"] == "pointcloud.PointCloudDetector"


def test_a_checkpoint_of_other_classes_or_features_is_refused(trained: Trained, streets: Frames) -> None:
    path = {"ckpt_path": str(trained.checkpoint), "weights_only": True}
    with pytest.raises(ValueError, match=r"the checkpoint has classes=\['Car'\], .*=\['Truck'\]"):
        test_results(detector(["Truck"]), data_of(streets, ["Truck"]), **path)
    with pytest.raises(ValueError, match=r"the checkpoint has features=\['intensity'\], the model .*\[\]"):
        test_results(detector(features=[]), data_of(streets, features=[]), **path)
    # Not given and given as what it then is: the same.
    same = test_results(detector(features=["intensity"]), data_of(streets), **path)
    assert same["test/mAP"] == trained.results["test/mAP"]


def test_data_of_other_classes_or_features_are_refused(streets: Frames, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.classes=\['Car'\] but data\.classes=\['Car', 'Truck'\]"):
        trainer(tmp_path).fit(detector(), data_of(streets, ["Car", "Truck"]))
    with pytest.raises(ValueError, match=r"model\.features=\['intensity'\] but data\.features=\[\]"):
        trainer(tmp_path).test(detector(), data_of(streets, features=[]))
    with pytest.raises(
        ValueError, match="metric='coco' is unknown: choose one of kitti, nuscenes, once, arg"
    ):
        detector(metric="coco")
    with pytest.raises(ValueError, match=r"threshold=1\.5 must be a score, from 0 to 1"):
        detector(threshold=1.5)
    with pytest.raises(ValueError, match="pictures=-1 must be at least 0"):
        detector(pictures=-1)


def test_weights_of_another_training_are_taken_over_where_they_fit(
    trained: Trained, streets: Frames, tmp_path: Path
) -> None:
    model = detector(["Car", "Truck"], weights=str(trained.checkpoint))
    data = data_of(streets, ["Car", "Truck"])
    with pytest.warns(UserWarning, match=r"tensors start anew, first model\.head\.towers\.heatmap") as caught:
        trainer(tmp_path, 0).fit(model, data)
    before, now = trained.model.state_dict(), model.state_dict()
    fitting = [name for name in now if name in before and before[name].shape == now[name].shape]
    others = [name for name in now if name not in fitting]
    assert all(torch.equal(now[name], before[name]) for name in fitting)
    assert 0 < len(others) < 4
    told = [str(one.message) for one in caught]
    assert any(f"{len(others)} of {len(now)} tensors start anew" in one for one in told)


def test_all_weights_fit_without_a_warning_and_only_once(
    trained: Trained, streets: Frames, tmp_path: Path
) -> None:
    model, data = detector(weights=str(trained.checkpoint)), data_of(streets)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*start anew")
        trainer(tmp_path, 0).fit(model, data)
    before = trained.model.state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    trainer(tmp_path, 1).fit(model, data)
    after = {name: value.clone() for name, value in model.state_dict().items()}
    assert not torch.equal(
        after["model.encoder.first.linear.weight"], before["model.encoder.first.linear.weight"]
    )
    test_results(model, data)
    assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())


def test_weights_that_are_none_are_refused(streets: Frames, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"checkpoint .*none\.ckpt does not exist"):
        trainer(tmp_path).fit(detector(weights=str(tmp_path / "none.ckpt")), data_of(streets))
    torch.save({"state_dict": {"other": torch.zeros(2)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt': none of its weights fits this model"):
        trainer(tmp_path).fit(detector(weights=str(tmp_path / "other.ckpt")), data_of(streets))


def test_a_trained_model_needs_no_longer_what_it_started_from(trained: Trained) -> None:
    run = trainer(Path())
    run.ckpt_path = str(trained.checkpoint)  # as the command line hands it over
    found = run.test(detector(weights="gone.ckpt"), trained.data, weights_only=True, verbose=False)
    assert found == [trained.results]


def test_frames_without_boxes_and_without_points_train(streets: Frames, tmp_path: Path) -> None:
    one = streets.scenes[0]
    bare = Scene("bare", one.points, one.features)
    nothing = Scene("nothing", one.points[:0], one.features)
    for scenes in ([bare, nothing], [nothing], [bare, one]):
        model, source = detector(), Frames(scenes)
        before = {name: value.clone() for name, value in model.named_parameters()}
        run = trainer(tmp_path)
        run.fit(model, data_of(source))
        assert bool(torch.isfinite(run.callback_metrics["train/loss"]))
        assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
        assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_points_that_are_not_finite_change_nothing(trained: Trained, streets: Frames) -> None:
    scene = streets.scenes[0]
    broken = np.full((3, 4), np.nan, np.float32)
    broken[1] = [np.inf, 0, 0, 0.5]
    more = replace(scene, points=np.concatenate([broken, scene.points]))
    model = trained.model.eval()
    with torch.no_grad():
        assert_same(model(batch_of(more))[0], model(batch_of(scene))[0])


def predict(trained: Trained, data: PointCloudData, **settings: Any) -> tuple[PointCloudDetector, list[Any]]:
    model = detector(**{"pictures": 0, "threshold": 0.4, **settings})
    model.load_state_dict(trained.model.state_dict())
    model.typical = trained.model.typical
    outputs: Any = trainer(Path()).predict(model, data)
    return model, outputs


def test_predictions_as_json(trained: Trained, streets: Frames, tmp_path: Path) -> None:
    model, outputs = predict(trained, trained.data, pictures=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # nothing is wrong with these clouds
        written = model.write_predictions(outputs, trained.data, tmp_path)
    names = [f"{scene.id}.json" for scene in streets.scenes]
    assert [path.name for path in written[:2]] == names
    assert len(written) == 3
    assert written[2].parent == tmp_path / "pictures"
    for path, one in zip(written, outputs[0]):
        boxes = json.loads(path.read_text())["boxes"]
        good = one.detections[one.detections.scores >= 0.4]
        assert len(boxes) == len(good) > 0
        table = torch.tensor([box["box"] for box in boxes])
        torch.testing.assert_close(table, good.boxes, atol=2e-3, rtol=1e-3)
        assert {box["name"] for box in boxes} == {"Car"}
    # Points of frames that are not drawn are let go.
    drawn, other = outputs[0]
    assert len(drawn.scene.points) > 1000
    assert other.scene.points.shape == (0, 4)
    assert other.scene.points.base is None


def test_predictions_as_kitti(trained: Trained, streets: Frames, tmp_path: Path) -> None:
    model, outputs = predict(trained, trained.data, format="kitti")
    written = model.write_predictions(outputs, trained.data, tmp_path)
    assert [path.name for path in written[:2]] == [f"{scene.id}.txt" for scene in streets.scenes]
    lines = [line.split() for path in written[:2] for line in path.read_text().splitlines()]
    assert {len(line) for line in lines} == {16}
    assert {line[0] for line in lines} == {"Car"}
    assert min(float(line[15]) for line in lines) >= 0.4


def test_clouds_that_look_wrong_are_warned_of(trained: Trained, streets: Frames, tmp_path: Path) -> None:
    scene = streets.scenes[0]
    folder = tmp_path / "clouds"
    folder.mkdir()
    bright = scene.points * np.array([1, 1, 1, 255], np.float32)
    high = scene.points + np.array([0, 0, 1.2, 0], np.float32)
    for name, points in {"bright": bright, "good": scene.points, "high": high}.items():
        np.save(folder / f"{name}.npy", points)
    data = PointCloudData(["Car"], predict=str(folder))
    model, outputs = predict(trained, data)
    with pytest.warns(UserWarning, match="1 of 3 frames") as caught:
        model.write_predictions(outputs, data, tmp_path / "out")
    told = sorted(str(one.message) for one in caught)
    assert len(told) == 2
    assert told[0].startswith("1 of 3 frames, such as bright: intensity reaches")
    assert "divide it by 255" in told[0]
    assert told[1].startswith("1 of 3 frames, such as high: the ground lies at z = ")
    assert "add -1.2" in told[1]


def test_finding_nothing_is_told(trained: Trained, tmp_path: Path) -> None:
    model, outputs = predict(trained, trained.data, threshold=1.0)
    with pytest.warns(UserWarning, match=r"no box reaches threshold=1: the best score is 0\.\d\d$"):
        model.write_predictions(outputs, trained.data, tmp_path)


def test_frames_without_labels_are_told_instead_of_scored(trained: Trained, streets: Frames) -> None:
    bare = Frames(
        [
            replace(scene, boxes=scene.boxes[:0], names=scene.names[:0], attributes={})
            for scene in streets.scenes
        ]
    )
    with pytest.warns(UserWarning, match=r"data\.test: no labelled box of Car counts by the metric's rules"):
        results = test_results(trained.model, data_of(bare))
    assert results.keys() == {"test/loss"}


def test_predictions_of_a_file_are_read_back(trained: Trained, streets: Frames, tmp_path: Path) -> None:
    streets.scenes[0].points.tofile(tmp_path / "cloud.bin")
    data = PointCloudData(["Car"], predict=str(tmp_path / "cloud.bin"))
    model, outputs = predict(trained, data)
    model.write_predictions(outputs, data, tmp_path / "out")
    read = Folder(tmp_path / "cloud.bin", labels=tmp_path / "out", classes=("Car",))[0]
    (found,) = (one.detections for output in outputs for one in output)
    good = found[found.scores >= 0.4]
    np.testing.assert_allclose(read.boxes, good.boxes.numpy(), atol=2e-3)


def test_the_mixer_is_found_and_counted() -> None:
    model = detector()
    rnns = [part for part in model.modules() if type(part) is type(model.token_mixer())]
    assert len(rnns) == 2 * (2 * 2 * 1 + 1)
    counted = sum(p.numel() for part in rnns for p in part.parameters())
    assert model.count_token_mixers(model.backbone_config) == counted
    assert model.count_token_mixers(replace(model.backbone_config, mixer="mamba")) != counted
    off = detector(lion=partial(PARTS["lion"], rnn=False))
    with pytest.raises(ValueError, match="rnn=False: there is no mixer"):
        off.token_mixer()
