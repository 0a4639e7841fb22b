"""The data module of point clouds: any source of frames, changed at random for training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from ...core.files import write_whole
from ...core.training.data import DomainData
from .augment import Augmentation
from .batch import SceneBatch, collate
from .datasets import AugmentedScenes, SceneDataset
from .ground_truth import GroundTruthSampling, ObjectDatabase
from .readers import Folder
from .scene import Scene, SceneSource

DEFAULT_FEATURES = ("intensity",)
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}


class PointCloudData(DomainData):
    """Frames of one source for each of training, validation, test and prediction.

    Boxes of other classes than `classes` stay in the frames, where the metrics' rules need them, and are no
    targets. A frame without a box trains as one that holds nothing.

    Args:
        classes: names of the classes, as the sources have them.
        features: names of the points' features, as the sources have them.
        train: source of the frames to train on.
        val: source of the frames that choose the best checkpoint.
        test: source of the frames to report.
        predict: a file or folder of clouds to find boxes in; "test" takes the test frames.
        augmentation: random flips, turns, scales and shifts of training frames.
        sample: ground-truth sampling: how many objects of each class a training frame shall have.
        database: .npz file of the objects to sample from; it is made from the training frames where it is
            missing. None makes it in memory.
        keep: hold frames in memory once they were read; for small sets.
        batch_size: frames in a batch.
        num_workers: processes that prepare batches.
        pin_memory: page-locked batches.
        seed: of the training order; None takes the global seed.

    Raises:
        ValueError: a class that a source does not have, or no class.
    """

    def __init__(
        self,
        classes: list[str],
        features: list[str] | None = None,
        train: SceneSource | None = None,
        val: SceneSource | None = None,
        test: SceneSource | None = None,
        predict: str = "test",
        augmentation: Augmentation | None = None,
        sample: dict[str, int] | None = None,
        database: str | None = None,
        keep: bool = False,
        batch_size: int = 2,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size, num_workers, pin_memory, seed)
        self.classes = tuple(classes)
        self.features = DEFAULT_FEATURES if features is None else tuple(features)
        self.sources: dict[str, SceneSource | None] = {"train": train, "val": val, "test": test}
        self.predict_path = predict
        self.augmentation, self.sample, self.database, self.keep = augmentation, sample, database, keep
        self._sampling: GroundTruthSampling | None = None
        self._sets: dict[str, SceneDataset] = {}
        for name, source in self.sources.items():
            check_classes(self.classes, name, source)
        check_sample(sample, self.classes)

    def scenes(self, name: str) -> SceneDataset:
        """The frames of ``train``, ``val``, ``test`` or ``predict``.

        Raises:
            ValueError: the configuration gives no such source.
        """
        if name not in self._sets:
            source = self.sources.get(name)
            if name == "predict":
                source = self._to_predict()
            if source is None:
                raise ValueError(f"data.{name} is not given: name a source of frames, such as Kitti")
            if len(source) == 0:
                raise ValueError(f"data.{name} holds no frame")
            self._sets[name] = SceneDataset(source, self.features, self.keep and name != "predict")
        return self._sets[name]

    def _to_predict(self) -> SceneSource:
        if self.predict_path == "test":
            return self.scenes("test").source
        return Folder(self.predict_path, features=self.features)

    def prepare_data(self) -> None:
        """Write the database of objects before training, where one is wanted as a file and is not there."""
        training = self.trainer is None or self.trainer.state.fn == "fit"
        wanted = training and self.sample is not None and self.database is not None
        if wanted and not (path := Path(str(self.database))).is_file():
            write_whole(path, self._collect().save)

    def setup(self, stage: str) -> None:
        """Open the sources that ``stage`` needs.

        Raises:
            ValueError: one is missing or empty.
        """
        for name in STAGES[stage]:
            self.scenes(name)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled frames, each changed at random."""
        scenes: Dataset[Scene] = self.scenes("train")
        if self.sample is not None or self.augmentation is not None:
            scenes = AugmentedScenes(self.scenes("train"), self._ground_truth_sampling(), self.augmentation)
        return self.training_loader(scenes, self._collate)

    def val_dataloader(self) -> DataLoader[Any]:
        """Frames in order."""
        return self.evaluation_loader(self.scenes("val"), self._collate)

    def test_dataloader(self) -> DataLoader[Any]:
        """Frames in order."""
        return self.evaluation_loader(self.scenes("test"), self._collate)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Frames in order."""
        return self.evaluation_loader(self.scenes("predict"), self._collate)

    def _collate(self, scenes: Sequence[Scene]) -> SceneBatch:
        return collate(scenes, self.classes)

    def _ground_truth_sampling(self) -> GroundTruthSampling | None:
        if self.sample is not None and self._sampling is None:
            stored = self.database is not None and Path(self.database).is_file()
            database = ObjectDatabase.load(str(self.database)) if stored else self._collect()
            self._sampling = GroundTruthSampling(database, self.sample)
        return self._sampling

    def _collect(self) -> ObjectDatabase:
        scenes = self.scenes("train")
        frames = (scenes[row] for row in track(range(len(scenes)), "objects to sample", transient=True))
        return ObjectDatabase.collect(frames, list(self.sample or {}))


def check_classes(classes: Sequence[str], name: str, source: SceneSource | None) -> None:
    """Refuse classes that a source cannot label.

    Raises:
        ValueError: there is one, or no class at all.
    """
    if not classes:
        raise ValueError("classes=[]: give the names of the classes to detect")
    known = () if source is None else source.classes
    unknown = [one for one in classes if one not in known]
    if known and unknown:
        raise ValueError(
            f"classes: data.{name}, a {type(source).__name__}, has no {unknown[0]!r}, only {', '.join(known)}"
        )


def check_sample(sample: Mapping[str, int] | None, classes: Sequence[str]) -> None:
    """Refuse sampling of classes that are not detected.

    Raises:
        ValueError: that is so, or a number is negative.
    """
    for name, count in (sample or {}).items():
        if name not in classes or count < 0:
            raise ValueError(f"sample: {name}={count} must be one of {', '.join(classes)}, and at least 0")
