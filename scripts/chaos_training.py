"""Training that is killed and started again: each run must end with the curve of one that was left alone.

A run is `job=train` for 50 steps with a checkpoint every 7, hierarchical attention whose tokens choose chunks, and
`launcher.max_restarts=1`; at a random exchange of its first attempt one rank gets SIGKILL, or freezes. Example:

    python scripts/chaos_training.py --runs 10 --seed 0 --ranks 2 --csv chaos_training.csv
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distattn.conf.schema import Config
    from distattn.jobs.context import Context
    from distattn.launch.device import Device

STEPS = 50
OVERRIDES = [
    "job=train", "job.name=chaos_training:train", f"job.steps={STEPS}", "job.warmup=5", "job.save_every=7",
    "data=path", f"data.path={argparse.__file__}", "seq_len=256", "layout=striped", "layout.block_q=16",
    "layout.block_k=16", "attention=hierarchical", "attention.window=32", "attention.chunks=[16,64]",
    "attention.reach=[4]", "attention.top_k=2", "attention.per=token", "attention.global_keys=[0,1]", "model.layers=2",
    "model.width=32", "model.hidden=48", "model.heads=2", "model.kv_heads=1", "model.head_dim=16",
    "launcher.max_restarts=1", "launcher.timeout=10", "launcher.stop_timeout=0.5",
]  # fmt: skip
FAULT, STRUCK = "fault.json", "struck"


def train(config: Config, context: Context) -> dict[str, Any]:
    """job=train on one rank, with the fault that lies in its folder; how many exchanges it made is left there."""
    from distattn import exchange
    from distattn.jobs import train

    folder = context.output_dir
    fault = json.loads((folder / FAULT).read_text())
    seen = 0

    def strike(rank: int, stage: str) -> None:
        nonlocal seen
        seen += 1
        if fault["kind"] and (rank, seen) == (fault["rank"], fault["at"]) and not (folder / STRUCK).exists():
            (folder / STRUCK).touch()
            os.kill(os.getpid(), signal.SIGKILL if fault["kind"] == "kill" else signal.SIGSTOP)

    exchange.before_stage = strike
    result = train.run(config, context)
    (folder / f"exchanges{context.rank}").write_text(str(seen))
    return result


def play(
    device: Device, ranks: int, folder: Path, kind: str = "", rank: int = 0, at: int = 0
) -> tuple[int, list[tuple[Any, ...]]]:
    """The exit code of a run with a fault in it, and its curve: (step, loss, norm of the gradient)."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from distattn.conf import schema
    from distattn.jobs.curve import read
    from distattn.launch import local

    schema.register()
    with initialize_config_module("distattn.conf", version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*OVERRIDES, "output_dir=unused"]))
    assert isinstance(config, schema.Config)
    (folder / FAULT).write_text(json.dumps({"kind": kind, "rank": rank, "at": at}))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = local.launch(config, device, ranks, folder)
    return code, [(row.step, row.loss, row.gradient_norm) for row in read(folder / "train.csv")]


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))  # where the ranks find this module, by its name
    from measuring import in_a_folder, positive, write_rows

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=positive, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    parser.add_argument("--ranks", type=positive, default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=in_a_folder, help="where to write the rows")
    arguments = parser.parse_args()
    if arguments.ranks < 2:
        parser.error(f"--ranks is {arguments.ranks}; expected at least 2")
    source, rows = random.Random(arguments.seed), []
    with tempfile.TemporaryDirectory(prefix="distattn-chaos-") as name:
        code, expected = play(arguments.device, arguments.ranks, Path(name))
        exchanges = int((Path(name) / "exchanges0").read_text())
    assert (code, len(expected)) == (0, STEPS), "the run that was left alone failed"
    for number in range(arguments.runs):
        kind, rank = source.choice(("kill", "kill", "freeze")), source.randrange(arguments.ranks)
        at, began = source.randint(1, exchanges), time.monotonic()
        with tempfile.TemporaryDirectory(prefix="distattn-chaos-") as name:
            code, curve = play(arguments.device, arguments.ranks, Path(name), kind, rank, at)
            struck = (Path(name) / STRUCK).exists()
        same = code == 0 and struck and curve == expected
        row = {"run": number, "kind": kind, "rank": rank, "at": at, "of": exchanges, "code": code, "same": int(same)}
        rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    bad = sum(not row["same"] for row in rows)
    print(f"{len(rows)} runs, {bad} bad; the loss of step {STEPS} is {expected[-1][1]:.6f} nats a byte")
    if arguments.csv:
        write_rows(arguments.csv, rows)
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
