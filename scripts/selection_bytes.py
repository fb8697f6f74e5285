#!/usr/bin/env python3
"""How much of K and V travels for chosen chunks: of random inputs, of a fresh model, and of one trained on the spot.

    python scripts/selection_bytes.py [--steps 600] [--train-length 16384] [--length 131072] [--csv FILE]

A small byte-level decoder with a hierarchical spec (a window of 512, two levels, the top 16 chunks of 64) learns Python
source code, and then reads a part of it that it has not seen. What it chooses does not depend on the number of ranks,
so one process tells for any number which chunks each rank would have to fetch. "of a ring" compares the bytes that a
rank sends with those of a ring that sends all K and V: the mean over ranks, and the busiest rank.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator

import torch
from measuring import add_output, here, positive, write_rows
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from distattn.attend import Selection, select
from distattn.data import Corpus, open_corpus
from distattn.extras import AttentionExtras
from distattn.model import Decoder, ModelConfig
from distattn.plan import Plan, make_plan
from distattn.presets import hierarchical
from distattn.spec import AttentionSpec

RANKS = (2, 4, 8)
LAYOUTS = ("contiguous", "striped")
CHUNK = 64
SIZES = {"heads": 8, "kv_heads": 2, "head_dim": 64}


def spec_of(per: str) -> AttentionSpec:
    return hierarchical(512, (CHUNK, 1024), (16,), 16, per)  # type: ignore[arg-type]


def plan_of(per: str, length: int, ranks: int = 1, layout: str = "auto") -> Plan:
    rank = {} if ranks == 1 else {"world_size": ranks, "rank": 0}
    return make_plan(spec_of(per), length, **SIZES, **rank, layout=layout)  # type: ignore[arg-type]


def batch(corpus: Corpus, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [1, length]: bytes, and the ones that follow them."""
    text = torch.from_numpy(corpus.read(start, start + length + 1).astype("int64")).to(device)
    return text[None, :-1], text[None, 1:]


def train(decoder: Decoder, corpus: Corpus, length: int, steps: int, device: torch.device) -> None:
    plans = [plan_of("token", length)] * decoder.config.layers
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(n / steps, 1.0)))
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        start = int(torch.randint(len(corpus) - length - 1, (), generator=generator))
        tokens, labels = batch(corpus, start, length, device)
        with torch.autocast(device.type, torch.bfloat16):
            loss = decoder.loss(decoder(tokens, plans), labels).mean()
        loss.backward()
        clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(steps // 10, 1) == 0 or step == steps - 1:
            print(f"step {step}  {float(loss.detach()) / math.log(2):.3f} bits a byte", flush=True)


def chosen_by_model(decoder: Decoder, corpus: Corpus, per: str, length: int) -> tuple[list[Tensor], float]:
    """Choices of every layer, int32 [tables, tiles, n], and the bits a byte."""
    found: list[Tensor] = []

    def keep(
        _layer: int, _q: Tensor, _k: Tensor, _v: Tensor, _out: Tensor, _extras: AttentionExtras, s: Selection | None
    ) -> None:
        assert s is not None
        found.append(s.chunks[0].cpu())

    device = decoder.embedding.device
    tokens, labels = batch(corpus, 0, length, device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        hidden = decoder(tokens, [plan_of(per, length)] * decoder.config.layers, keep)
        nats = decoder.loss(hidden, labels).mean()
    return found, float(nats) / math.log(2)


def chosen_at_random(per: str, length: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, heads, SIZES["head_dim"], generator=generator, device=device, dtype=torch.bfloat16)
        for heads in (SIZES["heads"], SIZES["kv_heads"], SIZES["kv_heads"])
    )
    return [select(q, k, v, plan_of(per, length)).chunks[0].cpu()]


def shares(chosen: Tensor, per: str, length: int) -> Iterator[dict[str, object]]:
    """Of a ring's bytes, what each rank would send for these choices."""
    tables, tiles, _ = chosen.shape
    for ranks in RANKS:
        for layout in LAYOUTS:
            hierarchy = plan_of(per, length, ranks, layout).hierarchy
            assert hierarchy is not None
            owner = torch.from_numpy(hierarchy.chunk_owner)
            asking = owner[torch.arange(tiles) // (CHUNK if per == "token" else 1)]
            sent = torch.zeros(ranks)
            for rank in range(ranks):
                mine = chosen[:, asking == rank].flatten(1).long()
                wanted = torch.zeros(tables, len(owner) + 1, dtype=torch.bool)
                wanted.scatter_(1, torch.where(mine < 0, len(owner), mine), True)
                wanted = wanted[:, :-1] & (owner != rank)
                sent += torch.bincount(owner, wanted.sum(0).float(), ranks)
            ring = (ranks - 1) * torch.bincount(owner, minlength=ranks) * tables
            share = sent / ring
            yield {"per": per, "ranks": ranks, "layout": layout} | {
                "of_a_ring_mean": f"{float(share.mean()):.3%}",
                "of_a_ring_busiest": f"{float(share.max()):.3%}",
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=positive, default=600, help="of training (default 600)")
    parser.add_argument("--train-length", type=positive, default=16_384, help="bytes of a step (default 16384)")
    parser.add_argument("--length", type=positive, default=131_072, help="bytes that are read then (default 131072)")
    add_output(parser)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus, held_out = open_corpus().split(0.1)
    held_out.require(arguments.length + 1)
    longest = max(arguments.length, arguments.train_length)
    decoder = Decoder(ModelConfig(layers=4, **SIZES, slice_rows=longest)).to(device)
    rows: list[dict[str, object]] = []

    def report(inputs: str, bits: float | None, per: str, choices: list[Tensor]) -> None:
        for layer, chosen in enumerate(choices):
            for row in shares(chosen, per, arguments.length):
                known = {"inputs": inputs, "bits_a_byte": "" if bits is None else f"{bits:.3f}", "layer": layer}
                rows.append(known | row | {"tokens": arguments.length} | here(arguments.commit))
                print("  ".join(f"{key} {rows[-1][key]}" for key in [*known, *row]), flush=True)

    for per in ("token", "tile"):
        report("random", None, per, chosen_at_random(per, arguments.length, device))
    for inputs in ("fresh model", "trained model"):
        if inputs == "trained model":
            train(decoder, corpus, arguments.train_length, arguments.steps, device)
        for per in ("token", "tile"):
            choices, bits = chosen_by_model(decoder, held_out, per, arguments.length)
            report(inputs, bits, per, choices)
    if arguments.csv:
        write_rows(arguments.csv, rows)


if __name__ == "__main__":
    main()
