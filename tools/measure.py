"""Time, memory and the description of the machine: what `bench` and `compare` measure with."""

import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

from .. import __version__


def set_threads(threads: int) -> None:
    """Let PyTorch use ``threads`` cores, and with it the kernels, which ask it how many there are."""
    torch.set_num_threads(threads)


def clock_name(device: torch.device, threads: int) -> str:
    """Say in words which time `seconds_per_call` takes."""
    if device.type == "cuda":
        return "median CUDA event time"
    return "minimum process CPU time" if threads == 1 else "minimum wall time"


def seconds_per_call(
    call: Callable[[], object],
    device: torch.device,
    *,
    threads: int = 1,
    limit: float = 1.0,
) -> float:
    """Time ``call`` again and again for ``limit`` seconds.

    On a CPU with one thread it is the least process CPU time, which other programs on the machine do not
    change; with more threads CPU time adds up over them, so it is the least wall time. On a CUDA device it is
    the median of event times after a warm-up.

    Args:
        call: what is timed.
        device: where it runs.
        threads: how many cores a CPU call may use.
        limit: how many seconds the repeats may take together; one call is always made.
    """
    call()  # compiles, and lets the system clear the memory that the next calls use again
    if device.type == "cuda":
        return _cuda_seconds(call, limit)
    clock = time.process_time if threads == 1 else time.perf_counter
    best, end = float("inf"), time.perf_counter() + limit
    while True:
        begin = clock()
        call()
        best = min(best, clock() - begin)
        if time.perf_counter() >= end:
            return best


def _cuda_seconds(call: Callable[[], object], limit: float) -> float:
    if importlib.util.find_spec("triton") is not None:
        # It clears the cache between calls and keeps the queue full, so that a launch is not waited for.
        from triton.testing import do_bench

        milliseconds: float = do_bench(call, warmup=25, rep=round(1e3 * limit), return_mode="median")
        return milliseconds / 1e3
    times: list[float] = []
    end = time.perf_counter() + limit
    while not times or time.perf_counter() < end:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return median(times)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held, on a CUDA device in its tensors, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss of a child starts at what its parent had when it was started; VmHWM does not.
    peak = _resident("VmHWM")
    if peak is None:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def current_memory(device: torch.device) -> int:
    """Return the bytes that this process holds now, or has held at most where the system says no more."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _resident("VmRSS") or peak_memory(device)


def _resident(name: str) -> int | None:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith(f"{name}:")]
    return kilobytes[0] * 1024 if kilobytes else None


def device_name(device: torch.device) -> str:
    """Name the processor or the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def machine(device: torch.device) -> dict[str, str]:
    """Describe what a number was measured on: device, cores, threads, versions."""
    found = {
        "device": device_name(device),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "mainstem": __version__,
    }
    if device.type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}  # type: ignore[no-untyped-call]
    for package in ("torch", "numba", "triton", "lightning"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
