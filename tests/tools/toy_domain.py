"""The smallest domain, a linear map, so that the tools are tested without one of the real domains."""

import csv
import os
import signal
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mainstem.core.training import DomainModule, MetricInfo


class ToyData(LightningDataModule):
    def __init__(
        self, rows: int = 32, features: int = 4, batch_size: int = 8, path: str | None = None
    ) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        self.rows, self.features, self.batch_size, self.path = rows, features, batch_size, path

    def setup(self, stage: str) -> None:
        if self.path is not None and not Path(self.path).is_file():
            raise FileNotFoundError(f"path={self.path!r} is not a file")
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.rows, self.features, generator=generator)
        self.dataset = TensorDataset(x, 2 * x.sum(1))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.dataset, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.dataset, batch_size=self.batch_size)

    test_dataloader = predict_dataloader = val_dataloader


class Toy(DomainModule):
    summary_metrics: ClassVar[dict[str, MetricInfo]] = {"mse": ("lower", "y²"), "r2": ("higher", "")}
    monitor: ClassVar[str] = "val/mse"

    def __init__(self, features: int = 4, dropout: float = 0.2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Dropout(dropout), nn.Linear(features, 1))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y.squeeze(-1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if os.environ.get("TOY_DIES_AT") == str(self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("TOY_STOPS_AT") == str(self.global_step):
            raise KeyboardInterrupt
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def evaluate(self, batch: list[Tensor], stage: str) -> None:
        x, y = batch
        mse = nn.functional.mse_loss(self(x), y)
        self.log(f"{stage}/mse", mse, batch_size=len(y), sync_dist=True)
        self.log(f"{stage}/r2", 1 - mse / y.var(correction=0), batch_size=len(y), sync_dist=True)
        self.log(f"{stage}/zero/mse", y.square().mean(), batch_size=len(y), sync_dist=True)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.forward(batch[0])

    def write_predictions(
        self, outputs: list[Tensor], datamodule: LightningDataModule, directory: Path
    ) -> list[Path]:
        target = directory / "predictions.csv"
        if os.environ.get("TOY_CANNOT_WRITE"):
            target.write_text("half")
            raise RuntimeError("disk full")
        with target.open("w", newline="") as file:
            csv.writer(file).writerows([[value] for value in torch.cat(outputs).tolist()])
        return [target]


class OtherToy(Toy):
    pass
