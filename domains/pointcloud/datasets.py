"""Frames on their way from a source to a batch: chosen features, kept in memory, changed at random."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from .augment import Augmentation
from .ground_truth import GroundTruthSampling
from .scene import Scene, SceneSource


class SceneDataset(Dataset[Scene]):
    """The frames of a source with the features that the model takes, in the model's order.

    Args:
        source: any dataset of frames.
        features: names of the features, all of which the frames must have.
        keep: hold every frame in memory once it was read.
    """

    def __init__(self, source: SceneSource, features: Sequence[str], keep: bool = False) -> None:
        self.source, self.features, self.keep = source, tuple(features), keep
        self._kept: dict[int, Scene] = {}

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Scene:
        """Give frame ``index``.

        Raises:
            ValueError: it lacks a feature.
        """
        scene = self._kept.get(index)
        if scene is None:
            scene = choose_features(self.source[index], self.features)
            if self.keep:
                self._kept[index] = scene
        return scene


class AugmentedScenes(Dataset[Scene]):
    """Frames changed anew each time; what is drawn follows PyTorch's global generator.

    Args:
        scenes: the frames.
        sampling: puts further objects in, or ``None``.
        augmentation: moves objects and frame, or ``None``.
    """

    def __init__(
        self,
        scenes: SceneDataset,
        sampling: GroundTruthSampling | None,
        augmentation: Augmentation | None,
    ) -> None:
        self.scenes, self.sampling, self.augmentation = scenes, sampling, augmentation

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Scene:
        scene = self.scenes[index]
        generator = np.random.default_rng(int(torch.randint(2**62, ())))
        if self.sampling is not None:
            scene = self.sampling(scene, generator)
        if self.augmentation is not None:
            scene = self.augmentation(scene, generator)
        return scene


def choose_features(scene: Scene, features: Sequence[str]) -> Scene:
    """The frame with the points' ``features`` only, in that order.

    Raises:
        ValueError: it lacks one.
    """
    if scene.features == tuple(features):
        return scene
    missing = [name for name in features if name not in scene.features]
    if missing:
        has = ", ".join(scene.features) or "none"
        raise ValueError(
            f"frame {scene.id}: its points have no feature {missing[0]!r}, as the model takes, only {has}"
        )
    columns = [0, 1, 2, *(3 + scene.features.index(name) for name in features)]
    return replace(scene, points=np.ascontiguousarray(scene.points[:, columns]), features=tuple(features))
