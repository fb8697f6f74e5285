"""The command: `distattn`, or `python -m distattn.launch.run`, with Hydra overrides (`--help` lists them).

Exit codes: 0 done, 1 a rank or the job failed, 2 the configuration cannot work, 130 interrupted.
"""

import sys
import tempfile
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from distattn.conf import schema
from distattn.errors import ConfigError
from distattn.jobs import Job, find_job
from distattn.jobs.context import Context
from distattn.jobs.settings import check, check_ranks
from distattn.launch import local, torchrun
from distattn.launch.device import choose_device
from distattn.launch.display import Display, Shown, print_result
from distattn.launch.processes import prepare


class _End(SystemExit):
    """How a job ends the process, to be told from Hydra's own sys.exit."""


def main() -> NoReturn:
    """Entry point of the console script."""
    schema.register()
    with ExitStack() as stack:
        if "launcher=torchrun" in sys.argv and not torchrun.is_first():
            # Every rank composes the configuration, but one alone may write its folder.
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="distattn-"))
            sys.argv += [f"hydra.run.dir={scratch}", f"hydra.sweep.dir={scratch}", "hydra.output_subdir=null"]
            sys.argv += ["hydra/job_logging=none", "hydra/hydra_logging=none"]
        try:
            _compose_and_run()
        except _End:
            raise
        except KeyboardInterrupt:
            print("distattn: interrupted", file=sys.stderr)
            raise SystemExit(130) from None
        except SystemExit as end:
            raise SystemExit(2 if end.code == 1 else end.code) from None  # Hydra has printed why
    raise SystemExit(0)


@hydra.main(version_base="1.3", config_path="pkg://distattn.conf", config_name="config")
def _compose_and_run(composed: DictConfig) -> None:
    try:
        code = _run(composed)
    except ConfigError as error:
        if torchrun.is_first() or composed.launcher.name != "torchrun":
            print(f"distattn: {error}", file=sys.stderr)
        code = 2
    except Exception:
        traceback.print_exc()
        code = 1
    if code:
        raise _End(code)  # ends a sweep too


def _run(composed: DictConfig) -> int:
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; give it one, as in {missing[0]}=...")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, schema.Config)
    check(config)
    job = find_job(config.job.name)
    hydra_config = HydraConfig.get()
    output_dir = Path(hydra_config.runtime.output_dir)
    if job.on_paper:
        if config.cluster.world_size is not None:
            check_ranks(config, config.cluster.world_size)
        job.check(config)
        return _run_on_paper(config, job, output_dir)
    if config.cluster.world_size is not None:
        raise ConfigError(
            f"cluster.world_size is {config.cluster.world_size}, which is for job=plan only; "
            "expected launcher.num_workers, or torchrun's --nproc-per-node"
        )
    if isinstance(config.launcher, schema.LocalConfig):
        prepare()  # its imports run beside those of this process
    if isinstance(config.launcher, schema.RayConfig):
        from distattn.launch import ray_cluster

        job.check(config)
        return ray_cluster.launch(config, job, output_dir)
    device = choose_device(config.launcher.device)
    if isinstance(config.launcher, schema.LocalConfig):
        world_size = local.count_ranks(config.launcher, device, job)
        check_ranks(config, world_size)
        job.check(config)
        return local.launch(config, device, world_size, output_dir)
    check_ranks(config, torchrun.count_ranks(device))
    job.check(config)
    number = 0 if OmegaConf.is_missing(hydra_config.job, "num") else hydra_config.job.num
    return torchrun.launch(config, job, device, output_dir, number)


def _run_on_paper(config: schema.Config, job: Job, output_dir: Path) -> int:
    import torch

    with Display() as display:
        device = torch.device("cpu")
        result = job.run(config, Context(0, 1, 0, device, None, output_dir, Shown(display, 0)))
    return print_result(result)


if __name__ == "__main__":
    main()
