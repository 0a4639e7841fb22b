"""Things that carry no label: some as large as a car, some as slim as a person, and what lines a street."""

from collections.abc import Callable

import numpy as np

from .objects import bicycle
from .shapes import Parts, Shape, assemble, part

Maker = Callable[[np.random.Generator], Parts]


def _block(length: float, width: float, height: float, reflectivity: float, base: float = 0.0) -> Parts:
    centre, half = (0.0, 0.0, base + height / 2), (length / 2, width / 2, height / 2)
    return assemble([part(Shape.BOX, centre, half, reflectivity=reflectivity)])


def _column(radius: float, height: float, reflectivity: float) -> Parts:
    centre, half = (0.0, 0.0, height / 2), (radius, radius, height / 2)
    return assemble([part(Shape.CYLINDER, centre, half, reflectivity=reflectivity)])


def _foliage(length: float, width: float, height: float, base: float = 0.0, free_path: float = 0.7) -> Parts:
    centre, half = (0.0, 0.0, base + height / 2), (length / 2, width / 2, height / 2)
    return assemble([part(Shape.ELLIPSOID, centre, half, reflectivity=0.45, free_path=free_path)])


def _dumpster(g: np.random.Generator) -> Parts:
    return _block(
        g.uniform(2.5, 4.5), g.uniform(1.4, 1.9), g.uniform(1.1, 1.7), g.uniform(0.1, 0.6), base=0.1
    )


def _container(g: np.random.Generator) -> Parts:
    """As long and tall as a lorry's load, and so is its end; only a cab and wheels tell them apart."""
    return _block(
        g.uniform(6, 12), 2.45, g.uniform(2.4, 3.0), g.uniform(0.2, 0.8), base=g.choice([0.05, 0.9])
    )


def _hedge(g: np.random.Generator) -> Parts:
    length, width, height = g.uniform(2.5, 6), g.uniform(0.8, 1.8), g.uniform(1.0, 1.8)
    box = part(
        Shape.BOX, (0, 0, height / 2), (length / 2, width / 2, height / 2), reflectivity=0.45, free_path=0.15
    )
    return assemble([box])


def _trailer(g: np.random.Generator) -> Parts:
    length, width, top = g.uniform(2.5, 4.2), g.uniform(1.5, 1.9), g.uniform(0.9, 1.8)
    return np.concatenate(
        [
            _block(length, width, top - 0.4, g.uniform(0.2, 0.7), base=0.4),
            assemble(
                [
                    part(Shape.ELLIPSOID, (0, y * width / 2, 0.3), (0.3, 0.1, 0.3), reflectivity=0.1)
                    for y in (1, -1)
                ]
            ),
        ]
    )


def _bin(g: np.random.Generator) -> Parts:
    return _column(g.uniform(0.22, 0.35), g.uniform(0.9, 1.3), g.uniform(0.15, 0.7))


def _post(g: np.random.Generator) -> Parts:
    return _column(g.uniform(0.06, 0.2), g.uniform(1.2, 2.2), g.uniform(0.2, 0.8))


def _bush(g: np.random.Generator) -> Parts:
    width = g.uniform(0.6, 1.1)
    return _foliage(width * g.uniform(1, 2.2), width, g.uniform(1.0, 1.8), free_path=0.2)


def _parked_bicycle(g: np.random.Generator) -> Parts:
    return assemble(bicycle(g))


def _sign(g: np.random.Generator) -> Parts:
    height = g.uniform(1.6, 2.3)
    board = part(Shape.BOX, (0, 0, height), (0.03, 0.3, 0.3), reflectivity=0.95)
    return np.concatenate([_column(0.04, height, 0.5), assemble([board])])


def _pole(g: np.random.Generator) -> Parts:
    return _column(g.uniform(0.08, 0.16), g.uniform(4, 8), g.uniform(0.2, 0.5))


def _tree(g: np.random.Generator) -> Parts:
    trunk, crown = g.uniform(1.8, 3.0), g.uniform(2.5, 5.0)
    stem = _column(g.uniform(0.1, 0.25), trunk + 0.5, 0.3)
    return np.concatenate([stem, _foliage(crown, crown, g.uniform(2.5, 5), base=trunk)])


def facade(g: np.random.Generator) -> Parts:
    """The front of a house."""
    return _block(g.uniform(8, 20), 1.0, g.uniform(4, 10), g.uniform(0.2, 0.6))


def hoarding(g: np.random.Generator, width: float) -> Parts:
    """A board on the ground, taller than a car, ``width`` metres along x."""
    return _block(width, 0.15, g.uniform(1.8, 2.8), g.uniform(0.2, 0.7))


# The shapes below are met in shifted layouts only.


def _kiosk(g: np.random.Generator) -> Parts:
    return np.concatenate(
        [_block(2.2, 1.7, 1.0, 0.3), _block(2.6, 2.0, 0.15, 0.5, base=2.2), _column(0.08, 2.2, 0.3)]
    )


def _log_pile(g: np.random.Generator) -> Parts:
    half = g.uniform(1.2, 2.2)
    rows = [
        part(Shape.ELLIPSOID, (0, y, z), (half, 0.32, 0.32), reflectivity=g.uniform(0.2, 0.5))
        for y, z in ((-0.6, 0.3), (0, 0.3), (0.6, 0.3), (-0.3, 0.85), (0.3, 0.85))
    ]
    return assemble(rows)


def _tank(g: np.random.Generator) -> Parts:
    radius = g.uniform(0.7, 1.0)
    hull = part(
        Shape.CYLINDER,
        (0, 0, 0.3 + radius),
        (radius, radius, g.uniform(1.4, 2.6)),
        pitch=np.pi / 2,
        reflectivity=g.uniform(0.3, 0.8),
    )
    return assemble([hull])


def _advertising_column(g: np.random.Generator) -> Parts:
    return _column(g.uniform(0.4, 0.65), g.uniform(1.9, 2.6), g.uniform(0.3, 0.7))


def _hydrant(g: np.random.Generator) -> Parts:
    return np.concatenate([_column(0.15, 0.8, 0.5), _block(0.5, 0.16, 0.16, 0.5, base=0.5)])


def _bench(g: np.random.Generator) -> Parts:
    return np.concatenate([_block(1.7, 0.45, 0.08, 0.4, base=0.42), _block(1.7, 0.06, 0.4, 0.4, base=0.5)])


def _parasol(g: np.random.Generator) -> Parts:
    shade = part(Shape.ELLIPSOID, (0, 0, 2.0), (0.9, 0.9, 0.25), reflectivity=0.6)
    return np.concatenate([_column(0.04, 2.0, 0.3), assemble([shade])])


#: As large as a car or a lorry.
LARGE: tuple[Maker, ...] = (_dumpster, _container, _hedge, _trailer)
#: As slim as a person or a bicycle.
SLIM: tuple[Maker, ...] = (_bin, _post, _bush, _parked_bicycle, _sign)
#: What stands along a kerb and is taller than any object.
TALL: tuple[Maker, ...] = (_pole, _tree)
UNSEEN_LARGE: tuple[Maker, ...] = (_kiosk, _log_pile, _tank)
UNSEEN_SLIM: tuple[Maker, ...] = (_advertising_column, _hydrant, _bench, _parasol)
