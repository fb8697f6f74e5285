#!/usr/bin/env python3
"""What the cost model says that bench_distributed.py would measure on other numbers of GPUs; nothing is run.

    python scripts/predict_distributed.py 4 8 [--machine FILE] [--csv FILE] [--commit NAME]

Predictions, not measurements: bfloat16, the plans that would be run, the speeds of a machine file (default: what two
H100s of one host were measured to reach). Columns as in bench_distributed.py; "bound" is what takes longest on the
slowest rank. Weak scaling: "efficiency" is the FLOPs of visited tiles a second and GPU, over those on one GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bench_distributed import CASES, DIM, SCALING, Case
from contending import predicted_ms
from measuring import add_output, here, positive, write_rows

from distattn import make_plan
from distattn.errors import ConfigError
from distattn.forecast import plan_peak_bytes, predict
from distattn.machine import Machine
from distattn.plan import DEFAULT_MACHINE, Plan

ITEMSIZE = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gpus", nargs="+", type=positive, help="numbers of GPUs")
    parser.add_argument("--machine", type=Path, default=DEFAULT_MACHINE, help="a JSON file of the machine")
    add_output(parser)
    options = parser.parse_args()
    try:
        machine = Machine.load(options.machine)
    except ConfigError as error:
        parser.error(str(error))
    rows = []
    for gpus in options.gpus:
        for name, case in CASES.items():
            ways = (False, True) if case.backward != "nobody" else (False,)
            rows += [row("predicted", name, case, gpus, machine, backward) for backward in ways]
        for name, case in SCALING.items():
            if not name.startswith("weak"):
                continue
            for backward in (False, True):
                one, found = (row("predicted scaling", name, case, n, machine, backward) for n in (1, gpus))
                rows.append(found | {"efficiency": round(rate(found) / rate(one), 4)})
    columns = ("case", "gpus", "way", "ms", "tflops", "planned_mib", "layout", "schedule", "bound", "efficiency")
    print("predicted, not measured: " + ", ".join(columns))
    for one in rows:
        print(", ".join(str(one[name]) for name in columns))
    if options.csv:
        about = here(options.commit)
        write_rows(options.csv, [x | {"machine": machine.name, "commit": about["commit"]} for x in rows])


def rate(found: dict[str, Any]) -> float:
    """FLOPs of visited tiles a GPU and second, in units that ratios do without."""
    return float(found["planned_tflop"] / found["gpus"] / found["ms"])


def row(mode: str, name: str, case: Case, gpus: int, machine: Machine, backward: bool) -> dict[str, Any]:
    length, case = case.on(gpus, 1)
    sizes = {"heads": case.heads, "kv_heads": case.kv_heads, "head_dim": DIM}
    plan: Plan = make_plan(case.spec(), length, **sizes, world_size=gpus, rank=0)
    ms, times = predicted_ms(plan, ITEMSIZE, backward, machine), 3.5 if backward else 1.0
    work = plan.work(ITEMSIZE)
    forward = predict(plan, machine, ITEMSIZE)
    return {
        "mode": mode,
        "case": name,
        "heads": f"{case.heads}/{case.kv_heads}",
        "gpus": gpus,
        "tokens": length,
        "way": "forward+backward" if backward else "forward",
        "ms": round(ms, 3),
        "tflops": round(times * 4 * DIM * sum(w.pairs for w in work) / gpus / ms / 1e9, 2),
        "efficiency": None,
        "layout": plan.layout.name,
        "schedule": plan.schedule,
        "planned_tflop": round(times * sum(w.flops for w in work) / 1e12, 4),
        "planned_mib": round(plan_peak_bytes(plan, ITEMSIZE, backward=backward).max() / 2**20),
        "bound": forward.bound(forward.slowest),
    }


if __name__ == "__main__":
    main()
