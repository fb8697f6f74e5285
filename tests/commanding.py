"""What tests of launching share: configurations, whole commands, and waiting for processes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

import distattn
from distattn.conf import schema
from distattn.launch import local

TESTS = Path(__file__).parent
PATIENCE = 400.0  # seconds to wait for what takes a few on an idle machine


def config_of(*overrides: str) -> schema.Config:
    schema.register()
    with initialize_config_module("distattn.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*overrides, "output_dir=unused"]))
    assert isinstance(config, schema.Config)
    return config


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether no such process runs; a zombie that nobody has asked about does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "distattn.launch.run", *arguments]


def environment() -> dict[str, str]:
    checkout = Path(distattn.__file__).parent.parent  # the folders in which the commands run are elsewhere
    path = os.pathsep.join([str(TESTS), str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    return local.rank_environment() | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=2 * PATIENCE
    )


def job(name: str) -> tuple[str, ...]:
    return "job=custom", f"job.name=trial_jobs:{name}", "launcher.device=cpu"
