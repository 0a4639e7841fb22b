"""Where things stand: a street with parked rows, traffic, people on its pavements, and unlabelled things."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .distractors import LARGE, SLIM, TALL, UNSEEN_LARGE, UNSEEN_SLIM, Maker, facade, hoarding
from .ground import Ground
from .objects import OBJECTS
from .shapes import Doubles, Parts, assemble, bounds, place

#: Height of the ground below the sensor, metres.
GROUND = -1.73
#: How far from the sensor things stand, metres.
REACH = 70.0
_CLEAR = 4.0  # radius around the sensor that stays free
_TRIES = 8


@dataclass(frozen=True)
class Layout:
    """How streets are drawn; counts are means over 70 m of street.

    Attributes:
        half_width: least and greatest half width of the street, metres.
        heading: standard deviation of the street's direction from x, radians.
        rows: probability that a side has a parked row.
        across: probability that a row is parked across instead of along the kerb.
        gap: least and greatest gap between parked cars, metres.
        traffic: cars on the street.
        turned: cars that stand at any angle.
        trucks: lorries and buses.
        split: share of them with a hoarding before their middle, which parts their points in two.
        pedestrians: people on the pavements; some walk in pairs.
        crossing: people on the street.
        cyclists: on the street and along its edge.
        large: unlabelled things as large as a car.
        slim: unlabelled things as slim as a person.
        tall: poles and trees.
        large_makers: what the large things are.
        slim_makers: what the slim things are.
    """

    half_width: tuple[float, float] = (4.5, 7.5)
    heading: float = 0.06
    rows: float = 0.5
    across: float = 0.25
    gap: tuple[float, float] = (0.6, 2.0)
    traffic: float = 2.0
    turned: float = 1.5
    trucks: float = 1.2
    split: float = 0.35
    pedestrians: float = 3.5
    crossing: float = 1.0
    cyclists: float = 3.5
    large: float = 9.5
    slim: float = 9.0
    tall: float = 5.0
    large_makers: tuple[Maker, ...] = LARGE
    slim_makers: tuple[Maker, ...] = SLIM


_TRAIN = Layout()
LAYOUTS = {
    "train": _TRAIN,
    "shifted": replace(
        _TRAIN,
        half_width=(6.0, 10.0),
        heading=0.2,
        rows=0.4,
        across=0.6,
        gap=(0.4, 3.0),
        traffic=3.0,
        turned=2.5,
        large_makers=LARGE[:2] + UNSEEN_LARGE,
        slim_makers=SLIM[:2] + UNSEEN_SLIM,
    ),
}


@dataclass(frozen=True)
class World:
    """Everything around the sensor.

    Attributes:
        parts: what rays meet; ``owner`` is the place in the boxes.
        boxes: float64 ``(M, 7)``, tight around all parts of each object.
        names: class of each object.
        ground: what all of it stands on.
    """

    parts: Parts
    boxes: Doubles
    names: tuple[str, ...]
    ground: Ground


def compose(layout: Layout, generator: np.random.Generator, behind: bool = False) -> World:
    """Draw a world; ``behind`` also fills the street behind the sensor."""
    street = _Street(layout, generator, -REACH if behind else 0.0)
    street.fill(layout)
    return street.world()


class _Street:
    """A world in the making: a street along ``s`` with ``n`` to its left, and what stands there so far."""

    def __init__(self, layout: Layout, generator: np.random.Generator, start: float) -> None:
        self.generator, self.start = generator, start
        g = generator
        wave_number = 2 * np.pi / g.uniform(25, 80, 3)
        direction = g.uniform(0, 2 * np.pi, 3)
        waves = [g.uniform(0.03, 0.12, 3), wave_number * np.cos(direction), wave_number * np.sin(direction)]
        self.ground = Ground(
            height=GROUND,
            slope=(g.normal(0, 0.01), g.normal(0, 0.01)),
            waves=np.stack([*waves, g.uniform(0, 2 * np.pi, 3)], 1),
            heading=g.normal(0, layout.heading),
            offset=g.uniform(0.5, 3.0),
            half_width=g.uniform(*layout.half_width),
            kerb=g.uniform(0.05, 0.16),
        )
        self.parts: list[Parts] = []
        self.footprints: list[tuple[float, float, float, float, float]] = [(0, 0, 2 * _CLEAR, 2 * _CLEAR, 0)]
        self.boxes: list[list[float]] = []
        self.names: list[str] = []

    def fill(self, layout: Layout) -> None:
        """Put everything on the street, what has a label first."""
        g, edge = self.generator, self.ground.half_width
        lane = edge / 2
        for side in (1, -1):
            if g.random() < layout.rows:
                self._parked_row(layout, side)
        for _ in range(self._count(layout.trucks)):
            side = self._side()
            across = side * g.choice([lane, edge - 1.6])
            along = self._object("Truck", (8, REACH), across, 0.0 if side < 0 else np.pi, 0.05)
            if along is not None and g.random() < layout.split:
                self._stand_between(along, across)
        for _ in range(self._count(layout.traffic)):
            side = self._side()
            self._object("Car", (8, REACH), side * lane, 0.0 if side < 0 else np.pi, 0.1)
        for _ in range(self._count(layout.turned)):
            self._object("Car", (8, REACH), g.uniform(-edge - 5, edge + 5), g.uniform(-np.pi, np.pi))
        for _ in range(self._count(layout.pedestrians)):
            across, yaw = self._side() * (edge + g.uniform(0.0, 3.5)), g.choice([0, np.pi]) + g.normal(0, 0.5)
            along = self._object("Pedestrian", (5, 40), across, yaw)
            if g.random() < 0.25 and along is not None:
                self._object("Pedestrian", (along - 0.5, along + 0.5), across + self._side() * 0.75, yaw)
        for _ in range(self._count(layout.crossing)):
            self._object("Pedestrian", (5, 40), g.uniform(-edge, edge), self._side() * np.pi / 2, 0.3)
        for _ in range(self._count(layout.cyclists)):
            side = self._side()
            across = side * (edge + g.uniform(-2.5, 1.5))
            self._object("Cyclist", (6, 42), across, 0.0 if side < 0 else np.pi, 0.25)
        self._distractors(layout)

    def _parked_row(self, layout: Layout, side: int) -> None:
        """Cars along one kerb; most look one way, as they came."""
        g, edge = self.generator, self.ground.half_width
        across = g.random() < layout.across
        along = self.start + g.uniform(6, 30)
        end = along + g.uniform(12, 40)
        while along < min(end, REACH):
            if g.random() < 0.6:
                yaw = np.pi / 2 if across else 0.0
                yaw += np.pi if g.random() < (0.3 if side < 0 else 0.7) else 0.0
                kerb = edge - (2.3 if across else 1.0)
                self._object("Car", (along, along), side * kerb, yaw, 0.03)
            along += (1.9 if across else 4.3) + g.uniform(*layout.gap)

    def _stand_between(self, along: float, across: float) -> None:
        """Put a hoarding on the line from the sensor to a place of the street."""
        g, offset = self.generator, self.ground.offset
        share, width = g.uniform(0.4, 0.85), g.uniform(1.0, 2.5)
        yaw = np.arctan2(across + offset, along) + np.pi / 2
        self._put(hoarding(g, width), share * along, share * (across + offset) - offset, yaw)

    def _distractors(self, layout: Layout) -> None:
        g, edge = self.generator, self.ground.half_width
        pavement = g.uniform(4, 9)
        for side in (1, -1):
            along = self.start
            while along < REACH + 10:
                house = facade(g)
                length = 2 * house["half"][0, 0]
                if g.random() < 0.75:
                    self._put(house, along + length / 2, side * (edge + pavement + g.uniform(0.6, 2.5)), 0.0)
                along += length + g.uniform(0.5, 6)
        for _ in range(self._count(layout.large)):
            yaw = g.choice([0, np.pi / 2]) + g.normal(0, 0.2)
            across = self._side() * (edge + g.uniform(-0.5, 6.0))
            self._put_somewhere(layout.large_makers, (5, REACH), across, yaw)
        for _ in range(self._count(layout.slim)):
            across = self._side() * (edge + g.uniform(-0.3, 3.5))
            self._put_somewhere(layout.slim_makers, (5, 55), across, g.uniform(-np.pi, np.pi))
        for _ in range(self._count(layout.tall)):
            self._put_somewhere(TALL, (6, REACH), self._side() * (edge + g.uniform(0.4, 1.2)), 0.0)

    def _count(self, mean: float) -> int:
        return int(self.generator.poisson(mean * (1 - self.start / REACH)))

    def _side(self) -> int:
        """Left or right, 1 or -1; traffic keeps to the right."""
        return 1 if self.generator.random() < 0.5 else -1

    def _along(self, span: tuple[float, float]) -> float:
        low, high = span
        along = float(self.generator.uniform(low, high))
        return -along if self.start < 0 and high > low + 2 and self.generator.random() < 0.5 else along

    def _object(
        self, name: str, span: tuple[float, float], across: float, yaw: float, spread: float = 0.0
    ) -> float | None:
        """Put an object where there is room and say where along the street, or ``None``."""
        parts = OBJECTS[name](self.generator)
        yaw += float(self.generator.normal(0, spread))
        for _ in range(_TRIES if span[1] > span[0] else 1):
            along = self._along(span)
            if self._put(parts, along, across, yaw, name):
                return along
        return None

    def _put_somewhere(
        self, makers: tuple[Maker, ...], span: tuple[float, float], across: float, yaw: float
    ) -> None:
        parts = makers[self.generator.integers(len(makers))](self.generator)
        any(self._put(parts, self._along(span), across, yaw) for _ in range(_TRIES))

    def _put(self, parts: Parts, along: float, across: float, yaw: float, name: str = "") -> bool:
        """Put ``parts`` at a place of the street if nothing stands there yet."""
        heading = self.ground.heading
        cos, sin = float(np.cos(heading)), float(np.sin(heading))
        across += self.ground.offset
        x, y, yaw = cos * along - sin * across, sin * along + cos * across, yaw + heading
        low, high = bounds(parts)
        middle, size = (low + high) / 2, high - low
        turn, lift = float(np.cos(yaw)), float(np.sin(yaw))
        centre = x + turn * middle[0] - lift * middle[1], y + lift * middle[0] + turn * middle[1]
        footprint = (*centre, size[0], size[1], yaw)
        if _overlaps(footprint, np.array(self.footprints)).any():
            return False
        z = float(self.ground.at(np.array(x), np.array(y)))
        self.footprints.append(footprint)
        self.parts.append(place(parts, x, y, z, yaw, len(self.boxes) if name else -1))
        if name:
            angle = (yaw + np.pi) % (2 * np.pi) - np.pi
            self.boxes.append([*centre, z + middle[2], *size, angle])
            self.names.append(name)
        return True

    def world(self) -> World:
        """What stands there now."""
        boxes = np.array(self.boxes, np.float64).reshape(-1, 7)
        return World(np.concatenate([assemble([]), *self.parts]), boxes, tuple(self.names), self.ground)


def _overlaps(
    one: tuple[float, float, float, float, float], others: Doubles, clearance: float = 0.3
) -> NDArray[np.bool_]:
    """Whether rectangle ``one`` (x, y, dx, dy, yaw) comes nearer than ``clearance`` to ``others`` (K, 5).

    Two rectangles are apart if they are along an edge of either (the separating axes).
    """
    yaw = np.stack(np.broadcast_arrays(one[4], others[:, 4]))
    x, y = others[:, 0] - one[0], others[:, 1] - one[1]
    along, across = np.cos(yaw) * x + np.sin(yaw) * y, np.cos(yaw) * y - np.sin(yaw) * x
    cos, sin = np.abs(np.cos(yaw[1] - yaw[0])), np.abs(np.sin(yaw[1] - yaw[0]))
    halves = np.stack(np.broadcast_arrays(np.array(one[2:4])[:, None], others[:, 2:4].T)) / 2  # (2, 2, K)
    length, width = halves[:, 0], halves[:, 1]
    meets_along = np.abs(along) < length + cos * length[::-1] + sin * width[::-1] + clearance
    meets_across = np.abs(across) < width + sin * length[::-1] + cos * width[::-1] + clearance
    return np.asarray((meets_along & meets_across).all(0))
