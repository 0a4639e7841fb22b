"""Simulated frames as a dataset."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np

from ....core.files import write_whole
from ..scene import Scene, SceneSource
from .labels import label
from .layout import LAYOUTS, World, compose
from .objects import CLASSES
from .render import sweep
from .sensor import SENSORS, Sensor

# Frames in a cache that were made by another version of the simulator are not used.
_VERSION = 2


class Simulator(SceneSource):
    """Streets seen by a simulated LiDAR; each frame is drawn from the seed and its number alone.

    Coordinates are the sensor's; the ground below it is at z = −1.73 m. Boxes are tight around the whole
    object, hidden sides too; objects without a point are left out. Attributes of the boxes: see `label`.

    Args:
        frames: how many.
        seed: another one gives other streets.
        sensor: name of a sensor (`SENSORS`) or one of your own.
        layout: ``"train"``, or ``"shifted"`` for streets of another kind, with unlabelled shapes that the
            others do not have, seen by a sensor with other beams: what a detector meets away from where it
            learnt.
        cache: folder to keep frames in once they are made, or ``None``.

    Raises:
        ValueError: an unknown sensor or layout, or a negative number of frames or seed.
        IndexError: a frame outside ``0 … frames − 1``.
    """

    classes: tuple[str, ...] = CLASSES
    features: tuple[str, ...] = ("intensity",)

    def __init__(
        self,
        frames: int = 500,
        seed: int = 0,
        sensor: Literal["beams16", "beams32", "beams64", "ring32"] | Sensor = "beams32",
        layout: Literal["train", "shifted"] = "train",
        cache: str | Path | None = None,
    ) -> None:
        if frames < 0 or seed < 0:
            raise ValueError(f"simulator: frames {frames} and seed {seed}: neither may be negative")
        if isinstance(sensor, str):
            if sensor not in SENSORS:
                raise ValueError(f"simulator: sensor '{sensor}' is unknown: give one of {', '.join(SENSORS)}")
            sensor = SENSORS[sensor]
        if layout not in LAYOUTS:
            raise ValueError(f"simulator: layout '{layout}' is unknown: give one of {', '.join(LAYOUTS)}")
        self.frames, self.seed, self.layout = frames, seed, layout
        self.sensor = sensor.shifted() if layout == "shifted" else sensor
        settings = repr((_VERSION, seed, layout, self.sensor))
        self.cache = Path(cache) / hashlib.sha256(settings.encode()).hexdigest()[:16] if cache else None

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.frames:
            raise IndexError(f"simulator: frame {index} of {self.frames}")
        if self.cache is None:
            return self._make(index)
        path = self.cache / f"{index:06d}.npz"
        if path.is_file():
            return self._read(path, index)
        scene = self._make(index)
        _write(path, scene)
        return scene

    def world(self, index: int) -> World:
        """What stands in frame ``index``, seen or not; any sensor sees the same."""
        # Places 0 and 1 of the last number keep the world's draws apart from the sensor's.
        generator = np.random.default_rng([self.seed, index, list(LAYOUTS).index(self.layout), 0])
        return compose(LAYOUTS[self.layout], generator, behind=self.sensor.sector > 90)

    def _make(self, index: int) -> Scene:
        world = self.world(index)
        generator = np.random.default_rng([self.seed, index, list(LAYOUTS).index(self.layout), 1])
        seen = sweep(world.parts, world.ground, len(world.boxes), self.sensor, generator)
        boxes, names, attributes = label(world, seen, self.sensor)
        return Scene(self._id(index), seen.points, self.features, boxes, names, attributes=attributes)

    def _id(self, index: int) -> str:
        return f"{self.layout}-{self.seed}-{index:06d}"

    def _read(self, path: Path, index: int) -> Scene:
        with np.load(path) as file:
            frame = [file[f"frame/{name}"] for name in ("points", "boxes", "names")]
            boxed = [name for name in file.files if name.startswith("box/")]
            attributes = {name.removeprefix("box/"): file[name] for name in boxed}
        points, boxes, names = frame
        return Scene(self._id(index), points, self.features, boxes, names, attributes=attributes)


def _write(path: Path, scene: Scene) -> None:
    """Write whole or not at all: other workers may look for the same frame."""
    arrays = {"frame/points": scene.points, "frame/boxes": scene.boxes, "frame/names": scene.names}
    arrays |= {f"box/{name}": values for name, values in scene.attributes.items()}

    def save(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    write_whole(path, save)
