"""SemanticKITTI: the scans of KITTI's odometry benchmark, whole circles without boxes."""

from pathlib import Path

from ..scene import Scene
from .point_files import COLUMNS, read_points
from .source import Source, folder, one_of

SPLITS = {
    "train": tuple(f"{i:02d}" for i in range(11) if i != 8),
    "val": ("08",),
    "test": tuple(f"{i:02d}" for i in range(11, 22)),
}


class SemanticKitti(Source):
    """Scans of ``root/sequences/<sequence>/velodyne/*.bin``, called ``<sequence>_<number>``; points only.

    Args:
        root: the folder.
        split: ``train``, ``val`` or ``test``, by sequences (Behley et al., ICCV 2019).

    Raises:
        FileNotFoundError: no sequence of the split is there.
        ValueError: an unknown split.
    """

    def __init__(self, root: str | Path, split: str = "train") -> None:
        self.split = one_of(split, SPLITS, "split")
        self.root = folder(root, "sequences", what="SemanticKITTI")
        self.keys = [
            path
            for sequence in SPLITS[split]
            for path in sorted((self.root / sequence / "velodyne").glob("*.bin"))
        ]
        if not self.keys:
            raise FileNotFoundError(
                f"SemanticKITTI: '{self.root}' has no scan of the split {split}:"
                f" {SPLITS[split][0]}/velodyne/*.bin …"
            )

    def read(self, key: Path) -> Scene:
        """Read the scan in file ``key``."""
        points, features = read_points(key, COLUMNS)
        return Scene(f"{key.parts[-3]}_{key.stem}", points, features, meta={"source": str(key)})
