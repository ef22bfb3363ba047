"""Tests here see one CUDA device, on which nothing runs. They are skipped by name where it cannot be had."""

import sys
from collections.abc import Iterator
from pathlib import Path

import fake_device
import pytest

WHY_NOT = fake_device.load()
if WHY_NOT is None:
    # Shape checks wrap every function, and FlexAttention counts the arguments of the masks that it is given.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("jaxtyping")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if WHY_NOT and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=f"no fake CUDA: {WHY_NOT}"))


@pytest.fixture(scope="session")
def cuda() -> Iterator[None]:
    """CUDA's branches are taken, and every tensor is a fake one."""
    from ledger import fake_cuda

    with fake_cuda():
        yield
