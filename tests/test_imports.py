"""The floors of the house: imports run tools → domains → core → kernels, and light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ["tools", "domains", "core", "kernels"]


def imported_floors(file: Path) -> set[str]:
    """The floors that a file imports, at the top or inside a function."""
    found: set[str] = set()
    depth = len(file.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            names = [alias.name for alias in node.names]
            if node.level >= depth:  # reaches the root of the package
                found.add(parts[0] if parts[0] else names[0])
            elif node.level == 0 and parts[0] == "mainstem":
                found.add(parts[1] if len(parts) > 1 else names[0])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("mainstem.")}
    return found & set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS[1:])
def test_no_floor_imports_a_higher_one(floor: str) -> None:
    higher = set(FLOORS[: FLOORS.index(floor)])
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    wrong = {str(f.relative_to(ROOT)): sorted(imported_floors(f) & higher) for f in files}
    assert not {name: up for name, up in wrong.items() if up}


def test_the_check_sees_an_upward_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "kernels" / "linear" / "cpu.py"
    file.parent.mkdir(parents=True)
    file.write_text("def f():\n    from ...core import Backbone\n")
    assert imported_floors(file) == {"core"}


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("mainstem", ["torch"]),
        ("mainstem.tools.cli", ["torch", "lightning", "pandas", "rich"]),
        ("mainstem.core", ["lightning", "pandas", "matplotlib"]),
        ("mainstem.kernels", ["lightning", "triton"]),
    ],
)
def test_an_import_brings_nothing_heavy_with_it(module: str, heavy: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
