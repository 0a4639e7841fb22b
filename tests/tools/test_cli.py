import os
import subprocess
import sys

import pytest

from mainstem.tools import cli, errors, train


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fit", "--help"], ["nope"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = python(
        f"import sys; from mainstem.tools.cli import main; main({words!r}); "
        "print(sorted({'torch', 'lightning', 'rich', 'numpy', 'jsonargparse'} & set(sys.modules)))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_core_does_not_import_lightning() -> None:
    done = python("import sys, mainstem.core, mainstem.kernels; print('lightning' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in cli.COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mainstem 0.")


@pytest.mark.parametrize(
    ("word", "hint"),
    [("fti", "did you mean 'fit'?"), ("tests", "did you mean 'test'?"), ("x", "choose one of")],
)
def test_unknown_command(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"mainstem: unknown command {word!r}: {hint}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main([command, "--help"])
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    assert status == 0
    assert f"mainstem {command}" in capsys.readouterr().out


def fails(error: BaseException) -> object:
    def main(argv: list[str]) -> int:
        raise error

    return main


def test_ctrl_c_tells_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train, "main", fails(errors.Interrupted("the run lies in runs/x/1")))
    assert cli.main(["fit"]) == 130
    assert capsys.readouterr().err == "\nmainstem: the run lies in runs/x/1\n"


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "main", fails(ZeroDivisionError("division by zero")))
    with pytest.raises(ZeroDivisionError):
        cli.main(["fit"])


def test_debug_shows_the_traceback_of_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "main", fails(errors.UserError("no such thing")))
    assert cli.main(["fit"]) == 2
    monkeypatch.setitem(os.environ, "MAINSTEM_DEBUG", "1")
    with pytest.raises(errors.UserError):
        cli.main(["fit"])


def test_only_checks_of_this_package_are_user_errors() -> None:
    from mainstem.kernels.dispatch import check_backend

    def caught(call: object, *arguments: object) -> Exception:
        with pytest.raises(Exception) as info:  # noqa: PT011
            call(*arguments)  # type: ignore[operator]
        return info.value

    assert errors.is_user_error(caught(check_backend, "nope"))
    assert errors.is_user_error(caught(open, "no-such-file"))
    assert not errors.is_user_error(caught(int, "nope"))
    assert not errors.is_user_error(caught({"a": 1}.__getitem__, "b"))
