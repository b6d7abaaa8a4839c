"""The tables' command lines silence the log of the whole process; the tests after them must hear it again."""

import logging
import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _heard_again() -> Iterator[None]:
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        yield
    logging.disable(before)
