"""job=plan: what attention would take on any number of ranks. Nothing is run."""

from __future__ import annotations

from typing import Any

from distattn.conf.schema import Config, PlanConfig
from distattn.errors import ConfigError
from distattn.explain import table
from distattn.forecast import plan_peak_bytes, predict
from distattn.jobs.context import Context
from distattn.jobs.settings import attention_spec, check_ranks, plan_options
from distattn.machine import Machine
from distattn.plan import Plan, make_plan
from distattn.prediction import assumptions

ON_PAPER = True

_ITEMSIZE = {"float64": 8, "float32": 4}


def check(config: Config) -> None:
    """Check what this job is told beside what all jobs are.

    Raises:
        ConfigError: a number is too small, or there is no such machine.
    """
    assert isinstance(config.job, PlanConfig)
    _machine(config)
    for world_size in config.job.world_sizes or [config.cluster.world_size or 1]:
        check_ranks(config, world_size)


def run(config: Config, context: Context) -> dict[str, Any]:
    """Prints the plan's table, for rank 0 of `cluster.world_size` ranks, or a line for each of `job.world_sizes`."""
    assert isinstance(config.job, PlanConfig)
    machine, itemsize = _machine(config), _ITEMSIZE.get(config.model.dtype, 2)
    if config.job.world_sizes:
        return {"report": _scaling(config, machine, itemsize)}
    plan = _plan(config, config.cluster.world_size or 1)
    report = plan.explain(itemsize, machine)
    if config.job.picture:
        report += f"\n\nPicture: {plan.picture(context.output_dir / 'plan.png')}"
    return {"report": report}


def _machine(config: Config) -> Machine:
    assert isinstance(config.job, PlanConfig)
    gpus = config.cluster.gpus_per_node
    if gpus is not None and gpus < 1:
        raise ConfigError(f"cluster.gpus_per_node is {gpus}; expected at least 1")
    machine = Machine.load(config.job.machine)
    return machine if gpus is None else machine.with_nodes(gpus)


def _plan(config: Config, world_size: int) -> Plan:
    spec, head_ranks = attention_spec(config), config.layout.head_ranks
    return make_plan(spec, world_size=world_size, rank=0, head_ranks=head_ranks, **plan_options(config))


def _scaling(config: Config, machine: Machine, itemsize: int) -> str:
    """The same sequence on several numbers of ranks."""
    assert isinstance(config.job, PlanConfig)
    header = ("ranks", "layout", "schedule", "forward ms", "bound by", "and backward ms", "bound by", "peak GB")
    rows = []
    for world_size in config.job.world_sizes:
        plan = _plan(config, world_size)
        forward, backward = (predict(plan, machine, itemsize, backward=way) for way in (False, True))
        rows.append(
            (
                f"{world_size:,}",
                plan.layout.name,
                plan.schedule,
                f"{1e3 * forward.seconds:,.3f}",
                forward.bound(forward.slowest),
                f"{1e3 * (forward.seconds + backward.seconds):,.3f}",
                backward.bound(backward.slowest),
                f"{plan_peak_bytes(plan, itemsize, backward=True).max() / 1e9:,.2f}",
            )
        )
    lines = [
        f"{config.seq_len:,} tokens, {config.model.heads} query and {config.model.kv_heads} key/value heads of "
        f"{config.model.head_dim}, {8 * itemsize} bits: predicted, one layer, the slowest rank"
        + (f"; each {config.layout.head_ranks} ranks exchange heads" if config.layout.head_ranks > 1 else ""),
        attention_spec(config).text,
        "",
        *table(header, rows),
        "",
        *assumptions(machine, max(config.job.world_sizes)),
    ]
    return "\n".join(lines)
