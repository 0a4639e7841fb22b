"""The field's data sets, and folders of one's own, as `Scene`s: each a `Dataset[Scene]` that reads lazily."""

from .argoverse2 import Argoverse2 as Argoverse2
from .folder import Folder as Folder
from .kitti import Kitti as Kitti
from .kitti_tracking import KittiTracking as KittiTracking
from .nuscenes import NuScenes as NuScenes
from .once import Once as Once
from .point_files import read_points as read_points
from .semantic_kitti import SemanticKitti as SemanticKitti
