"""A domain over sequences, so small that a whole comparison runs in a test: y_t is the running mean of x."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mainstem.core.training import DomainModule, MetricInfo


class SequenceData(LightningDataModule):
    def __init__(self, sequences: int = 8, length: int = 12) -> None:
        super().__init__()
        self.sequences, self.length = sequences, length

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        x = torch.randn(self.sequences, self.length, 2, generator=torch.Generator().manual_seed(0))
        steps = torch.arange(1, self.length + 1)[:, None]
        return DataLoader(TensorDataset(x, x.cumsum(1) / steps), batch_size=4)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class SequenceTask(DomainModule):
    summary_metrics: ClassVar[dict[str, MetricInfo]] = {"mse": ("lower", ""), "r2": ("higher", "")}
    monitor: ClassVar[str] = "val/mse"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.embed = nn.Linear(2, self.backbone_config.dim)
        self.backbone = self.backbone_config.build()
        self.readout = nn.Linear(self.backbone_config.dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.readout(self.backbone(self.embed(x)))
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def evaluate(self, batch: list[Tensor], stage: str) -> None:
        x, y = batch
        mse = (self(x) - y).square().mean()
        self.log(f"{stage}/mse", mse, batch_size=len(y))
        self.log(f"{stage}/r2", 1 - mse / y.var(), batch_size=len(y))
        if stage == "test":
            self.log("test/zero/mse", y.square().mean(), batch_size=len(y))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out

    def write_predictions(
        self, outputs: list[Tensor], datamodule: LightningDataModule, directory: Path
    ) -> list[Path]:
        figure = Figure(figsize=(3, 2))
        figure.subplots().plot(outputs[0][0].numpy())
        figure.savefig(directory / "first.png")
        return [directory / "first.png"]
