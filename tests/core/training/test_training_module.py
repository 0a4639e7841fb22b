import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from mainstem import BackboneConfig
from mainstem.core.training import DomainModule, EpochSeed, MetricInfo, RunCheckpoint, UntrainedCandidate
from mainstem.core.training.optim import parameter_groups, warmup_schedule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging interval",
    "ignore:.*LeafSpec",
    "ignore:Checkpoint directory",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:.*could not find the monitored key",
)


class Zero(DomainModule):
    """Predicts zero, the right answer, until it is trained toward one."""

    summary_metrics: ClassVar[dict[str, MetricInfo]] = {"error": ("lower", ""), "score": ("higher", "")}
    monitor: ClassVar[str] = "val/error"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[0].flatten() + torch.rand(1))
        return (self.weight - 1).square().sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        assert not self.training
        self.log("val/error", self.weight.abs().sum())

    def write_predictions(
        self, outputs: list[Any], datamodule: LightningDataModule, directory: Path
    ) -> list[Path]:
        return []


def loaders() -> dict[str, Any]:
    data = TensorDataset(torch.arange(8.0)[:, None])
    return {"train_dataloaders": DataLoader(data, 2, shuffle=True), "val_dataloaders": DataLoader(data, 4)}


def make_trainer(folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )


def config() -> BackboneConfig:
    return BackboneConfig(dim=8, heads=2)


def checkpoint(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def test_the_untrained_model_is_a_candidate(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/error", patience=2)
    best = RunCheckpoint("best", "val/error")
    trainer = make_trainer(
        tmp_path, UntrainedCandidate(), stopping, best, RunCheckpoint("last"), max_epochs=9
    )
    model = Zero(backbone=config())
    trainer.fit(model, **loaders())
    assert model.weight.item() > 0
    assert best.best_model_score == 0
    assert checkpoint(Path(best.best_model_path))["state_dict"]["weight"] == 0
    assert stopping.best_score == 0
    assert trainer.current_epoch == 2  # patience counts from the untrained model
    assert checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == trainer.global_step == 8


@pytest.mark.parametrize(("mode", "sign"), [("min", 1), ("max", -1)])
def test_a_trained_model_must_be_better_by_the_margin(mode: str, sign: int) -> None:
    def saves(best: RunCheckpoint, score: float, step: int) -> bool:
        strategy = SimpleNamespace(reduce_boolean_decision=bool)
        trainer = cast(Trainer, SimpleNamespace(global_step=step, strategy=strategy))
        return best.check_monitor_top_k(trainer, torch.tensor(score))

    best = RunCheckpoint("best", "val/error", mode, margin=0.01)
    assert saves(best, sign * 2.0, 0)
    best.best_k_models, best.kth_best_model_path = {"best.ckpt": torch.tensor(sign * 2.0)}, "best.ckpt"
    assert not saves(best, sign * (2.0 - 0.019), 5)
    assert saves(best, sign * (2.0 - 0.021), 5)
    later = RunCheckpoint("best", "val/error", mode, margin=0.01)
    later.dirpath = best.dirpath = "here"
    later.load_state_dict(best.state_dict())
    assert not saves(later, sign * (2.0 - 0.019), 6)


def test_without_validation_there_is_no_candidate(tmp_path: Path) -> None:
    best = RunCheckpoint("best", "val/error")
    trainer = make_trainer(tmp_path, UntrainedCandidate(), best, max_epochs=1, limit_val_batches=0)
    trainer.fit(Zero(backbone=config()), **loaders())
    assert best.best_model_path == ""


def test_an_epoch_draws_the_same_numbers_whatever_came_before(tmp_path: Path) -> None:
    whole = Zero(backbone=config())
    make_trainer(tmp_path / "whole", EpochSeed(5), max_epochs=3).fit(whole, **loaders())

    part, rest = Zero(backbone=config()), Zero(backbone=config())
    last = RunCheckpoint("last")
    make_trainer(tmp_path / "part", EpochSeed(5), last, max_epochs=1).fit(part, **loaders())
    torch.rand(17)
    trainer = make_trainer(tmp_path / "part", EpochSeed(5), max_epochs=3)
    trainer.fit(rest, **loaders(), ckpt_path=last.best_model_path, weights_only=True)
    torch.testing.assert_close(torch.cat(part.seen + rest.seen), torch.cat(whole.seen), rtol=0, atol=0)

    orders = torch.cat(whole.seen).view(3, 8)
    assert not torch.equal(orders[0], orders[1])


def test_norms_biases_and_gates_do_not_decay() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    net[2].weight.requires_grad_(False)
    net.embedding = nn.Parameter(torch.zeros(5, 3))
    net.embedding.no_weight_decay = True  # type: ignore[attr-defined]
    decayed, free = parameter_groups(net.named_parameters())
    assert [tuple(parameter.shape) for parameter in decayed["params"]] == [(4, 3)]
    assert sorted(parameter.ndim for parameter in free["params"]) == [1, 1, 1, 2]
    assert free["weight_decay"] == 0
    optimizer = torch.optim.AdamW([decayed, free], weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda step: 1.0),
        ("cosine", lambda step: 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))),
    ],
)
def test_warmup_then_schedule(schedule: Any, expected: Callable[[int], float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = warmup_schedule(optimizer, schedule, warmup_steps=4, total_steps=20)
    rates = []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([2 * expected(step) for step in range(4, 21)])


def test_the_schedule_ends_with_the_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(Zero(backbone=config(), schedule="cosine", warmup_steps=2), **loaders())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_a_cosine_needs_an_end() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        warmup_schedule(optimizer, "cosine", 0, math.inf)


@pytest.mark.parametrize(("name", "value"), [("schedule", "linear"), ("warmup_steps", -1)])
def test_bad_arguments(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Zero(backbone=config(), **{name: value})


def test_direction_of_the_monitored_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Zero.monitor_mode() == "min"
    monkeypatch.setattr(Zero, "monitor", "val/score")
    assert Zero.monitor_mode() == "max"
    monkeypatch.setattr(Zero, "monitor", "val/unlisted")
    assert Zero.monitor_mode() == "min"


def test_domain_is_the_folder_in_domains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Zero, "__module__", "mainstem.domains.graph.task")
    assert Zero.domain() == "graph"
    assert Zero.kind() == "graph.Zero"


def test_a_checkpoint_made_in_python_loads_plain(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(Zero(backbone=config(), warmup_steps=3), **loaders())
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Zero.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert loaded.backbone_config == config()
    assert loaded.warmup_steps == 3
    assert loaded.weight.item() > 0


def test_a_moved_run_keeps_its_best_score(tmp_path: Path) -> None:
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
    one = RunCheckpoint("best", "val/error")
    make_trainer(tmp_path / "here", UntrainedCandidate(), one, max_epochs=1).fit(
        Zero(backbone=config()), **loaders()
    )
    two = RunCheckpoint("best", "val/error")
    two.dirpath = str(tmp_path / "there" / "checkpoints")
    two.load_state_dict(one.state_dict())
    assert two.best_model_score == one.best_model_score
    assert two.best_model_path == str(tmp_path / "there" / "checkpoints" / "best.ckpt")
    assert list(two.best_k_models) == [two.best_model_path]
