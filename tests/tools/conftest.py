from pathlib import Path

import pytest


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in an empty folder that holds toy.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "toy.yaml").write_text(
        """
trainer: {max_epochs: 3, accelerator: cpu, enable_progress_bar: false}
model:
  class_path: toy_domain.Toy
  init_args:
    features: ${data.init_args.features}
    backbone: {mixer: gla, dim: 8, heads: 2}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1}}
data:
  class_path: toy_domain.ToyData
"""
    )
    return tmp_path
