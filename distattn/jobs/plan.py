"""job=plan: what attention would take on any number of ranks. Nothing is run."""

from __future__ import annotations

from typing import Any

from distattn.conf.schema import Config, PlanConfig
from distattn.jobs.context import Context
from distattn.jobs.settings import attention_spec, plan_options
from distattn.plan import make_plan

ON_PAPER = True

_ITEMSIZE = {"float64": 8, "float32": 4}


def run(config: Config, context: Context) -> dict[str, Any]:
    """Prints the plan's table, for rank 0 of `cluster.world_size` ranks."""
    assert isinstance(config.job, PlanConfig)
    ranks, head_ranks = config.cluster.world_size or 1, config.layout.head_ranks
    plan = make_plan(attention_spec(config), world_size=ranks, rank=0, head_ranks=head_ranks, **plan_options(config))
    report = plan.explain(_ITEMSIZE.get(config.model.dtype, 2))
    if config.job.picture:
        report += f"\n\nPicture: {plan.picture(context.output_dir / 'plan.png')}"
    return {"report": report}
