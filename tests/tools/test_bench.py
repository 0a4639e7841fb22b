import csv
import importlib.util
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mainstem.kernels.dispatch import offers, why_not
from mainstem.tools import bench, bench_run, peers
from mainstem.tools.bench_report import add_exponents, to_markdown
from mainstem.tools.bench_run import Row, add_ratios
from mainstem.tools.measure import seconds_per_call, set_threads
from mainstem.tools.operations import OPERATIONS, Shape, cast

CPU = torch.device("cpu")
TINY = ["--lengths", "8,16", "--heads", "2", "--dim", "8", "--seconds", "0.001"]
ONE = ["--op", "max_plus_scan", "--backend", "reference", "--peer", "none"]


@pytest.fixture(autouse=True)
def _threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "bench.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def measure(tmp_path: Path, *arguments: str) -> list[dict[str, str]]:
    assert bench.main([*TINY, "--output", str(tmp_path / "bench"), *arguments]) == 0
    return read(tmp_path / "bench")


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_gives_finite_numbers_or_a_reason(name: str, tmp_path: Path) -> None:
    rows = measure(tmp_path, "--op", name, "--backend", "reference,chunked", "--peer", "none")
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
    for backend in ("reference", "chunked"):
        notes = {row["note"] for row in rows if row["backend"] == backend}
        reason = why_not(operation.folder, backend, CPU)
        assert notes == ({f"not run: {reason}"} if reason else {""})


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_peer_that_is_here_gives_the_same_numbers(name: str) -> None:
    operation = OPERATIONS[name]
    for variant in operation.variants:
        inputs = cast(operation.inputs(variant, Shape(1, 33, 2, 8)), torch.float64, CPU)
        for peer in peers.PEERS:
            call = peer.find(name, variant)
            if call is None or peer.missing(CPU) is not None:
                continue
            found = call(inputs)
            assert found.isfinite().all()
            if peer.same:
                wanted = operation.bind(variant, "reference")(inputs)
                torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-5, atol=1e-5)


def test_every_peer_names_operations_that_there_are() -> None:
    assert {name for peer in peers.PEERS for name in peer.calls} <= set(OPERATIONS)


def test_a_peer_that_cannot_be_measured_says_why(tmp_path: Path) -> None:
    rows = measure(tmp_path, "--op", "linear_recurrence", "--decay", "token", "--backend", "none")
    notes = {row["backend"]: row["note"] for row in rows}
    assert notes["fla"] == notes["SDPA cuDNN"] == "not run: measured on cuda only"
    assert notes["torch SDPA"] == ""
    if importlib.util.find_spec("transformers") is None:
        assert notes["transformers"] == "not run: transformers is not installed"


def test_what_a_package_lacks_is_told() -> None:
    with pytest.raises(RuntimeError, match="torch gives no lightning_speed: "):
        peers._function("torch", "lightning_speed")
    with pytest.raises(RuntimeError, match="nowhere gives no scan: No module named 'nowhere'"):
        peers._function("nowhere", "scan")


def test_a_peer_with_wrong_numbers_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wrong = peers.Peer("wrong", {"logcumsumexp": lambda variant: lambda inputs: 2 * inputs["s"]})
    monkeypatch.setattr(peers, "PEERS", (wrong,))
    monkeypatch.setattr(bench_run, "PEERS", (wrong,))
    rows = measure(tmp_path, "--op", "logcumsumexp", "--backend", "none")
    assert [row["note"].startswith("not run: its output is off by ") for row in rows] == [True]


@pytest.mark.parametrize("name", ["linear_recurrence", "delta_rule"])
def test_ours_stands_beside_sdpa(name: str, tmp_path: Path) -> None:
    arguments = ["--op", name, "--decay", "token", "--backend", "cpu,chunked", "--peer", "torch SDPA"]
    rows = measure(tmp_path, *arguments)
    theirs = [row for row in rows if row["backend"] == "torch SDPA"]
    ours = [[row for row in rows if row["backend"] == backend] for backend in ("cpu", "chunked")]
    assert [row["length"] for row in theirs] == ["8", "16"]
    for peer, *both in zip(theirs, *ours):
        times = [float(row["both_ms"]) for row in both]
        assert float(peer["both_ratio"]) == pytest.approx(float(peer["both_ms"]) / min(times))
        for row, time in zip(both, times):
            assert float(row["both_ratio"]) == pytest.approx(float(peer["both_ms"]) / time)


def test_attention_is_timed_once_for_all_that_it_stands_beside(tmp_path: Path) -> None:
    rows = measure(tmp_path, "--op", "linear_recurrence", "--backend", "none", "--peer", "torch SDPA")
    assert len(rows) == 8
    assert len({row["both_ms"] for row in rows if row["length"] == "16"}) == 1


def test_the_markdown_has_a_column_for_each_length_and_what_was_not_run(tmp_path: Path) -> None:
    rows = measure(tmp_path, "--op", "linear_recurrence", "--backend", "chunked", "--peer", "fla")
    text = (tmp_path / "bench" / "bench.md").read_text(encoding="utf-8")
    assert "| operation | variant | by | T = 8 | T = 16 | error | exponent |" in text
    assert text.count("| `linear_recurrence` |") == len({row["variant"] for row in rows}) == 4
    assert "- fla, linear_recurrence (none, head, token, key): not run: measured on cuda only" in text
    assert f"torch {torch.__version__}" in text
    assert (tmp_path / "bench" / "bench.png").stat().st_size > 10_000


def test_shapes_of_several_kinds_stand_side_by_side(tmp_path: Path) -> None:
    arguments = ["gpu", "--device", "cpu", "--dtype", "float32", "--shapes", "1,8,2,8 2,4,1,16"]
    arguments += ["--op", "linear_recurrence,max_plus_scan", "--seconds", "0.001", "--output", str(tmp_path)]
    assert bench.main(arguments) == 0
    shapes = {
        (row["batch"], row["length"], row["heads"], row["dim"]) for row in read(tmp_path) if not row["note"]
    }
    assert shapes == {("1", "8", "2", "8"), ("2", "4", "1", "16")}
    text = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "| 1×8×2×8 | 2×4×1×16 |" in text
    assert "exponent |  |" not in text
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_the_gpu_benchmark_is_that_of_flash_linear_attention() -> None:
    arguments = bench.parse([], gpu=True)
    assert arguments.dtype == "bfloat16"
    assert arguments.device == "cuda"
    assert [8, 1024, 8, 64] in arguments.shapes
    assert len(arguments.shapes) == 6


def test_every_operation_goes_through_the_gpu_benchmark(tmp_path: Path) -> None:
    """On a CPU, in half precision, with a clock that takes no time: nothing around the timer may fail."""
    calls = []

    def clock(call: Any, device: torch.device, *, threads: int, limit: float) -> float:
        calls.append((device.type, threads, limit))
        call()
        return 1e-3 * len(calls)

    arguments = ["--device", "cpu", "--shapes", "1,40,2,16", "--peer", "all", "--output", str(tmp_path)]
    assert bench.scans(arguments, gpu=True, clock=clock) == 0
    rows = read(tmp_path)
    assert {row["operation"] for row in rows} == set(OPERATIONS)
    expected = "complex numbers|measured on cuda only|is not installed|are not supported"
    for row in rows:
        assert not row["note"] or any(part in row["note"] for part in expected.split("|")), row
    assert all(limit == 0.2 for _, _, limit in calls)


@pytest.mark.gpu
def test_the_gpu_benchmark_measures_every_operation(tmp_path: Path) -> None:
    assert bench.main(["gpu", "--shapes", "1,256,2,64", "--seconds", "0.01", "--output", str(tmp_path)]) == 0
    rows = read(tmp_path)
    for operation in OPERATIONS.values():
        ours = [row for row in rows if row["operation"] == operation.name and row["backend"] == "triton"]
        assert all(not row["note"] or "complex numbers" in row["note"] for row in ours), ours


def test_a_head_size_with_wrong_numbers_is_left_out_and_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def half(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        y = torch.logcumsumexp(inputs["s"], 1)
        return y if y.shape[-1] == 16 else 2 * y

    some = peers.Peer("some", {"logcumsumexp": lambda variant: half})
    monkeypatch.setattr(peers, "PEERS", (some,))
    monkeypatch.setattr(bench_run, "PEERS", (some,))
    arguments = ["--device", "cpu", "--dtype", "float32", "--shapes", "1,8,2,8 1,8,2,4 2,4,1,16"]
    arguments += [
        "--op",
        "logcumsumexp",
        "--backend",
        "none",
        "--seconds",
        "0.001",
        "--output",
        str(tmp_path),
    ]
    assert bench.main(["gpu", *arguments]) == 0
    notes = {row["dim"]: row["note"][:29] for row in read(tmp_path)}
    assert notes == {"4": "not run: its output is off by", "8": "", "16": ""}


def row(backend: str, length: int, both: float, *, peer: bool = False) -> Row:
    made = Row("op", "real", backend, peer, 1, length, 1, 1, "float32")
    made.record(both / 2, both, work=1.0)
    return made


def test_the_exponent_is_the_slope_of_log_time() -> None:
    rows = [row("cpu", length, 1e-6 * length**1.5) for length in (10, 100, 1000)]
    add_exponents(rows)
    assert rows[2].exponent == pytest.approx(1.5)
    assert rows[0].exponent is rows[1].exponent is None


def test_ratios_are_taken_to_the_fastest_of_the_other_side() -> None:
    rows = [row("cpu", 8, 1.0), row("chunked", 8, 4.0), row("reference", 8, 0.1)]
    rows += [row("a", 8, 2.0, peer=True), row("b", 8, 8.0, peer=True), row("a", 16, 3.0, peer=True)]
    add_ratios(rows)
    assert [r.both_ratio for r in rows] == [2.0, 0.5, 20.0, 2.0, 8.0, None]
    assert "× 2 / 2" in to_markdown(rows, {"command": "bench", "dtype": "float32"})


def test_a_call_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_run, "LONGEST_CALL", 1e-9)
    rows = measure(tmp_path, *ONE)
    assert [row["note"][:29] for row in rows] == ["", "not run: one call might take "]


def test_a_refusing_backend_leaves_a_row_with_its_reason(tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> float:
        raise RuntimeError("out of memory\nwith details")

    assert bench.scans([*TINY, *ONE, "--output", str(tmp_path)], clock=refuse) == 0
    assert [row["note"] for row in read(tmp_path)] == ["not run: out of memory"] * 2


def test_ctrl_c_keeps_what_was_measured_and_the_same_command_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    titles: list[str] = []

    def interrupted(call: object, *_: object, **__: object) -> float:
        titles.append("call")
        if len(titles) == 5:
            raise KeyboardInterrupt
        return 1.0

    arguments = [
        *TINY,
        "--op",
        "max_plus_scan",
        "--backend",
        "reference,chunked,cpu",
        "--output",
        str(tmp_path),
    ]
    assert bench.scans(arguments, clock=interrupted) == 130
    assert [row["backend"] for row in read(tmp_path)] == ["reference", "reference", "chunked", "chunked"]
    assert "the same command goes on" in capsys.readouterr().err
    assert bench.scans(arguments, clock=interrupted) == 0
    assert len(titles) == 7  # the two of the third backend, once more
    assert [row["backend"] for row in read(tmp_path)][4:] == ["cpu", "cpu"]
    assert "going on after 2 of 3" in capsys.readouterr().out
    assert bench.scans(arguments, clock=interrupted) == 0
    assert len(titles) == 13  # a run that ended is measured anew


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "nope"], "--op: 'nope' is unknown, choose from all, linear_recurrence, delta_rule"),
        (["--decay", "channel"], "--decay: 'channel' is unknown, choose from all, none, head, token, key"),
        (["--backend", "gpu"], "--backend: 'gpu' is unknown, choose from all, reference, chunked, cpu"),
        (["--peer", "numpy"], "--peer: 'numpy' is unknown, choose from all, torch SDPA"),
        (["--op", "delta_rule", "--decay", "head"], "--decay head: none of delta_rule has such a decay"),
        (["--backend", "none", "--peer", "none"], "leave nothing to measure"),
        (["--heads", "0"], "--heads must be at least 1, got 0"),
        (["--lengths", "0,8"], "--lengths must be positive"),
        (["--device", "tpu"], "--device tpu cannot be used here"),
        (["gpu", "--device", "cpu", "--shapes", "1,0,1,8"], "--shapes must be positive"),
        (["threads", "--heads", "0"], "--heads must be at least 1"),
        (["memory", "--op", "attention"], "--op: 'attention' is unknown"),
        (["memory", "--piece", "0"], "--lengths and --piece must be at least 1"),
        (["ahead-of-time", "--capability", "70"], "--capability 70: choose from 80, 90, 100"),
        (["document", "nowhere.md"], "nowhere.md does not exist"),
    ],
)
def test_a_wrong_argument_is_told_in_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bench.main(arguments)


def test_help_lists_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {word} " in text for word in bench.WORDS)


def test_the_clock_takes_the_least_of_its_repeats() -> None:
    work = iter([10**6, 10**6, 10, *[10**6] * 10**6])
    seconds = seconds_per_call(lambda: sum(range(next(work))), CPU, limit=0.1)
    assert seconds < 2e-3


def test_threads_are_what_was_asked_for_also_after_a_kernel() -> None:
    set_threads(1)
    operation = OPERATIONS["linear_recurrence"]
    operation.bind("none", "auto")(cast(operation.inputs("none", Shape(1, 4, 1, 4)), torch.float32, CPU))
    assert torch.get_num_threads() == 1


def test_the_work_counts_are_those_of_the_recurrence() -> None:
    shape = Shape(batch=1, length=1, heads=1, dim=64)
    # Two products with the 64×64 state and its decay: 20.5 kFLOP a token and head.
    assert OPERATIONS["linear_recurrence"].work("token", shape) == 5 * 64**2
    assert OPERATIONS["delta_rule"].work("none", shape) == 6 * 64**2
    assert OPERATIONS["elementwise_scan"].work("complex", shape) == 3 * 8 * 64
    assert math.isclose(OPERATIONS["attention"].work("causal", Shape(2, 8, 4, 16)), 2 * 8 * 16 * 64)


def test_every_recurrence_of_the_kernels_can_be_measured() -> None:
    from mainstem import kernels

    public = {
        name
        for name, function in vars(kernels).items()
        if inspect.isfunction(function) and not name.endswith("_step") and not name.startswith("_")
    }
    assert public <= set(OPERATIONS), public - set(OPERATIONS)
    assert all(offers(operation.folder, "reference") for operation in OPERATIONS.values())
