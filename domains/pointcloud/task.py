"""Training, evaluation and prediction of the detector."""

import re
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torchmetrics import MeanMetric

from ...core import BackboneConfig
from ...core.training import DomainModule, MetricInfo, read_checkpoint
from ...core.training.module import parameters
from ...core.training.optim import Schedule
from .batch import SceneBatch
from .cloud_checks import CloudStatistics, check_cloud, summarize
from .clustering import SIZES, Clustering, cluster
from .data import DEFAULT_FEATURES, PointCloudData
from .detections import Detections
from .grid import Grid
from .kitti_labels import Calibration
from .lion import Lion
from .metrics import Argoverse2AP, BoxMetric, KittiAP, NuScenesAP, OnceAP
from .model import Detector, MakeBEV, MakeHead, MakeLion
from .predictions import Format, write_pictures, write_predictions
from .rnn import GroupRNN
from .scene import Scene

MetricName = Literal["kitti", "nuscenes", "once", "argoverse2"]
METRICS: dict[str, type[BoxMetric]] = {
    "kitti": KittiAP,
    "nuscenes": NuScenesAP,
    "once": OnceAP,
    "argoverse2": Argoverse2AP,
}
# So many training frames say what a cloud usually looks like.
_TYPICAL_FRAMES = 20
BASELINE = "clustering"


class Predicted:
    """What was found in one frame. (Not a dataclass: Lightning would take it apart.)

    Args:
        scene: the frame.
        detections: its boxes.
        findings: what looks wrong with its points; see `check_cloud`.
    """

    def __init__(self, scene: Scene, detections: Detections, findings: dict[str, str]) -> None:
        self.scene, self.detections, self.findings = scene, detections, findings


class PointCloudDetector(DomainModule):
    """LION and a head over the bird's-eye view, scored by the rules of a public benchmark.

    Args:
        backbone: the group RNNs: `dim` channels of a voxel, `depth` levels of a block's U-net.
        grid: range and voxels, metres.
        classes: names of the classes.
        bev: the 2D backbone; None where the head works on sparse voxels.
        head: the head.
        features: names of the points' features.
        lion: the 3D backbone.
        momentum: of the running statistics in the voxel feature encoder; larger for short trainings.
        metric: whose rules score the validation and test frames.
        min_points: labelled boxes with fewer points do not count, where the rules are KITTI's.
        devkit: KITTI's official rule also for few labelled boxes; see `KittiAP`.
        ranges: distances in metres between which scores are given too, such as [0, 20, 40, 70].
        baseline: also score detection by geometry alone on the test frames.
        format: of the predicted boxes: "json", "kitti" or "nuscenes".
        threshold: least score of a box that is written and drawn.
        pictures: most frames that `predict` draws.
        weights: checkpoint of another training whose weights this one starts from, as far as they fit.
        optimizer: given the parameter groups, makes the optimizer.
        schedule: "constant", or "cosine" from the full learning rate to zero at the end of training.
        warmup_steps: optimizer steps over which the learning rate first rises linearly.
    """

    summary_metrics: ClassVar[dict[str, MetricInfo]] = {
        "mAP": ("higher", "%"),
        "NDS": ("higher", "%"),
        "loss": ("lower", ""),
    }
    monitor: ClassVar[str] = "val/mAP"
    unsaved: ClassVar[tuple[str, ...]] = ("optimizer", "lion", "bev", "head", "weights")

    def __init__(
        self,
        backbone: BackboneConfig,
        grid: Grid,
        classes: list[str],
        bev: MakeBEV | None,
        head: MakeHead,
        features: list[str] | None = None,
        lion: MakeLion = Lion,
        momentum: float = 0.01,
        metric: MetricName = "kitti",
        min_points: int = 0,
        devkit: bool = False,
        ranges: list[float] | None = None,
        baseline: bool = True,
        format: Format = "json",
        threshold: float = 0.3,
        pictures: int = 20,
        weights: str | None = None,
        optimizer: OptimizerCallable = AdamW,
        schedule: Schedule = "constant",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__(backbone, optimizer, schedule, warmup_steps)
        if metric not in METRICS:
            raise ValueError(f"metric={metric!r} is unknown: choose one of {', '.join(METRICS)}")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold={threshold} must be a score, from 0 to 1")
        if pictures < 0:
            raise ValueError(f"pictures={pictures} must be at least 0")
        self.grid = Grid(**grid) if isinstance(grid, dict) else grid  # a checkpoint keeps it plain
        self.classes = tuple(classes)
        self.features = DEFAULT_FEATURES if features is None else tuple(features)
        self.weights = weights
        self.format, self.threshold, self.pictures = format, threshold, pictures
        self.make_lion = lion
        self.model = Detector(
            self.backbone_config, self.grid, self.classes, len(self.features), lion, bev, head, momentum
        )
        self.clustering = None
        if baseline:
            known = {name: size for name, size in SIZES.items() if name in self.classes}
            self.clustering = Clustering(sizes=known) if known else None
        options: dict[str, Any] = {}
        if metric == "kitti":
            options = {"min_points": min_points, "devkit": devkit}
        if ranges is not None:
            options["ranges"] = tuple(ranges)

        def made() -> BoxMetric:
            return METRICS[metric](self.classes, **options)

        self.scores = nn.ModuleDict({"val": made(), "test": made(), BASELINE: made()})
        self.losses = nn.ModuleDict({"val": MeanMetric(), "test": MeanMetric()})
        self.typical: CloudStatistics | None = None

    @classmethod
    def shown(cls, name: str) -> bool:
        """Leave what is neither KITTI's moderate level nor over the whole range to metrics.json."""
        other_level = any(word in name for word in ("easy", "hard", "r11"))
        return not other_level and re.match(r"[\d.e+]+-([\d.e+]+|inf)m ", name) is None

    def token_mixer(self) -> nn.Module:
        """The first of the group RNNs."""
        rnns = [part for part in self.modules() if isinstance(part, GroupRNN)]
        if not rnns:
            raise ValueError("model.lion has rnn=False: there is no mixer to exchange")
        return rnns[0]

    def count_token_mixers(self, config: BackboneConfig) -> int:
        """Parameters of all group RNNs, were they of ``config``."""
        with torch.device("meta"):
            lion = self.make_lion(config)
        return sum(parameters(part) for part in lion.modules() if isinstance(part, GroupRNN))

    @property
    def data(self) -> PointCloudData:
        """The data module of the trainer."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, PointCloudData):
            raise ValueError(f"data must be a PointCloudData, not {type(data).__name__}")
        return data

    def setup(self, stage: str) -> None:
        """Check that the data are those of the model, and take up the weights to start from.

        Raises:
            ValueError: other classes or features, or weights that do not fit.
        """
        for name in ("classes", "features"):
            own, given = getattr(self, name), getattr(self.data, name)
            if own != given:
                raise ValueError(f"model.{name}={list(own)} but data.{name}={list(given)}")
        if stage == "fit" and self.typical is None:
            scenes = self.data.scenes("train")
            step = max(1, len(scenes) // _TYPICAL_FRAMES)
            self.typical = CloudStatistics.of((scenes[row] for row in range(0, len(scenes), step)), self.grid)
        weights, self.weights = self.weights, None
        # A checkpoint that is going to be loaded holds all weights.
        if weights is not None and self.trainer.ckpt_path is None:
            take_weights(self, Path(weights))

    def forward(self, batch: SceneBatch) -> list[Detections]:
        """The boxes of each frame, best first."""
        return self.model.detections(self.model(batch))

    def training_step(self, batch: SceneBatch, batch_index: int) -> Tensor:
        """Sum of the head's losses."""
        parts = self.model.loss(self.model(batch), batch)
        loss = torch.stack(list(parts.values())).sum()
        logged = {"train/loss": loss, **{f"train/{name}": value for name, value in parts.items()}}
        self.log_dict(logged, on_step=False, on_epoch=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: SceneBatch, batch_index: int) -> None:
        """Add frames to the validation metrics."""
        self._evaluate("val", batch)

    def test_step(self, batch: SceneBatch, batch_index: int) -> None:
        """Add frames to the test metrics, and to those of the baseline."""
        self._evaluate("test", batch)
        if self.clustering is not None:
            found = [self._clusters(scene) for scene in batch.scenes]
            self.scores[BASELINE].update(found, batch.scenes)  # type: ignore[operator]

    def _clusters(self, scene: Scene) -> Detections:
        """What geometry alone finds, of the classes whose size is known."""
        assert self.clustering is not None
        names = list(self.clustering.sizes)
        found = cluster(scene, names, self.clustering)
        places = torch.tensor([self.classes.index(name) for name in names])
        return replace(found, labels=places[found.labels])

    def _evaluate(self, stage: str, batch: SceneBatch) -> None:
        outputs = self.model(batch)
        parts = self.model.loss(outputs, batch)
        self.losses[stage].update(torch.stack(list(parts.values())).sum(), len(batch))  # type: ignore[operator]
        self.scores[stage].update(self.model.detections(outputs), batch.scenes)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log("val", "val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics and the baseline's."""
        self._log("test", "test")
        if self.clustering is not None:
            self._log(BASELINE, f"test/{BASELINE}")

    def _log(self, scores: str, prefix: str) -> None:
        metric: Any = self.scores[scores]
        named = {name.replace("/", " "): value for name, value in metric.compute().items()}
        metric.reset()
        if scores == "val":  # curves of a hundred scores would help nobody
            named = {name: value for name, value in named.items() if self.shown(name)}
        values = {f"{prefix}/{name}": value for name, value in named.items()}
        if scores in self.losses:
            if named["mAP"].isnan():
                warnings.warn(
                    f"data.{scores}: no labelled box of {', '.join(self.classes)} counts by the metric's"
                    " rules: there is nothing to score",
                    stacklevel=2,
                )
            mean: Any = self.losses[scores]
            values[f"{prefix}/loss"] = mean.compute()
            mean.reset()
        # Every process has computed the same from what all of them have seen.
        self.log_dict({name: value for name, value in values.items() if not value.isnan()})

    def on_predict_start(self) -> None:
        """Begin to count the frames that will be drawn."""
        self._to_draw = self.pictures

    def predict_step(self, batch: SceneBatch, batch_index: int = 0) -> list[Predicted]:
        """What was found in each frame, on the CPU; the points only of frames that will be drawn."""
        found = []
        for scene, detections in zip(batch.scenes, self(batch)):
            findings = check_cloud(scene, self.grid, self.typical)
            kept = scene if self._to_draw > 0 else replace(scene, points=scene.points[:0].copy())
            self._to_draw -= 1
            found.append(Predicted(kept, detections.to("cpu"), findings))
        return found

    def write_predictions(
        self, outputs: list[Any], datamodule: LightningDataModule, directory: Path
    ) -> list[Path]:
        """Write the boxes of each frame and pictures of the first ones; warn of clouds that look wrong."""
        predicted: list[Predicted] = [one for output in outputs for one in output]
        scenes, detections = [one.scene for one in predicted], [one.detections for one in predicted]
        for sentence in summarize({one.scene.id: one.findings for one in predicted}):
            warnings.warn(sentence, stacklevel=2)
        best = max((float(one.scores.max()) for one in detections if len(one)), default=0.0)
        if best < self.threshold:
            warnings.warn(
                f"no box reaches threshold={self.threshold:g}: the best score is {best:.2f}", stacklevel=2
            )
        written = write_predictions(
            detections,
            scenes,
            directory,
            classes=self.classes,
            format=self.format,
            threshold=self.threshold,
            calibration=Calibration.default(),
        )
        few = slice(0, self.pictures)
        written += write_pictures(
            detections[few],
            scenes[few],
            directory / "pictures",
            classes=self.classes,
            threshold=self.threshold,
            grid=self.grid,
        )
        return written

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the training clouds look like."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["typical"] = None if self.typical is None else asdict(self.typical)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up what the training clouds look like.

        Raises:
            ValueError: the checkpoint holds another class, or a model of other object classes or features.
        """
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY, {})
        for name in ("classes", "features"):
            before, now = saved.get(name, ()), getattr(self, name)
            before = DEFAULT_FEATURES if before is None else tuple(before)
            if name in saved and before != now:
                raise ValueError(f"the checkpoint has {name}={list(before)}, the model {name}={list(now)}")
        typical = checkpoint.get("typical")
        self.typical = None if typical is None else CloudStatistics(**typical)


def take_weights(module: PointCloudDetector, path: Path) -> None:
    """Load the weights of a checkpoint that fit ``module``; warn of those that do not.

    Raises:
        ValueError: the file is no checkpoint, or none of its weights fits.
    """
    found, own = read_checkpoint(path)["state_dict"], module.state_dict()
    fitting = {name: value for name, value in found.items() if name in own and own[name].shape == value.shape}
    if not fitting:
        raise ValueError(f"weights={str(path)!r}: none of its weights fits this model")
    others = [name for name in own if name not in fitting]
    if others:
        warnings.warn(
            f"weights={str(path)!r}: {len(others)} of {len(own)} tensors start anew, first {others[0]}",
            stacklevel=2,
        )
    module.load_state_dict(fitting, strict=False)
