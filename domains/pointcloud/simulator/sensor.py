"""LiDARs: where their beams point and what noise they have."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Elevations of an HDL-64E in degrees: 32 upper beams every third of a degree, 32 lower ones every half.
_HDL64 = tuple(2 - beam / 3 for beam in range(32)) + tuple(-8.83 - beam / 2 for beam in range(32))


@dataclass(frozen=True)
class Sensor:
    """A spinning LiDAR at the origin.

    Attributes:
        elevations: angle of each beam in degrees, 0 at the horizon, upwards positive.
        azimuth_step: degrees between two firings.
        sector: degrees seen to either side of x; 180 is a full turn.
        max_range: metres.
        range_noise: standard deviation of a distance, metres.
        angle_noise: standard deviation of a direction, radians.
        drop: share of the rays that are lost whatever they hit.

    Raises:
        ValueError: no beam, or a sector or step that gives no firing.
    """

    elevations: tuple[float, ...] = _HDL64
    azimuth_step: float = 0.17
    sector: float = 40.7
    max_range: float = 80.0
    range_noise: float = 0.02
    angle_noise: float = 2e-4
    drop: float = 0.05

    def __post_init__(self) -> None:
        if not self.elevations:
            raise ValueError("sensor: elevations is empty: give the angle of at least one beam in degrees")
        if not 0 < self.azimuth_step <= self.sector <= 180:
            raise ValueError(
                f"sensor: azimuth_step {self.azimuth_step} and sector {self.sector} degrees:"
                " give 0 < azimuth_step ≤ sector ≤ 180"
            )

    @property
    def full_turn(self) -> bool:
        """Whether it looks all around."""
        return self.sector == 180

    @property
    def azimuths(self) -> NDArray[np.float64]:
        """Angle of each firing in radians, ascending, counter-clockwise: ``(A,)``."""
        count = int(2 * self.sector / self.azimuth_step + 1e-9)
        return np.asarray(np.radians((np.arange(count) - (count - 1) / 2) * self.azimuth_step))

    @property
    def beams(self) -> NDArray[np.float64]:
        """Elevation of each beam in radians, descending: ``(E,)``."""
        return np.asarray(np.radians(np.sort(self.elevations)[::-1]))

    def rays(self, generator: np.random.Generator) -> Floats:
        """Unit directions with their noise: ``(3, E, A)``."""
        elevation, azimuth = self.beams[:, None], self.azimuths[None, :]
        shape = (len(self.elevations), azimuth.shape[1])
        noise = generator.standard_normal((2, *shape), dtype=np.float32) * np.float32(self.angle_noise)
        elevation, azimuth = (
            (elevation + noise[0]).astype(np.float32),
            (azimuth + noise[1]).astype(np.float32),
        )
        level = np.cos(elevation)
        return np.stack([level * np.cos(azimuth), level * np.sin(azimuth), np.sin(elevation)])

    def shifted(self) -> "Sensor":
        """Another make with as many beams: evenly spaced ones, and firings 15 % further apart."""
        low, high = min(self.elevations) + 1.5, max(self.elevations) + 1.0
        even = tuple(float(angle) for angle in np.linspace(high, low, len(self.elevations)))
        return replace(self, elevations=even, azimuth_step=min(1.15 * self.azimuth_step, self.sector))


SENSORS = {
    "beams16": Sensor(_HDL64[::4], azimuth_step=0.5),
    "beams32": Sensor(_HDL64[::2], azimuth_step=0.35),
    "beams64": Sensor(),
    "ring32": Sensor(tuple(10.67 - 4 / 3 * beam for beam in range(32)), azimuth_step=0.35, sector=180.0),
}
