"""The decoder that is shipped answers what is far away, on any number of ranks, and does not with a window alone."""

from dataclasses import replace
from typing import Any

from commanding import config_of
from rank_pool import RankPool

from distattn import weights
from distattn.jobs import needle
from distattn.jobs.context import Context
from distattn.jobs.settings import model_config

ASKED = ["experiment=needle", "job.lengths=[4096]", "job.depths=2", "job.picture=false", "job.fidelity_rows=0"]


def ask(context: Context) -> list[dict[str, Any]]:
    config = config_of(*ASKED)
    needle.check(config)
    found: list[dict[str, Any]] = needle.run(config, context).get("rows", [])
    return found


def test_the_shipped_decoder_answers(ranks: RankPool) -> None:
    for count in (1, 2):
        rows = ranks(count, ask)[0]
        right = {name: sum(row["right"] for row in rows if row["attention"] == name) for name in ("trained", "window")}
        assert right == {"trained": 2, "window": 0}


def test_its_file_says_how_it_was_trained() -> None:
    decoder, settings = weights.load(weights.SHIPPED)
    config = config_of("experiment=tiny_needle", "job.resume=start")
    assert weights.SHIPPED.stat().st_size <= 6_000_000
    assert sum(p.numel() for p in decoder.parameters()) <= 3_000_000
    assert settings["attention"] == config.attention
    assert replace(decoder.config, slice_rows=4096) == replace(model_config(config), dtype="float32", slice_rows=4096)
    for name in ("steps", "learning_rate", "warmup", "weight_decay", "curriculum", "choice_weight"):
        assert settings["training"][f"job.{name}"] == getattr(config.job, name), name
    assert settings["training"]["data.held_out"] == config.data.held_out
