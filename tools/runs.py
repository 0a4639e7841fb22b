"""The folder of a run: ``runs/<domain>/<n>/``.

It holds config.yaml, metrics.csv, checkpoints/{best,last}.ckpt and, once it was tested, metrics.json.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..core.files import write_whole
from .errors import UserError

ROOT = Path("runs")


def new(domain: str, root: Path = ROOT) -> Path:
    """Make the next free numbered folder of a domain."""
    parent = root / domain
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(path.name) for path in parent.iterdir() if path.name.isdigit()]
    number = max(taken, default=0) + 1
    while True:
        try:
            (parent / str(number)).mkdir()
        except FileExistsError:  # another process was faster
            number += 1
        else:
            return parent / str(number)


def named(directory: Path) -> Path:
    """Make the folder that the user named for a new run.

    Raises:
        UserError: there is a run in it already.
    """
    if config(directory).is_file():
        raise UserError(
            f"--output {directory} holds a run already; `mainstem fit --run {directory}` resumes it"
        )
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def existing(directory: str) -> Path:
    """Check that ``directory`` holds a run.

    Raises:
        UserError: it does not.
    """
    path = Path(directory)
    if not config(path).is_file():
        raise UserError(f"--run {directory} is not the folder of a run: it holds no config.yaml")
    return path


def config(directory: Path) -> Path:
    """Configuration with which the run was made."""
    return directory / "config.yaml"


def checkpoint(directory: Path, which: str) -> Path:
    """Path of the ``best`` or the ``last`` checkpoint."""
    return directory / "checkpoints" / f"{which}.ckpt"


def discard(directory: Path) -> None:
    """Remove the folder of a run without a checkpoint, and the parents that this leaves empty."""
    if any(directory.glob("checkpoints/*.ckpt")):
        return
    shutil.rmtree(directory, ignore_errors=True)
    for parent in list(directory.parents)[:2]:
        try:
            parent.rmdir()
        except OSError:  # not empty
            return


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader sees the old content or the new, never a part."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """Temporary folder whose files move to ``directory`` if the block succeeds, and vanish if it fails."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=directory) as name:
        stage = Path(name)
        yield stage
        for source in sorted(path for path in stage.rglob("*") if path.is_file()):
            target = directory / source.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
