"""The labelled objects, each built of parts in its own frame: x forward, the ground at z = 0."""

from collections.abc import Callable

import numpy as np

from .shapes import Parts, Row, Shape, assemble, part

#: The classes that the simulator labels.
CLASSES = ("Car", "Pedestrian", "Cyclist", "Truck")

_GLASS = 0.55  # share of rays that pass a car's windows


def _paint(generator: np.random.Generator) -> float:
    """Reflectivity of a vehicle: some are so dark that they return little."""
    return 0.08 if generator.random() < 0.15 else float(generator.uniform(0.2, 0.75))


def _wheel(x: float, y: float, radius: float) -> Row:
    return part(Shape.ELLIPSOID, (x, y, radius), (radius, 0.1, radius), reflectivity=0.1)


def car(generator: np.random.Generator) -> Parts:
    """A saloon, a hatchback or a van: body, cabin with windows, roof, four wheels."""
    length, width, height = generator.normal([4.0, 1.65, 1.52], [0.35, 0.09, 0.08]).clip(
        [3.2, 1.4, 1.3], [5, 1.9, 1.8]
    )
    waist, paint = 0.56 * height, _paint(generator)
    # Front and back of the cabin, as shares of the length from the middle.
    front, back = ((0.17, -0.33), (0.2, -0.47), (0.34, -0.48))[generator.integers(3)]
    middle, reach = length * (front + back) / 2, length * (front - back) / 2
    half = width / 2
    rows = [
        part(Shape.BOX, (0, 0, (waist + 0.2) / 2), (length / 2, half, (waist - 0.2) / 2), reflectivity=paint),
        part(
            Shape.BOX,
            (middle, 0, (waist + height) / 2),
            (reach, 0.86 * half, (height - waist) / 2),
            reflectivity=0.15,
            transparency=_GLASS,
        ),
        part(Shape.BOX, (middle, 0, height - 0.03), (0.88 * reach, 0.8 * half, 0.03), reflectivity=paint),
    ]
    rows += [_wheel(x * length, y * (half - 0.1), 0.31) for x in (0.3, -0.3) for y in (1, -1)]
    return assemble(rows)


def truck(generator: np.random.Generator) -> Parts:
    """A lorry with a cab apart from its load, or a bus with windows along its side; 8 to 14 m long."""
    length, half = generator.uniform(8, 14), generator.uniform(1.2, 1.3)
    height, paint = generator.uniform(2.9, 3.7), _paint(generator)
    if generator.random() < 0.35:
        rows = [
            part(Shape.BOX, (0, 0, 0.85), (length / 2, half, 0.5), reflectivity=paint),
            part(Shape.BOX, (0, 0, 1.85), (length / 2, half, 0.5), reflectivity=0.15, transparency=_GLASS),
            part(
                Shape.BOX,
                (0, 0, (height + 2.35) / 2),
                (length / 2, half, (height - 2.35) / 2),
                reflectivity=paint,
            ),
        ]
    else:
        cab, gap = generator.uniform(1.8, 2.4), generator.uniform(0.4, 1.2)
        load = length - cab - gap
        top = generator.uniform(2.5, 3.0)
        rows = [
            part(Shape.BOX, (length / 2 - cab / 2, 0, 1.0), (cab / 2, 0.95 * half, 0.6), reflectivity=paint),
            part(
                Shape.BOX,
                (length / 2 - cab / 2 - 0.1, 0, (top + 1.6) / 2),
                (cab / 2 - 0.1, 0.95 * half, (top - 1.6) / 2),
                reflectivity=0.6 * paint,
                transparency=0.3,
            ),
            part(
                Shape.BOX,
                (load / 2 - length / 2, 0, (height + 1.0) / 2),
                (load / 2, half, (height - 1.0) / 2),
                reflectivity=generator.uniform(0.2, 0.8),
            ),
            part(Shape.BOX, (0, 0, 0.85), (0.46 * length, 0.4, 0.12), reflectivity=0.1),
        ]
    places = (0.36, -0.28, -0.38)
    rows += [_wheel(x * length, y * (half - 0.12), 0.48) for x in places for y in (1, -1)]
    return assemble(rows)


def _person(generator: np.random.Generator, height: float, x: float = 0.0, lean: float = 0.0) -> list[Row]:
    """Head, torso and arms of somebody whose hips are ``0.5 height`` above the ground at ``x``."""
    cloth = generator.uniform(0.15, 0.7)
    torso, build = 0.19 * height, generator.uniform(0.2, 0.29)
    ahead = x + torso * np.sin(lean)
    rows = [
        part(
            Shape.ELLIPSOID,
            (ahead, 0, (0.5 + 0.17 * np.cos(lean)) * height),
            (0.14, build, torso),
            pitch=lean,
            reflectivity=cloth,
        ),
        part(
            Shape.ELLIPSOID,
            (x + 0.44 * height * np.sin(lean), 0, (0.5 + 0.43 * np.cos(lean)) * height),
            (0.1, 0.09, 0.07 * height),
            reflectivity=0.4,
        ),
    ]
    swing = generator.uniform(-0.5, 0.5)
    for side in (1, -1):
        forward = 0.75 * lean if lean else side * swing
        rows.append(
            part(
                Shape.ELLIPSOID,
                (ahead + 0.15 * height * np.sin(forward), side * build, 0.6 * height),
                (0.055, 0.055, 0.17 * height),
                pitch=-forward,
                reflectivity=cloth,
            )
        )
    return rows


def pedestrian(generator: np.random.Generator) -> Parts:
    """Somebody who walks or stands: head, torso, two arms, two legs that stride."""
    height = float(np.clip(generator.normal(1.74, 0.1), 1.45, 1.98))
    stride = generator.uniform(0.1, 0.65)
    rows = _person(generator, height)
    leg = 0.25 * height
    for side in (1, -1):
        # Shortened as it leans, so that the foot stays on the ground.
        half = leg / np.cos(stride)
        rows.append(
            part(
                Shape.ELLIPSOID,
                (-side * leg * np.tan(stride), side * 0.1, leg),
                (0.08, 0.08, half),
                pitch=side * stride,
                reflectivity=0.25,
            )
        )
    return assemble(rows)


def bicycle(generator: np.random.Generator) -> list[Row]:
    """Two wheels that rays mostly pass, a frame and a handlebar."""
    axle, metal = generator.uniform(0.5, 0.56), generator.uniform(0.2, 0.7)
    rows = [
        part(Shape.ELLIPSOID, (x, 0, 0.34), (0.34, 0.03, 0.34), reflectivity=0.2, transparency=0.6)
        for x in (axle, -axle)
    ]
    rows.append(part(Shape.BOX, (0, 0, 0.62), (0.4, 0.03, 0.16), reflectivity=metal, transparency=0.4))
    rows.append(part(Shape.BOX, (0.42, 0, 1.0), (0.05, 0.28, 0.04), reflectivity=metal))
    return rows


def cyclist(generator: np.random.Generator) -> Parts:
    """Somebody who leans forward on a bicycle."""
    height = float(np.clip(generator.normal(1.74, 0.08), 1.5, 1.95))
    rows = bicycle(generator) + _person(generator, height, x=-0.15, lean=generator.uniform(0.2, 0.7))
    phase = generator.uniform(-0.12, 0.12)
    for side in (1, -1):
        rows.append(
            part(
                Shape.ELLIPSOID,
                (side * phase, side * 0.12, 0.58),
                (0.08, 0.07, 0.36),
                pitch=-0.35 + side * phase,
                reflectivity=0.25,
            )
        )
    return assemble(rows)


OBJECTS: dict[str, Callable[[np.random.Generator], Parts]] = {
    "Car": car,
    "Pedestrian": pedestrian,
    "Cyclist": cyclist,
    "Truck": truck,
}
