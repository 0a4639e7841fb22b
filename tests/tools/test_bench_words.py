"""`mainstem bench threads`, `memory`, `ahead-of-time` and `document`."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mainstem.tools import bench, bench_builds, bench_document, bench_memory


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_threads_are_timed_for_each_number_of_heads(tmp_path: Path) -> None:
    arguments = ["threads", "--op", "elementwise_scan,max_plus_scan", "--heads", "1,2", "--threads", "1,2"]
    arguments += ["--length", "16", "--dim", "8", "--seconds", "0.001", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    head, *rows = read(tmp_path / "threads.csv")
    assert head == ["operation", "variant", "H", "1 thread(s)", "2 thread(s)", "gain"]
    assert [row[2] for row in rows] == ["1", "2", "1", "2"]
    for row in rows:
        first, second, gain = ([float(x) for x in cell.removesuffix(" ms").split(" / ")] for cell in row[3:])
        # Only the forward pass where there is no other.
        assert len(first) == len(second) == len(gain) == (1 if "max_plus" in row[0] else 2)
        assert gain[0] == pytest.approx(first[0] / second[0], rel=0.02)
    assert "`mainstem bench threads --op" in (tmp_path / "threads.md").read_text(encoding="utf-8")


def test_memory_is_that_of_a_process_of_its_own(tmp_path: Path) -> None:
    arguments = ["memory", "--op", "elementwise_scan", "--mixer", "none", "--lengths", "40,200000"]
    assert bench.main([*arguments, "--piece", "1000", "--output", str(tmp_path)]) == 0
    head, row = read(tmp_path / "memory.csv")
    assert head[2:] == ["peak, 40 tokens", "peak, 200,000 tokens", "last − first"]
    few, many = (float(cell.removesuffix(" MiB")) for cell in row[2:4])
    assert few > 50
    # The tokens alone would take 390 MiB.
    assert many < few + 60


@pytest.mark.parametrize("kind", ["operation", "backbone"])
def test_a_stream_is_the_whole_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []

    def make(name: str, piece: int) -> Any:
        def advance(tokens: int, state: Any) -> str:
            seen.append((tokens, state is None))
            return "state"

        return advance

    monkeypatch.setattr(bench_memory, f"_{kind}", make)
    bench_memory.stream(kind, "any", 25, 10)
    assert seen == [(10, True), (10, False), (5, False)]


def test_every_recurrence_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*bench_memory.OPERATION_NAMES, "ttt_linear", "short_convolution"]:
        bench_memory.stream("operation", name, 25, 10)
    for name in bench_memory.MIXER_NAMES:
        bench_memory.stream("backbone", name, 25, 10)


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="nothing: KeyError: 'nothing'"):
        bench_memory.in_a_process("operation", "nothing", 1, 1)


def test_resources_are_listed_and_a_spill_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spilled = {80: 0, 90: 8}

    def builds(folder: str, capability: int, *, everything: bool) -> list[dict[str, Any]]:
        found = {"name": "kernel-64", "warps": 4, "stages": 2, "registers": 100, "shared": 83_456}
        return [{**found, "spilled": spilled[capability]}]

    monkeypatch.setattr(bench_builds, "builds", builds)
    arguments = ["ahead-of-time", "--op", "linear", "--output", str(tmp_path), "--capability"]
    assert bench.main([*arguments, "80"]) == 0
    assert read(tmp_path / "ahead-of-time.csv")[1] == [
        *("linear", "kernel-64", "80", "4", "2", "100", "0", "83456", "50%"),
    ]
    assert bench.main([*arguments, "80,90"]) == 1
    assert "spills, or does not fit: linear kernel-64 sm_90" in capsys.readouterr().err


def test_kernels_are_compiled_where_nothing_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **keywords: Any) -> subprocess.CompletedProcess[str]:
        assert command == [sys.executable, "-m", "mainstem.kernels.ahead_of_time", "linear", "90", "--all"]
        assert "TRITON_INTERPRET" not in keywords["env"]
        line = json.dumps({"name": "kernel"})
        return subprocess.CompletedProcess(command, 0, f"a warning\n{line}\n", "")

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(subprocess, "run", run)
    assert bench_builds.builds("linear", 90, everything=True) == [{"name": "kernel"}]


def test_a_kernel_that_does_not_compile_is_named() -> None:
    with pytest.raises(RuntimeError, match="nothing does not compile for sm_90: ModuleNotFoundError"):
        bench_builds.builds("nothing", 90)


TEXT = """Before.
<!-- bench:scans -->
old
<!-- /bench:scans -->
Between, by hand.
<!-- bench:threads -->
<!-- /bench:threads -->
<!-- bench:gpu -->
of another machine
<!-- /bench:gpu -->
"""
SECTIONS = {
    "scans": (
        *("scans", "--op", "max_plus_scan", "--backend", "chunked", "--peer", "none"),
        *("--lengths", "4,8", "--seconds", "0.001"),
    ),
    "threads": ("threads", "--op", "elementwise_scan", "--length", "8", "--dim", "4", "--seconds", "0.001"),
    "memory": ("memory",),
    "gpu": ("gpu",),
}


@pytest.fixture
def document(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(bench_document, "SECTIONS", SECTIONS)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "docs" / "benchmarks.md"
    path.parent.mkdir()
    path.write_text(TEXT, encoding="utf-8")
    return path


def write(document: Path, *arguments: str) -> int:
    return bench.main(["document", str(document), "--output", str(document.parent / "kept"), *arguments])


def test_a_document_gets_the_tables_of_its_sections_and_keeps_the_rest(document: Path) -> None:
    assert write(document) == 0
    text = document.read_text(encoding="utf-8")
    assert "old" not in text
    assert text.startswith("Before.\n<!-- bench:scans -->\n\n`mainstem bench --op max_plus_scan")
    assert "| `max_plus_scan` | real | chunked |" in text
    assert "![Time against length, log-log](images/bench-scans.png)" in text
    assert (document.parent / "images" / "bench-scans.png").is_file()
    assert "Between, by hand.\n<!-- bench:threads -->\n\n`mainstem bench threads" in text
    assert "<!-- bench:gpu -->\nof another machine\n<!-- /bench:gpu -->" in text
    assert write(document, "--section", "scans") == 0
    again = document.read_text(encoding="utf-8")
    assert again.count("<!-- bench:") == text.count("<!-- bench:") == 3


def test_an_interrupted_document_goes_on_after_its_last_section(
    document: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, words = bench_document._measure, []

    def measure(name: str, folder: Path) -> int | None:
        words.append(name)
        return 130 if words == ["scans", "threads"] else run(name, folder)

    monkeypatch.setattr(bench_document, "_measure", measure)
    assert write(document) == 130
    assert "| `max_plus_scan` |" in document.read_text(encoding="utf-8")
    assert write(document) == 0
    assert words == ["scans", "threads", "threads", "gpu"]
    assert write(document) == 0
    assert words[4:] == ["scans", "threads", "gpu"]  # what ended is measured anew


def test_a_document_without_sections_is_refused(document: Path) -> None:
    document.write_text("Nothing.\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no section: a section is a pair of lines <!-- bench:scans"):
        write(document)
    document.write_text(TEXT, encoding="utf-8")
    with pytest.raises(
        ValueError, match="--section: 'memory' is unknown, choose from all, scans, threads, gpu"
    ):
        write(document, "--section", "memory")


def test_the_project_s_own_document_has_every_section() -> None:
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for name in bench_document.SECTIONS:
        assert bench_document._between(name).search(text), name
