import pytest
from layout_files import empty_like, half_state


@pytest.fixture(scope="module")
def sd():
    return half_state()


@pytest.fixture(scope="module")
def other(sd):
    return empty_like(sd)
