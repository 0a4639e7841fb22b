import base64
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from mainstem.tools import report
from mainstem.tools.comparison import Comparison
from mainstem.tools.results import Result
from mainstem.tools.summary import Summary, Values, format_bytes, summarise

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Tables(HTMLParser):
    """Collects the cells of every row, those of the class ``best``, and every link out of the page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.best: list[str] = []
        self.links: list[str] = []
        self._cell: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = []
            self._best = given.get("class") == "best"

    def handle_data(self, data: str) -> None:
        if self._cell is not None:
            self._cell.append(data)

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th") and self._cell is not None:
            self.rows[-1].append(" ".join(self._cell))
            if self._best:
                self.best.append(self.rows[-1][-1])
            self._cell = None


def result(mixer: str, seed: int, mse: float, **changes: Any) -> Result:
    fields: dict[str, Any] = {
        "mixer": mixer,
        "seed": seed,
        "domain": "forecasting",
        "dim": 32,
        "hidden": 80,
        "parameters": 1000,
        "target_parameters": 1000,
        "metrics": {"mse": mse},
        "baselines": {"ridge": {"mse": 0.5}},
        "summary_metrics": {"mse": ["lower", "scaled²"], "crps": ["lower", ""]},
        "context": 96,
        "state_bytes": 2048,
        "train_tokens": 1000,
        "train_seconds": 2.0,
        "steps": 10,
        "epochs": 1,
        "peak_bytes": 10**8,
        "start_bytes": 10**7,
        "inference_us": 3.0,
        "monitor": "val/mse",
        "curve": [[0, 1.0], [10, mse]],
    }
    return Result(**fields | changes)


def trained(mixer: str, errors: list[float], **changes: object) -> list[Result]:
    return [result(mixer, seed, mse, **changes) for seed, mse in enumerate(errors)]


@pytest.fixture
def summary() -> Summary:
    return summarise(
        {
            "gla": trained("gla", [0.30, 0.31]),
            "attention": trained("attention", [0.40, 0.41], state_bytes=40_000, parameters=1100),
        }
    )


def comparison(folder: Path, text: str = "a: 1\n") -> Comparison:
    return Comparison(
        [], {"demo.yaml": text}, ["--trainer.max_epochs=1"], ["gla", "attention"], [0, 1], folder
    )


def test_rows_of_mixers_and_baselines(summary: Summary, tmp_path: Path) -> None:
    tables = Tables(report.html(summary, comparison(tmp_path), "mainstem compare"))
    assert tables.rows[0][:2] == ["mixer", "mse lower is better"]
    assert [row[0] for row in tables.rows] == [
        "mixer",
        "gla",
        "attention",
        "ridge",
        "mixer",
        "gla",
        "attention",
    ]
    assert tables.rows[1][1] == "0.3050 ± 0.0071"
    assert tables.rows[3] == ["ridge", "0.5"]
    assert tables.rows[5][1:3] == ["1,000 (+0.0%)", "2.0 KiB"]


def test_only_a_winner_beyond_noise_is_marked(summary: Summary, tmp_path: Path) -> None:
    assert Tables(report.html(summary, comparison(tmp_path), "")).best == ["0.3050 ± 0.0071"]
    near = summarise({"gla": trained("gla", [0.30, 0.31]), "lru": trained("lru", [0.305, 0.315])})
    assert Tables(report.html(near, comparison(tmp_path), "")).best == []


def test_a_mixer_of_another_size_is_marked(summary: Summary, tmp_path: Path) -> None:
    page = report.html(summary, comparison(tmp_path), "")
    assert "1,100 (+10.0%, not matched)" in page
    assert "attention could not be matched within 3%: it has +10.0% parameters" in page


def test_the_page_needs_nothing_from_elsewhere(summary: Summary, tmp_path: Path) -> None:
    (tmp_path / "gla" / "seed0" / "predictions").mkdir(parents=True)
    (tmp_path / "gla" / "seed0" / "predictions" / "fan.png").write_bytes(PIXEL)
    summary.rows[0].results[0].pictures.append("predictions/fan.png")
    page = report.html(summary, comparison(tmp_path), "")
    links = Tables(page).links
    assert any(link == f"data:image/png;base64,{base64.b64encode(PIXEL).decode()}" for link in links)
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"url\((?!#)|@import|<script|<link", page)


def test_figures_are_valid_svg_in_the_colour_of_the_text(summary: Summary, tmp_path: Path) -> None:
    figures = re.findall(r"<svg.*?</svg>", report.html(summary, comparison(tmp_path), ""), flags=re.DOTALL)
    assert len(figures) == 3
    ids: list[str] = []
    for figure in figures:
        tree = ET.fromstring(figure)
        ids += [element.attrib["id"] for element in tree.iter() if "id" in element.attrib]
        assert "currentColor" in figure
    assert len(ids) == len(set(ids))
    texts = " ".join(figures)
    assert all(f">{name}<" in texts for name in ("gla", "attention", "ridge"))


def test_what_the_user_wrote_is_escaped(summary: Summary, tmp_path: Path) -> None:
    page = report.html(summary, comparison(tmp_path, "note: <b>bold</b>\n"), "mainstem compare '<x>'")
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "&lt;x&gt;" in page


def test_a_bidirectional_backbone_has_no_decode_state(tmp_path: Path) -> None:
    found = summarise({"gla": trained("gla", [0.3, 0.31], state_bytes=None)})
    tables = Tables(report.html(found, comparison(tmp_path), ""))
    assert tables.rows[-1][2] == "–"


def test_the_template_is_part_of_the_package() -> None:
    assert (files("mainstem.tools") / "templates" / "report.html").is_file()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((0.3716, 0.3721), "0.37185 ± 0.00035"),
        ((-1.2, -1.0), "−1.10 ± 0.14"),
        ((1234.0, 1250.0), "1242 ± 11"),
        ((0.25, 0.25), "0.2500 ± 0.0000"),
        ((0.25,), "0.25"),
    ],
)
def test_the_spread_says_how_many_digits_count(values: tuple[float, ...], text: str) -> None:
    assert str(Values(values)) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "–"), (512, "512 B"), (2048, "2.0 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.00 GiB")],
)
def test_bytes_are_told_in_a_readable_unit(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


def verdict(first: list[float], second: list[float]) -> tuple[str | None, str]:
    found = summarise(
        {
            "gla": [result("gla", seed, mse) for seed, mse in enumerate(first)],
            "attention": [result("attention", seed, mse) for seed, mse in enumerate(second)],
        }
    )
    return found.verdicts[0].winner, found.verdicts[0].text


def test_a_difference_beyond_the_seed_spread_names_a_winner() -> None:
    winner, text = verdict([0.30, 0.31, 0.32], [0.40, 0.41, 0.42])
    assert winner == "gla"
    assert "gla is best (0.310 ± 0.010), beyond seed noise from every other mixer" in text
    assert "The best baseline, ridge (0.5), is worse by 0.19" in text


def test_a_difference_within_the_seed_spread_names_none() -> None:
    winner, text = verdict([0.30, 0.31, 0.32], [0.305, 0.315, 0.325])
    assert winner is None
    assert "gla has the best mean (0.310 ± 0.010), but this is within seed noise" in text
    assert "leads attention by 0.005 (seed spread 0.014)" in text


def test_a_large_mean_difference_that_one_seed_contradicts_names_none() -> None:
    assert verdict([0.30, 0.30, 0.46], [0.45, 0.45, 0.455])[0] is None


def test_one_seed_names_no_winner() -> None:
    winner, text = verdict([0.1], [0.9])
    assert winner is None
    assert "one seed shows no spread" in text


def test_equal_results_are_told_as_equal() -> None:
    winner, text = verdict([0.3, 0.3], [0.3, 0.3])
    assert winner is None
    assert "gla and attention are the same" in text


def test_a_better_baseline_is_told() -> None:
    _, text = verdict([0.60, 0.61, 0.62], [0.70, 0.71, 0.72])
    assert "The best baseline, ridge (0.5), is better by 0.11" in text
