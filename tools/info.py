"""`mainstem info`: versions, devices, backends with the reason why not, mixers, domains, configurations."""

import argparse
import importlib.util
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .. import __version__, kernels
from ..core.mixers import MIXERS
from ..kernels import dispatch
from . import configs

PACKAGES = ("torch", "numba", "triton", "lightning", "jsonargparse", "torchmetrics", "numpy", "pandas")


def main(argv: list[str]) -> int:
    """Print what is installed and what can run here."""
    parser = argparse.ArgumentParser("mainstem info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    found = collect()
    if parser.parse_args(argv).json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show(found, Console(highlight=False, soft_wrap=True))
    return 0


def collect() -> dict[str, Any]:
    """All that `mainstem info` says, as plain values."""
    found = devices()
    return {
        "versions": versions(),
        "devices": found,
        "threads": torch.get_num_threads(),
        "backends": {name: {device: backends(name, device) for device in found} for name in operations()},
        "mixers": list(MIXERS),
        "domains": domains(),
        "configs": configs.packaged(),
    }


def versions() -> dict[str, str]:
    """Versions by package, read from what is installed and not by importing it."""
    found = {"mainstem": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def devices() -> dict[str, str]:
    """Device name -> what it is."""
    found = {"cpu": f"{platform.machine()}, {os.cpu_count()} cores"}
    for index in range(torch.cuda.device_count()):
        found[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    return found


def operations() -> list[str]:
    """Operations of `mainstem.kernels`: its folders that hold a backend."""
    root = Path(kernels.__path__[0])
    folders = sorted(path.parent.name for path in root.glob("*/__init__.py"))
    return [name for name in folders if any(dispatch.offers(name, backend) for backend in dispatch.BACKENDS)]


def backends(operation: str, device: str) -> dict[str, str]:
    """Backend -> ``"yes"``, or why it cannot serve ``operation`` on ``device``."""
    where = torch.device(device)
    return {name: dispatch.why_not(operation, name, where) or "yes" for name in dispatch.BACKENDS}


def domains() -> list[str]:
    """Names of the domains in this package."""
    spec = importlib.util.find_spec("mainstem.domains")
    roots = list(spec.submodule_search_locations or []) if spec else []
    return sorted({path.parent.name for root in roots for path in Path(root).glob("*/__init__.py")})


def show(found: dict[str, Any], console: Console) -> None:
    """Print as tables and lists."""
    console.print(" · ".join(f"{name} {number}" for name, number in found["versions"].items()))
    console.print("devices  " + " · ".join(f"{name} ({what})" for name, what in found["devices"].items()))
    console.print(f"threads  {found['threads']}")
    for device in found["devices"]:
        console.print(_backend_table(device, {name: on[device] for name, on in found["backends"].items()}))
    for name in ("mixers", "domains", "configs"):
        console.print(f"{name:8} {', '.join(found[name])}")


def _backend_table(device: str, operations: dict[str, dict[str, str]]) -> Table:
    table = Table("operation", *dispatch.BACKENDS, title=f"backends on {device}", title_justify="left")
    for name, answers in operations.items():
        table.add_row(name, *(_cell(name, backend, answer) for backend, answer in answers.items()))
    return table


def _cell(operation: str, backend: str, answer: str) -> str:
    return answer if answer == "yes" else f"no: {answer.removeprefix(f'{operation} has ')}"
