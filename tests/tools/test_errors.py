"""Errors of the processes that load data are told as those of the training process are."""

from typing import Any

import pytest
from torch.utils.data import DataLoader, Dataset

from mainstem.domains.pointcloud.grid import Grid
from mainstem.tools.errors import is_user_error, sentence


class Broken(Dataset[int]):
    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        if self.kind == "check":
            return Grid((0, 0, 0), (1, 1, 0), (1, 1, 1))
        if self.kind == "file":
            return open("nowhere.bin")
        raise ValueError("of another program")


@pytest.mark.parametrize(
    ("kind", "mistake", "words"),
    [
        ("check", True, "grid: along z"),
        ("file", True, "No such file or directory: 'nowhere.bin'"),
        ("bug", False, ""),
    ],
)
def test_an_error_of_a_worker(kind: str, mistake: bool, words: str) -> None:
    with pytest.raises(Exception, match="DataLoader worker") as caught:
        list(DataLoader(Broken(kind), num_workers=1))
    assert is_user_error(caught.value) == mistake
    if mistake:
        assert words in sentence(caught.value)
        assert "Traceback" not in sentence(caught.value)
