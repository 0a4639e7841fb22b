import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mainstem import Backbone
from mainstem.core.hub import CONFIG, WEIGHTS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    Backbone(dim=8, heads=2, mixer=["gla", "attention"], options={"window": 4}).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_saved_backbone_comes_back_the_same(bidirectional: bool, mixer_name: Any, tmp_path: Path) -> None:
    net = Backbone(dim=8, heads=2, mixer=mixer_name, bidirectional=bidirectional, layer_scale=0.1)
    net.save_pretrained(tmp_path)
    loaded = Backbone.from_pretrained(tmp_path)
    x = torch.randn(2, 5, 8)
    assert loaded.config == net.config
    assert not loaded.training
    assert torch.equal(loaded(x), net(x))
    assert not list(tmp_path.glob("*.part"))


def test_options_survive(saved: Path) -> None:
    loaded = Backbone.from_pretrained(str(saved))
    assert loaded.config.options == {"window": 4}
    assert loaded.config.mixer == ["gla", "attention"]


def test_compiling_leaves_the_keys(saved: Path) -> None:
    net = Backbone.from_pretrained(saved)
    keys = list(net.state_dict())
    net.compile(backend="eager")
    assert list(net.state_dict()) == keys


def _truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors is damaged or truncated"),
        (lambda folder: (folder / WEIGHTS).write_bytes(b""), "model.safetensors is damaged or truncated"),
        (lambda folder: (folder / WEIGHTS).unlink(), "has no model.safetensors"),
        (lambda folder: (folder / CONFIG).write_text("{"), "config.json is damaged"),
        (lambda folder: (folder / CONFIG).unlink(), "is no folder or repository with a config.json"),
        (_change_config(**{"class": "AudioNet"}), "holds AudioNet, not Backbone"),
        (_change_config(depth=3), "model.safetensors does not fit config.json"),
        (_change_config(mixer="nope"), r"backbone\.mixer = 'nope'"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_sentence(
    damage: Callable[[Path], Any], message: str, saved: Path
) -> None:
    damage(saved)
    with pytest.raises(ValueError, match=message) as caught:
        Backbone.from_pretrained(saved)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_another_class_is_refused(saved: Path) -> None:
    class Other(Backbone):
        pass

    with pytest.raises(ValueError, match="holds Backbone, not Other"):
        Other.from_pretrained(saved)


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no folder, and no repository that can be reached"):
        Backbone.from_pretrained(tmp_path / "absent")
