"""What is the user's to mend is told in one sentence; everything else is a bug and keeps its traceback."""

import re


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
    return checks and origin(error) == __name__.partition(".")[0]


def origin(error: BaseException) -> str:
    """Name of the package that raised ``error``, and not of one that called it."""
    traceback = error.__traceback__
    if traceback is None:
        return ""
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    module: str = traceback.tb_frame.f_globals.get("__name__", "")
    return module.partition(".")[0]


def unwrapped(error: BaseException) -> BaseException:
    """Error of a constructor that jsonargparse called, which it reports as a value that fits no type."""
    while origin(error) == "jsonargparse" and error.__cause__ is not None:
        error = error.__cause__
    return error


def sentence(error: BaseException) -> str:
    """Text of an error on one line."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename!r}"
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
