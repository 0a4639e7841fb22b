"""Finding configuration files: a path first, else one that ships inside the package."""

from importlib.resources import files
from pathlib import Path

from .errors import UserError


def folder() -> Path:
    """Folder of the configurations that ship with the package."""
    return Path(str(files("mainstem"))) / "configs"


def packaged() -> list[str]:
    """Names under which the shipped configurations are found, such as ``forecasting/demo.yaml``."""
    return sorted(path.relative_to(folder()).as_posix() for path in folder().rglob("*.yaml"))


def find(name: str) -> Path:
    """Path of a configuration file.

    Raises:
        UserError: it is neither a file nor a shipped configuration.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = folder() / name.removeprefix("configs/")
    if shipped.is_file():
        return shipped
    raise UserError(f"config {name!r} is neither a file nor one of: {', '.join(packaged())}")
