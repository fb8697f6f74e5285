"""Jobs: what every rank does, once a launcher has brought the ranks to life.

A job is a module with

    def run(config: Config, context: Context) -> dict | None

which is called on every rank. What rank 0 returns goes to the launcher: "report" (str) is printed at the end,
and "exit_code" (int) becomes that of the command; both are optional. The module may also have

    def check(config: Config) -> None       called once before any process starts; raises ConfigError
    ON_PAPER = True                         the job needs no ranks: run is called in the command's own process
    CPU_RANKS = 4                           ranks on a machine without GPUs where the user does not say (2)

The module is `distattn.jobs.<name>` for the names in JOBS. For a job of one's own job.name is
`module:function`, with `function` in the place of run; Python must find the module (PYTHONPATH=. if it lies
in the current directory).
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distattn.conf.schema import Config
from distattn.errors import ConfigError
from distattn.jobs.context import Context

JOBS = ("generate", "needle", "plan", "prefill", "train", "verify")

Result = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A job that was found; the fields are described at the top of this module."""

    run: Callable[[Config, Context], Result | None]
    check: Callable[[Config], None]
    on_paper: bool
    cpu_ranks: int


def find_job(name: str) -> Job:
    """Import the job of that name.

    Raises:
        ConfigError: there is no such module or function. An error inside the module is not caught.
    """
    module_name, colon, function = name.partition(":")
    if not colon:
        if name not in JOBS:
            raise ConfigError(
                f"job.name is {name!r}; expected one of {', '.join(JOBS)}, or module:function for your own"
            )
        module_name, function = f"distattn.jobs.{name}", "run"
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(f"job.name is {name!r}, but there is no module {error.name!r} to import") from error
    run = getattr(module, function, None)
    if not callable(run):
        raise ConfigError(f"job.name is {name!r}, but {module_name} has no function {function!r}")
    return Job(
        run=run,
        check=getattr(module, "check", lambda config: None),
        on_paper=getattr(module, "ON_PAPER", False),
        cpu_ranks=getattr(module, "CPU_RANKS", 2),
    )
