"""What is the user's to mend is told in one sentence; everything else is a bug and keeps its traceback."""

import re
from pathlib import Path


class UserError(Exception):
    """A mistake in a command, a configuration or a file; its text is one sentence.

    It is no ``ValueError``, which jsonargparse would take for one more type that does not fit.
    """


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; its text says where the run is and how to go on."""


def is_user_error(error: BaseException) -> bool:
    """Whether ``error`` is a user's mistake: a missing file, or a check in this package that failed."""
    if isinstance(error, UserError | FileNotFoundError | PermissionError | IsADirectoryError):
        return True
    if type(error).__name__ == "MisconfigurationException":
        return True
    checks = isinstance(error, ValueError | ImportError | NotImplementedError)
    return checks and (origin(error) == __name__.partition(".")[0] or _raised_here_by_worker(error))


def origin(error: BaseException) -> str:
    """Name of the package that raised ``error``, and not of one that called it."""
    traceback = error.__traceback__
    if traceback is None:
        return ""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    module: str = traceback.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0]


# PyTorch raises the error of a process that loads data anew, with the whole traceback as its text.
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process .*Original Traceback", re.DOTALL)


def _raised_here_by_worker(error: BaseException) -> bool:
    if _WORKER.match(str(error)) is None:
        return False
    files = re.findall(r'^  File "(.+?)", line', str(error), re.MULTILINE)
    package = Path(__file__).resolve().parents[1]
    # In a checkout the package's folder also holds the tests, and often the environment.
    ours = [package / name for name in ("core", "domains", "kernels", "tools")]
    return bool(files) and any(Path(files[-1]).resolve().is_relative_to(folder) for folder in ours)


def unwrapped(error: BaseException) -> BaseException:
    """Error of a constructor that jsonargparse called, which it reports as a value that fits no type."""
    while origin(error) == "jsonargparse" and error.__cause__ is not None:
        error = error.__cause__
    return error


def sentence(error: BaseException) -> str:
    """Text of an error on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename!r}"
    text = str(error)
    if _WORKER.match(text):
        text = re.split(r"^[\w.]+: ", text, flags=re.MULTILINE)[-1]
    return re.sub(r"\s+", " ", text).strip() or type(error).__name__
