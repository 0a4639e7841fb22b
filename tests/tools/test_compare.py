import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mainstem.core.config import BackboneConfig
from mainstem.core.mixers import MIXERS
from mainstem.core.training.module import parameters
from mainstem.tools import compare, comparison
from mainstem.tools.errors import UserError
from mainstem.tools.matching import TOLERANCE, match
from mainstem.tools.results import Result

CONFIG = """
model:
  class_path: sequence_domain.SequenceTask
  init_args:
    backbone: {mixer: attention, dim: 16, depth: 1, heads: 2, backend: chunked, options: {rotary: false}}
data:
  class_path: sequence_domain.SequenceData
trainer:
  max_epochs: 2
"""


class Folder:
    """A comparison of two mixers with two seeds that ran once."""

    def __init__(self, path: Path) -> None:
        self.path, self.report = path, path / "out"
        self.arguments = ["-c", str(path / "config.yaml"), "--mixers", "attention,lru", "--seeds", "2"]
        (path / "config.yaml").write_text(CONFIG)

    def compare(self, *more: str) -> int:
        return compare.main([*self.arguments, "--output", str(self.report), *more])

    def results(self) -> dict[str, float]:
        """When each result was written."""
        return {str(p.relative_to(self.report)): p.stat().st_mtime for p in self.report.rglob("result.json")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        patch.setenv("OMP_NUM_THREADS", "1")
        folder = Folder(tmp_path_factory.mktemp("compare"))
        assert folder.compare() == 0
        yield folder


def test_the_csv_has_a_line_for_every_mixer_and_baseline(done: Folder) -> None:
    with (done.report / "compare.csv").open(newline="") as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert list(lines) == ["attention", "lru", "zero"]
    assert lines["zero"]["kind"] == "baseline"
    assert lines["zero"]["mse_std"] == ""
    for name in ("attention", "lru"):
        line = lines[name]
        values = [json.loads((done.report / name / f"seed{s}" / "metrics.json").read_text()) for s in (0, 1)]
        mean = sum(value["metrics"]["mse"] for value in values) / 2
        assert float(line["mse_mean"]) == pytest.approx(mean)
        assert float(line["mse_std"]) > 0
        assert abs(float(line["parameters_vs_reference"])) <= TOLERANCE
        assert float(line["train_tokens_per_s"]) > 0
        assert float(line["inference_us_per_token"]) > 0
        assert int(line["peak_bytes"]) > 50e6
        assert int(line["context_tokens"]) == 12
    # A cache of keys and values for 12 tokens and its position, against one complex number a channel.
    assert 0 <= int(lines["attention"]["state_bytes"]) - 12 * 2 * 16 * 4 <= 16
    assert 0 < int(lines["lru"]["state_bytes"]) < 12 * 2 * 16 * 4


def test_every_training_is_counted_and_followed(done: Folder) -> None:
    for name in done.results():
        result = Result.load((done.report / name).parent)
        assert result is not None
        assert (result.steps, result.epochs) == (4, 2)
        assert result.train_tokens == 3 * 4 * 12  # without the first of the four steps
        assert [step for step, _ in result.curve] == [0, 2, 4]
        assert bool(result.pictures) == (result.seed == 0)


def test_the_page_shows_table_figures_and_pictures(done: Folder) -> None:
    page = (done.report / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert page.count('src="data:image/png;base64,') == 2
    assert "--mixers attention,lru" in page
    assert "class_path: sequence_domain.SequenceTask" in page


def test_the_same_call_trains_nothing_again(done: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = done.results()
    monkeypatch.setattr("mainstem.tools.comparison.subprocess.Popen", None)
    monkeypatch.setattr(comparison, "find_sizes", None)
    (done.report / "report.html").unlink()
    assert done.compare() == 0
    assert done.results() == before
    assert (done.report / "report.html").is_file()


def test_an_interrupted_comparison_trains_only_what_is_missing(done: Folder) -> None:
    before = done.results()
    (done.report / "lru" / "seed1" / "result.json").unlink()
    assert done.compare() == 0
    after = done.results()
    assert {name for name in after if after[name] != before[name]} == {"lru/seed1/result.json"}


def test_other_arguments_need_another_folder(
    done: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="holds a comparison with another configuration, other overrides"):
        done.compare("--trainer.max_epochs=3")
    monkeypatch.chdir(tmp_path)

    def find(*overrides: str) -> Path:
        config = str(done.path / "config.yaml")
        return comparison.Comparison.prepare([config], overrides, ["lru"], 1, None).folder

    first = find()
    assert first == Path("compare/config")
    first.mkdir(parents=True)
    (first / "request.json").write_text((done.report / "request.json").read_text())
    assert find() == first
    assert find("--trainer.max_epochs=3") == Path("compare/config-2")


def test_a_configuration_that_is_refused_is_told_in_one_sentence(done: Folder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"backbone.depht is unknown: did you mean 'depth'"):
        compare.main([*done.arguments, "--output", str(tmp_path / "new"), "--model.backbone.depht=3"])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixers", "gla,nope"], "--mixers: 'nope' is unknown, choose from attention"),
        (["--mixers", ","], "--mixers names none"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["-c", "nope.yaml"], "config 'nope.yaml' is neither a file nor one of"),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        compare.main(["-c", "config.yaml", *arguments])
    assert not (tmp_path / "compare").exists()


def count_backbone(config: BackboneConfig) -> int:
    with torch.device("meta"):
        return parameters(config.build())


@pytest.mark.parametrize("channel_mixer", ["swiglu", "none"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_is_matched_within_the_tolerance(mixer: Any, channel_mixer: Any) -> None:
    reference = BackboneConfig(mixer="gla", dim=64, channel_mixer=channel_mixer)
    outside = 5000

    def count(dim: int, hidden: int) -> int:
        config = BackboneConfig(mixer=mixer, dim=dim, hidden=hidden, channel_mixer=channel_mixer)
        return outside * dim // 64 + count_backbone(config)

    target = outside + count_backbone(reference)
    size = match(count, target, dim=64, heads=4)
    if channel_mixer == "swiglu":
        assert size.dim == 64
        assert size.matched
    assert size.matched == (abs(size.parameters / target - 1) <= 0.03)
    assert count(size.dim, size.hidden or 8) == size.parameters


def test_a_mixer_that_cannot_be_matched_says_so() -> None:
    size = match(lambda dim, hidden: 10**6, 1000, dim=64, heads=4)
    assert not size.matched
    assert size.deviation == pytest.approx(999)


def test_another_width_is_tried_where_the_channel_mixer_is_not_enough() -> None:
    def count(dim: int, hidden: int) -> int:
        return 40 * dim**2 + 3 * dim * hidden

    size = match(count, 20 * 64**2, dim=64, heads=4)
    assert size.matched
    assert size.dim < 64
