import json
import subprocess
import sys
from typing import Any, get_args

import pytest
import torch

from mainstem.core import MIXERS, MixerName
from mainstem.kernels import dispatch
from mainstem.tools import cli, info


def test_info_does_not_import_lightning() -> None:
    code = (
        "import sys; from mainstem.tools.cli import main; main(['info']); "
        "print(sorted({'lightning', 'pandas', 'matplotlib', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"torch {torch.__version__}" in done.stdout
    assert "forecasting/demo.yaml" in done.stdout


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return info.collect()


def test_every_operation_and_backend_is_answered(found: dict[str, Any]) -> None:
    assert {"linear", "delta", "scan", "conv", "attention", "rnn"} <= set(found["backends"])
    for operation, devices in found["backends"].items():
        answers = devices["cpu"]
        assert list(answers) == list(dispatch.BACKENDS)
        assert answers["reference"] == "yes"
        for backend, answer in answers.items():
            reason = dispatch.why_not(operation, backend, torch.device("cpu"))
            assert answer == (reason or "yes")


def test_names(found: dict[str, Any]) -> None:
    assert found["mixers"] == list(MIXERS)
    assert set(found["mixers"]) == set(get_args(MixerName))
    assert "forecasting" in found["domains"]
    assert {"forecasting/demo.yaml", "mixers/attention.yaml"} <= set(found["configs"])


def test_json(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PACKAGES", ("no-such-package",))
    assert info.versions()["no-such-package"] == "not installed"
