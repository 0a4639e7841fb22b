from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from mainstem.domains.pointcloud import PointCloudData, Simulator
from mainstem.domains.pointcloud.augment import Augmentation
from mainstem.domains.pointcloud.batch import SceneBatch
from mainstem.domains.pointcloud.datasets import AugmentedScenes, SceneDataset, choose_features
from mainstem.domains.pointcloud.ground_truth import GroundTruthSampling, ObjectDatabase
from mainstem.domains.pointcloud.scene import Scene, SceneSource

CLASSES = ["Car", "Pedestrian"]


class Frames(SceneSource):
    """Given frames; counts how often one was read."""

    def __init__(self, scenes: Sequence[Scene], classes: tuple[str, ...] = ("Car", "Pedestrian")) -> None:
        self.scenes, self.classes, self.read = scenes, classes, 0

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        self.read += 1
        return self.scenes[index]


def coloured(name: str = "a") -> Scene:
    points = np.arange(12, dtype=np.float32).reshape(2, 6)
    return Scene(name, points, ("intensity", "time", "ring"))


@pytest.fixture(scope="module")
def streets() -> Frames:
    """Three simulated frames."""
    simulator = Simulator(frames=3, seed=1, sensor="beams16")
    return Frames([simulator[row] for row in range(3)], simulator.classes)


def same(one: Scene, two: Scene) -> bool:
    return np.array_equal(one.points, two.points) and np.array_equal(one.boxes, two.boxes)


def test_features_are_chosen_in_the_models_order() -> None:
    scene = coloured()
    chosen = choose_features(scene, ("ring", "intensity"))
    assert chosen.features == ("ring", "intensity")
    assert chosen.points.tolist() == [[0, 1, 2, 5, 3], [6, 7, 8, 11, 9]]
    assert choose_features(scene, ()).points.tolist() == [[0, 1, 2], [6, 7, 8]]
    assert choose_features(scene, ["intensity", "time", "ring"]) is scene


def test_a_feature_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"frame a: .* no feature 'colour', .* only intensity, time, ring"):
        choose_features(coloured(), ("intensity", "colour"))
    with pytest.raises(ValueError, match="no feature 'intensity', as the model takes, only none"):
        choose_features(Scene("b", np.zeros((1, 3), np.float32)), ("intensity",))


def test_kept_frames_are_read_once() -> None:
    source = Frames([coloured("a"), coloured("b")])
    kept, fresh = SceneDataset(source, ("time",), keep=True), SceneDataset(source, ("time",))
    assert len(kept) == 2
    assert kept[1] is kept[1]
    assert kept[1].id == "b"
    assert source.read == 1
    assert fresh[0] is not fresh[0]
    assert source.read == 3


def test_changes_follow_the_global_seed_and_leave_kept_frames_alone(streets: Frames) -> None:
    scenes = SceneDataset(streets, ("intensity",), keep=True)
    before = [(scenes[row].points.copy(), scenes[row].boxes.copy()) for row in range(3)]
    sampling = GroundTruthSampling(ObjectDatabase.collect(streets.scenes, ["Car"]), {"Car": 12})
    changing = Augmentation(flip_x=True, translation=0.5, object_rotation=0.3, object_translation=0.3)
    dataset = AugmentedScenes(scenes, sampling, changing)
    assert len(dataset) == 3
    torch.manual_seed(7)
    first = [dataset[row] for row in range(3)]
    second = [dataset[row] for row in range(3)]
    torch.manual_seed(7)
    again = [dataset[row] for row in range(3)]
    assert all(same(one, two) for one, two in zip(first, again))
    assert not any(same(one, two) for one, two in zip(first, second))
    assert any(len(one.boxes) > len(scenes[row].boxes) for row, one in enumerate(first))
    for row, (points, boxes) in enumerate(before):
        assert np.array_equal(scenes[row].points, points)
        assert np.array_equal(scenes[row].boxes, boxes)


def test_without_changes_frames_come_as_they_are(streets: Frames) -> None:
    scenes = SceneDataset(streets, ("intensity",), keep=True)
    assert AugmentedScenes(scenes, None, None)[1] is scenes[1]


def test_loaders(streets: Frames) -> None:
    turned = Augmentation(flip_y=False, rotation=1.0, scaling=(1, 1))
    data = PointCloudData(
        CLASSES, train=streets, val=streets, test=streets, augmentation=turned, batch_size=2, seed=3
    )
    batches: list[SceneBatch] = list(data.train_dataloader())
    ids = [scene.id for batch in batches for scene in batch.scenes]
    assert [len(batch) for batch in batches] == [2, 1]
    assert sorted(ids) == [scene.id for scene in streets.scenes]
    assert ids == [scene.id for batch in data.train_dataloader() for scene in batch.scenes]
    by_id = {scene.id: scene for scene in streets.scenes}
    changed = batches[0].scenes[0]
    assert not np.array_equal(changed.points, by_id[changed.id].points)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        plain = [scene for batch in loader for scene in batch.scenes]
        assert all(one is two for one, two in zip(plain, streets.scenes, strict=True))
    labels = batches[0].labels[0]
    wanted = [CLASSES.index(name) for name in changed.names if name in CLASSES]
    assert labels.tolist() == wanted


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": []}, r"classes=\[\]: give the names"),
        ({"classes": ["Car", "Tram"]}, "data.train, a Simulator, has no 'Tram', only Car, Pedestrian, Cycl"),
        ({"sample": {"Truck": 3}}, "sample: Truck=3 must be one of Car, Pedestrian, and at least 0"),
        ({"sample": {"Car": -1}}, "sample: Car=-1 must be one of Car, Pedestrian, and at least 0"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PointCloudData(**{"classes": CLASSES, "train": Simulator(frames=1), **settings})


def test_a_source_of_unlabelled_frames_suits_any_class() -> None:
    assert PointCloudData(["Tram"], test=Frames([coloured()], classes=())).classes == ("Tram",)


def test_a_missing_and_an_empty_source_are_named() -> None:
    data = PointCloudData(CLASSES, train=Simulator(frames=0))
    with pytest.raises(ValueError, match=r"data\.train holds no frame"):
        data.setup("fit")
    for stage, name in {"validate": "val", "test": "test", "predict": "test"}.items():
        with pytest.raises(ValueError, match=rf"data\.{name} is not given: name a source of frames"):
            data.setup(stage)
    with pytest.raises(FileNotFoundError, match=r"'nowhere\.bin' does not exist"):
        PointCloudData(CLASSES, predict="nowhere.bin").setup("predict")


def test_predict_takes_a_file_or_a_folder(tmp_path: Path) -> None:
    for row in range(3):
        np.full((4 + row, 5), row, np.float32).tofile(tmp_path / f"{row}.bin")

    def scenes(path: Path) -> list[Scene]:
        data = PointCloudData(CLASSES, features=["intensity", "time"], predict=str(path), batch_size=2)
        data.setup("predict")
        return [scene for batch in data.predict_dataloader() for scene in batch.scenes]

    found = scenes(tmp_path)
    assert [scene.id for scene in found] == ["0", "1", "2"]
    assert [scene.points.shape for scene in found] == [(4, 5), (5, 5), (6, 5)]
    (alone,) = scenes(tmp_path / "1.bin")
    assert alone.id == "1"
    assert np.array_equal(alone.points, found[1].points)


def test_predicting_keeps_no_frame_in_memory(streets: Frames) -> None:
    data = PointCloudData(CLASSES, test=streets, keep=True)
    assert data.scenes("test").keep
    assert not data.scenes("predict").keep


def test_the_database_is_made_once_and_read_back(streets: Frames, tmp_path: Path) -> None:
    path = tmp_path / "objects.npz"
    settings: dict[str, Any] = {"sample": {"Car": 12}, "database": str(path), "seed": 0}
    data = PointCloudData(CLASSES, train=streets, **settings)
    data.prepare_data()
    stored = ObjectDatabase.load(path)
    collected = ObjectDatabase.collect(streets.scenes, ["Car"])
    assert set(stored.names) == {"Car"}
    np.testing.assert_array_equal(stored.boxes, collected.boxes)
    np.testing.assert_array_equal(stored.points, collected.points)
    written = path.stat().st_mtime_ns
    data.prepare_data()
    assert path.stat().st_mtime_ns == written

    def boxes(**keywords: Any) -> list[list[Any]]:
        torch.manual_seed(1)
        loader = PointCloudData(CLASSES, train=streets, **keywords).train_dataloader()
        return [scene.boxes.tolist() for batch in loader for scene in batch.scenes]

    in_memory = boxes(**{**settings, "database": None})
    assert in_memory == boxes(**settings)
    assert sum(map(len, in_memory)) > sum(len(scene.boxes) for scene in streets.scenes)


def test_only_training_makes_the_database(streets: Frames, tmp_path: Path) -> None:
    path = tmp_path / "new/objects.npz"
    data = PointCloudData(CLASSES, test=streets, sample={"Car": 2}, database=str(path))
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    data.trainer.state.fn = "test"  # type: ignore[assignment]
    data.prepare_data()
    assert not path.exists()
    training = PointCloudData(CLASSES, train=streets, sample={"Car": 2}, database=str(path))
    training.prepare_data()
    assert len(ObjectDatabase.load(path)) > 5


def test_a_class_without_objects_cannot_be_sampled(streets: Frames) -> None:
    data = PointCloudData(["Car", "Truck"], train=streets, sample={"Car": 2, "Truck": 1})
    none = [scene for scene in streets.scenes if "Truck" not in scene.names]
    data.sources["train"] = Frames(none, streets.classes)
    with pytest.raises(ValueError, match="counts: the database has no object of class 'Truck', only Car"):
        data.train_dataloader()
