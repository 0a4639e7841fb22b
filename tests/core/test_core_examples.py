import doctest
from types import ModuleType

import pytest

from mainstem.core import backbone, mixers, packed


@pytest.mark.parametrize("module", [backbone, mixers, packed])
def test_docstring_examples_run(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
