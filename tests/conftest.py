"""What all tests share: --full, --minutes, the marks, hypothesis settings, and the pool of rank processes."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from rank_pool import RankPool

STARTED = pytest.StashKey[float]()
LEFT_OUT = pytest.StashKey[list[str]]()
# What takes longest for what it tells: Triton's interpreter, and whole commands, which import PyTorch again and again.
# These come last, and only these may be left out where time is short (--minutes).
LATE = ("test_rows.py", "test_selected.py", "test_triton.py", "test_launch.py", "test_ray.py")

# Without a GPU the kernels in Triton run in its interpreter. Triton reads this as it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Examples are drawn the same way in every run, so that a change is never blocked by what it did not touch.
settings.register_profile("quick", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("full", deadline=None, derandomize=True, max_examples=400)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="full products of cases too, and more examples")
    parser.addoption("--minutes", type=float, help="begin none of LATE after this long; those left out are named")


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("full" if config.getoption("--full") else "quick")
    config.stash[STARTED] = time.monotonic()
    config.stash[LEFT_OUT] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        full = [item for item in items if item.get_closest_marker("full")]
        if full:
            config.hook.pytest_deselected(items=full)
            items[:] = [item for item in items if not item.get_closest_marker("full")]
    items.sort(key=lambda item: LATE.index(item.path.name) if item.path.name in LATE else -1)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu and not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is None or item.path.name not in LATE:
        return
    if time.monotonic() - item.config.stash[STARTED] > 60 * minutes:
        item.config.stash[LEFT_OUT].append(item.nodeid)
        pytest.skip(f"not started: --minutes={minutes:g} are over")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if left_out := config.stash[LEFT_OUT]:
        terminalreporter.section(f"{len(left_out)} tests were NOT started, for want of time")
        terminalreporter.write_line("\n".join(left_out))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """ranks(n, function, *args) runs function(context, *args) on n rank processes; see RankPool.__call__."""
    pool = RankPool()
    yield pool
    pool.close()
