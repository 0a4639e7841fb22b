"""Which backend serves a call: the one place that decides, and says why not.

An operation is a folder of this package and a backend is a file in it, so that what exists on disk is what is
on offer: ``kernels/linear/cpu.py`` is the ``cpu`` backend of ``linear``.
"""

import importlib
import importlib.util
import warnings
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from .gpu import interpreted

BACKENDS = ("reference", "chunked", "cpu", "triton")


def check_backend(backend: str) -> None:
    """Raise ``ValueError`` unless ``backend`` is ``"auto"`` or one of `BACKENDS`."""
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown: choose one of {', '.join(('auto', *BACKENDS))}")


@cache
def offers(operation: str, backend: str) -> bool:
    """Whether ``operation`` has a file for ``backend``."""
    return importlib.util.find_spec(f"{__package__}.{operation}.{backend}") is not None


@cache
def missing(backend: str) -> str | None:
    """Why ``backend`` cannot run on this machine, or ``None`` if it can."""
    if backend == "cpu" and importlib.util.find_spec("numba") is None:
        return "numba is not installed"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not torch.cuda.is_available() and not interpreted():
            return "no CUDA device"
    return None


def why_not(operation: str, backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot serve ``operation`` for tensors on ``device``, or ``None`` if it can."""
    if not offers(operation, backend):
        return f"{operation} has no {backend} backend"
    reason = missing(backend)
    if reason is not None:
        return reason
    if backend == "cpu" and device.type != "cpu":
        return f"the cpu backend needs tensors on the CPU, and these are on {device}"
    if backend == "triton" and device.type != "cuda" and not interpreted():
        return f"the triton backend needs tensors on a CUDA device, and these are on {device}"
    return None


def _load(operation: str, backend: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.{operation}.{backend}")


def _unable(operation: str, backend: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why ``backend`` cannot serve these tensors: their device, their type, or what its own file says."""
    reason = why_not(operation, backend, tensors[0].device)
    if reason is not None:
        return reason
    if backend == "triton" and any(x.dtype in (torch.float64, torch.complex128) for x in tensors):
        return "the triton backend computes in float32, and these are double precision"
    judge = getattr(_load(operation, backend), "unable", None)
    found: str | None = None if judge is None else judge(*tensors)
    return found


@cache
def say_once(message: str) -> None:
    """Warn of what a user should know of, such as a slower path, the first time only."""
    warnings.warn(message, stacklevel=4)


def resolve(operation: str, backend: str, *tensors: Tensor) -> str:
    """Name the backend that serves ``operation`` for these tensors.

    ``"auto"`` is ``triton`` on a CUDA device and ``cpu`` on a CPU where the operation has that file, and
    ``chunked`` elsewhere. A file that is there and cannot be used is named once.

    Args:
        operation: a folder of this package.
        backend: ``"auto"`` or one of `BACKENDS`.
        tensors: of the call. Their device and types decide, and the backend's own ``unable(*tensors)``.

    Raises:
        ValueError: the backend is unknown, or cannot serve this call; the message gives the reason and the
            backends that can.
    """
    check_backend(backend)
    device = tensors[0].device
    if backend != "auto":
        reason = _unable(operation, backend, tensors)
        if reason is not None:
            able = [name for name in BACKENDS if _unable(operation, name, tensors) is None]
            raise ValueError(
                f"backend={backend!r} cannot serve this call: {reason}; these can: auto, {', '.join(able)}"
            )
        return backend
    fast = "triton" if device.type == "cuda" else "cpu"
    if not offers(operation, fast):
        return "chunked"
    reason = _unable(operation, fast, tensors)
    if reason is None:
        return fast
    say_once(f"{operation}: taking the slower chunked backend on {device.type}, because {reason}")
    return "chunked"


def implementation(operation: str, backend: str, *tensors: Tensor) -> ModuleType:
    """Import the file that serves ``operation``; takes and raises what `resolve` does."""
    return _load(operation, resolve(operation, backend, *tensors))
