"""`mainstem bench document`: run every measurement and write its tables into a Markdown file.

Only what lies between ``<!-- bench:NAME -->`` and ``<!-- /bench:NAME -->`` is written, for each section that
the file has. Interrupted, the same command goes on after the last section that was finished.
"""

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from . import bench
from .bench_report import console

SECTIONS = {
    "scans": ("scans", "--backend", "chunked,cpu", "--lengths", "512,2048,8192", "--seconds", "1"),
    "exponents": (
        "scans",
        *("--backend", "auto", "--peer", "none", "--lengths", "512,4096,16384,65536", "--seconds", "1"),
    ),
    "mamba": ("scans", "--op", "selective_scan", "--backend", "auto", "--dim", "128", "--lengths", "256,512"),
    "threads": ("threads", "--seconds", "2"),
    "memory": ("memory",),
    "ahead-of-time": ("ahead-of-time",),
    "gpu": ("gpu",),
}
"""What each section runs."""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("mainstem bench document", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    default = Path("docs/benchmarks.md")
    add("file", type=Path, nargs="?", default=default, help=f"with the markers (default: {default})")
    add("--section", type=bench.names, default=["all"], help=f"of {', '.join(SECTIONS)} (default: all)")
    add(
        "--output", type=Path, default=Path("bench/document"), help="folder of what is measured (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the sections that the file has and write them into it.

    Raises:
        ValueError: the file is not there, or has no such section.
    """
    arguments = parse(argv)
    if not arguments.file.is_file():
        raise ValueError(f"{arguments.file} does not exist: it must hold the markers of the sections")
    held = [name for name in SECTIONS if _between(name).search(arguments.file.read_text(encoding="utf-8"))]
    if not held:
        raise ValueError(f"{arguments.file} holds no section: a section is a pair of lines {marker('scans')}")
    wanted = bench.chosen("--section", arguments.section, held)
    finished = arguments.output / "finished"
    done = finished.read_text().split() if finished.is_file() else []
    for name in wanted:
        if name in done:
            continue
        status = _measure(name, arguments.output / name)
        if status is None:
            continue
        if status == 130:
            return status
        _write(name, arguments.output / name, arguments.file)
        done.append(name)
        finished.write_text(" ".join(done))
    finished.unlink(missing_ok=True)
    console().print(f"wrote {', '.join(done)} into {arguments.file}", soft_wrap=True)
    return 0


def marker(name: str) -> str:
    """Show the lines that a section lies between."""
    return f"<!-- bench:{name} --> and <!-- /bench:{name} -->"


def _between(name: str) -> re.Pattern[str]:
    return re.compile(f"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)


def _measure(name: str, folder: Path) -> int | None:
    """Run a section into its folder; ``None`` where there is nothing here to run it on."""
    word, *rest = SECTIONS[name]
    if word == "gpu" and not torch.cuda.is_available():
        console().print("gpu: left as it is, there is no CUDA device")
        return None
    return bench.main([word, *rest, "--output", str(folder)])


def _write(name: str, folder: Path, target: Path) -> None:
    word = SECTIONS[name][0]
    table = (folder / ("bench.md" if word in ("scans", "gpu") else f"{word}.md")).read_text(encoding="utf-8")
    picture = folder / "bench.png"
    if picture.is_file():
        place = target.parent / "images" / f"bench-{name}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture, place)
        table += f"\n![Time against length, log-log](images/{place.name})\n"
    text = target.read_text(encoding="utf-8")
    written = _between(name).sub(lambda found: f"{found[1]}\n{table}\n{found[2]}", text)
    target.write_text(written, encoding="utf-8")
