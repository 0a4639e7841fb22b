import csv
import math
from pathlib import Path

import pytest
import torch

from mainstem.kernels.dispatch import why_not
from mainstem.tools import bench, bench_run
from mainstem.tools.bench_report import add_exponents
from mainstem.tools.bench_run import Row
from mainstem.tools.measure import seconds_per_call
from mainstem.tools.operations import OPERATIONS, Shape

TINY = ["--lengths", "8,16", "--heads", "2", "--dim", "8", "--seconds", "0.001"]


def measure(tmp_path: Path, *arguments: str) -> list[dict[str, str]]:
    assert bench.main([*TINY, "--output", str(tmp_path / "bench"), *arguments]) == 0
    with (tmp_path / "bench" / "bench.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_gives_finite_numbers_or_a_reason(name: str, tmp_path: Path) -> None:
    rows = measure(tmp_path, "--op", name, "--backend", "reference,chunked,triton", "--peer", "none")
    operation = OPERATIONS[name]
    for row in rows:
        if row["note"]:
            continue
        assert float(row["forward_ms"]) > 0
        assert float(row["rate"]) > 0
        assert float(row["error"]) < 1e-5
        assert bool(row["both_ms"]) == operation.differentiable
        if operation.differentiable:
            assert float(row["both_ms"]) > 0
            assert float(row["gradient_error"]) < 1e-4
    for backend in ("reference", "chunked", "triton"):
        notes = {row["note"] for row in rows if row["backend"] == backend}
        reason = why_not(operation.folder, backend, torch.device("cpu"))
        assert notes == ({f"not run: {reason}"} if reason else {""})


@pytest.mark.parametrize("name", ["linear_recurrence", "delta_rule"])
def test_the_cpu_backend_is_measured_beside_sdpa(name: str, tmp_path: Path) -> None:
    rows = measure(tmp_path, "--op", name, "--decay", "token", "--backend", "cpu")
    peers = [row for row in rows if row["backend"] == "torch SDPA"]
    ours = [row for row in rows if row["backend"] == "cpu"]
    assert [row["length"] for row in peers] == [row["length"] for row in ours] == ["8", "16"]
    for peer, row in zip(peers, ours):
        assert float(row["both_ratio"]) == pytest.approx(float(peer["both_ms"]) / float(row["both_ms"]))


def test_the_markdown_has_every_row_and_what_was_not_run(tmp_path: Path) -> None:
    target = tmp_path / "docs" / "bench.md"
    rows = measure(
        tmp_path, "--op", "linear_recurrence", "--backend", "reference,triton", "--markdown", str(target)
    )
    text = target.read_text(encoding="utf-8")
    assert text.count("| linear_recurrence |") == sum(
        not row["note"] for row in rows if row["backend"] == "reference"
    )
    assert "linear_recurrence (none, head, token, key) triton: not run: " in text
    assert f"torch {torch.__version__}" in text
    assert (tmp_path / "bench" / "bench.png").stat().st_size > 10_000


def test_the_exponent_is_the_slope_of_log_time() -> None:
    rows = [Row("op", "real", "cpu", 1, length, 1, 1, "float32") for length in (10, 100, 1000)]
    for row in rows:
        row.record(1.0, 1e-6 * row.length**1.5, work=1.0)
    add_exponents(rows)
    assert rows[2].exponent == pytest.approx(1.5)
    assert rows[0].exponent is rows[1].exponent is None


def test_a_call_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_run, "LONGEST_CALL", 1e-9)
    rows = measure(tmp_path, "--op", "max_plus_scan", "--backend", "reference", "--peer", "none")
    assert [row["note"][:29] for row in rows] == ["", "not run: one call might take "]


def test_a_refusing_backend_leaves_a_row_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory\nwith details")

    monkeypatch.setattr(bench_run, "seconds_per_call", refuse)
    rows = measure(tmp_path, "--op", "max_plus_scan", "--backend", "reference", "--peer", "none")
    assert [row["note"] for row in rows] == ["not run: out of memory"] * 2


def test_ctrl_c_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupted(call: object, *_: object, **__: object) -> float:
        calls.append(call)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(bench_run, "seconds_per_call", interrupted)
    arguments = [
        "--op",
        "max_plus_scan",
        "--backend",
        "reference",
        "--peer",
        "none",
        "--output",
        str(tmp_path),
    ]
    assert bench.main([*TINY, *arguments]) == 130
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 2
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nope"], "--op: 'nope' is unknown, choose from all, linear_recurrence, delta_rule"),
        (["--decay", "channel"], "--decay: 'channel' is unknown, choose from all, none, head, token, key"),
        (["--backend", "gpu"], "--backend: 'gpu' is unknown, choose from all, reference, chunked, cpu"),
        (["--op", "delta_rule", "--decay", "head"], "--decay head: none of delta_rule has such a decay"),
        (["--heads", "0"], "--heads must be at least 1, got 0"),
        (["--lengths", "0,8"], "--lengths must be positive"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(arguments)


def test_the_clock_takes_the_least_of_its_repeats() -> None:
    work = iter([10**6, 10, *[10**6] * 10**6])
    seconds = seconds_per_call(lambda: sum(range(next(work))), torch.device("cpu"), limit=0.1, warm=False)
    assert seconds < 2e-3


def test_the_work_counts_are_those_of_the_recurrence() -> None:
    shape = Shape(batch=1, length=1, heads=1, dim=64)
    # Two products with the 64×64 state and its decay: 20.5 kFLOP a token and head.
    assert OPERATIONS["linear_recurrence"].work("token", shape) == 5 * 64**2
    assert OPERATIONS["delta_rule"].work("none", shape) == 6 * 64**2
    assert OPERATIONS["elementwise_scan"].work("complex", shape) == 3 * 8 * 64
    assert math.isclose(OPERATIONS["attention"].work("causal", Shape(2, 8, 4, 16)), 2 * 8 * 16 * 64)
