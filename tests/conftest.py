"""What all tests share: --full, the marks, hypothesis settings, and the pool of rank processes."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from rank_pool import RankPool

# Without a GPU the kernels in Triton run in its interpreter. Triton reads this as it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are drawn the same way in every run, so that a change is never blocked by what it did not touch.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("full", deadline=None, derandomize=True, max_examples=400)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="full products of cases too, and more examples")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("full" if config.getoption("--full") else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        if full:
            config.hook.pytest_deselected(items=full)
            items[:] = [item for item in items if not item.get_closest_marker("full")]
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """ranks(n, function, *args) runs function(context, *args) on n rank processes; see RankPool.__call__."""
    pool = RankPool()
    yield pool
    pool.close()
