"""What every unit test shares; this file also puts `tests/` on the path, so that tests import `tiny`."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random numbers are the same in every run and do not depend on which tests ran before."""
    torch.manual_seed(0)
