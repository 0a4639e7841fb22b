"""The ground: a street with kerbs on land that slopes and undulates."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Ground:
    """Heights of the ground around the sensor, in metres.

    Attributes:
        height: of the point below the sensor, negative.
        slope: rise along x and y.
        waves: ``(K, 4)``: amplitude, wave numbers along x and y (rad/m), phase.
        heading: direction of the street, radians.
        offset: of the street's middle from the sensor, to the left.
        half_width: from the street's middle to a kerb.
        kerb: height of the kerbs.
    """

    height: float
    slope: tuple[float, float]
    waves: Doubles
    heading: float
    offset: float
    half_width: float
    kerb: float

    def across(self, x: Doubles, y: Doubles) -> Doubles:
        """Distance from the middle of the street, to the left."""
        return np.asarray(np.cos(self.heading) * y - np.sin(self.heading) * x - self.offset)

    def at(self, x: Doubles, y: Doubles) -> Doubles:
        """Height at the places ``(x, y)``."""
        total = self.height + self.slope[0] * x + self.slope[1] * y
        for amplitude, kx, ky, phase in self.waves:
            total = total + amplitude * (np.sin(kx * x + ky * y + phase) - np.sin(phase))
        return total + self.kerb * (np.abs(self.across(x, y)) > self.half_width)

    def reflectivity(self, x: Doubles, y: Doubles) -> Doubles:
        """Of asphalt between the kerbs, of paving beyond."""
        return np.where(np.abs(self.across(x, y)) > self.half_width, 0.32, 0.17)

    def distances(self, rays: Floats, azimuths: Doubles, reach: float) -> Doubles:
        """Distance along ``rays`` (3, E, A) to the ground, infinite beyond ``reach``: ``(E, A)``.

        Below each azimuth the ground's slope as seen from the sensor is tabulated outwards; the first place
        that reaches as high as the ray is where the ray ends, so rises hide what lies behind them.
        """
        radii = np.geomspace(1.5, reach, 128)
        x, y = np.cos(azimuths)[:, None] * radii, np.sin(azimuths)[:, None] * radii
        seen = np.maximum.accumulate(self.at(x, y) / radii, axis=1)
        level = np.hypot(rays[0], rays[1]).astype(np.float64)
        tangent = rays[2] / level
        # One search for all azimuths: each gets a stretch of numbers of its own.
        stretch = 10.0 * np.arange(len(azimuths))
        inside = np.clip(tangent, seen[:, 0], seen[:, -1])
        found = np.interp(inside + stretch, (seen + stretch[:, None]).ravel(), np.tile(radii, len(azimuths)))
        return np.asarray(np.where(tangent <= seen[:, -1], found, np.inf) / level)
