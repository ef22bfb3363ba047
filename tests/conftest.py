"""What holds for every test: shapes are checked while the tests run, and long or GPU tests only run where asked for."""

import os
import sys

import jaxtyping
import pytest

# Before anything of tokscale is imported: every annotated signature is checked from here on (beartype). Processes that
# tests start, such as ranks, run without it.
assert not any(name.startswith("tokscale.") for name in sys.modules), "tokscale was imported before its hook"
jaxtyping.install_import_hook("tokscale", "shape_checks.checked")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked `long` as well")


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("TOKSCALE_FUZZ_SCALE", "25" if config.getoption("--long") else "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("long") and not config.getoption("--long"):
            item.add_marker(pytest.mark.skip(reason="long: run ./launch/test --long"))
        if item.get_closest_marker("gpu") and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
