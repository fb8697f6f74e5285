"""The decoder in training: what a step does to it, and what is read back of it, later."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from distattn import checkpoint
from distattn.choice_loss import choice_loss
from distattn.conf.schema import Config, TrainConfig
from distattn.data import Corpus
from distattn.errors import NotFinite
from distattn.extras import AttentionExtras
from distattn.jobs.context import Context
from distattn.jobs.curve import Row
from distattn.jobs.machine import peak_flops
from distattn.jobs.prefill import layer_plans
from distattn.jobs.reading import Part, Reader, Shard
from distattn.jobs.settings import model_config
from distattn.model import Decoder
from distattn.plan import Plan
from distattn.sharding import add_up, local, shard
from distattn.spans import Ints

BETAS = (0.9, 0.95)
# Steps that the host may be ahead of a GPU: enough to keep it busy, and few, since the deadline of an exchange counts
# from where the host began it.
AHEAD = 2


class Measured(NamedTuple):
    """What a step measured, on the device: reading it waits for the step.

    sums: float64 [9], the same on every rank: the weighted loss of all windows, the nats of text and of answers, the
    answers' bytes, the loss of the choice, how many chunks are chosen and how many there are to be, the square of the
    gradient's norm, and the FLOPs of the model.
    """

    step: int
    learning_rate: float
    sums: Tensor


class Trainer:
    """The decoder, its optimiser, and what one step does to them.

    The ranks are job.data_ranks groups. Each group shards windows of its own; parameters are sharded over all ranks.
    """

    def __init__(self, config: Config, context: Context, corpus: Corpus, held_out: Corpus | None = None) -> None:
        job = config.job
        assert isinstance(job, TrainConfig)
        self.config, self.job, self.context = config, job, context
        self.group = None if context.mesh is None else context.mesh.get_group()
        self.sequence_ranks = context.world_size // job.data_ranks
        self.windows = job.data_ranks * job.accumulate * job.batch
        self.tokens = config.seq_len * self.windows
        """Of a step, over all ranks."""
        plans = layer_plans(config, context, job.data_ranks)
        self._under_way: deque[torch.cuda.Event] = deque()
        self._known_pairs: WeakKeyDictionary[Plan, float] = WeakKeyDictionary()
        self.texts = [plan.spec.text for plan in plans]
        self.layout = plans[0].layout

        def pack(lengths: Ints) -> list[Plan]:
            return layer_plans(config, context, job.data_ranks, lengths, self.layout)

        more = (plans, pack if job.documents else None, context.rank // self.sequence_ranks)
        self.reader = Reader(config, corpus, *more)
        self.held_out = [] if held_out is None else Reader(config, held_out, *more).held_out(job.validate_windows)
        # What is learned stays in float32 where the arithmetic is bfloat16: small updates would be lost.
        sizes = model_config(config)
        self.mixed = sizes.dtype == "bfloat16"
        peak = peak_flops(context) if self.mixed else None
        self.peak = peak and peak * context.world_size
        self.model = Decoder(replace(sizes, dtype="float32") if self.mixed else sizes, config.seed).to(context.device)
        if context.mesh is not None:
            shard(self.model, context.mesh)
        if job.compile:
            self.model.compile_rows()
        self.parameters = list(self.model.parameters())
        matrices, others = ([p for p in self.parameters if (p.ndim > 1) == wanted] for wanted in (True, False))
        groups = [
            {"params": matrices, "weight_decay": job.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer: Any = torch.optim.AdamW(groups, lr=job.learning_rate, betas=BETAS, fused=True)
        for p in self.parameters:  # as AdamW itself begins, but now: there must be something to read a checkpoint into
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def state(self) -> checkpoint.State:
        """All that a step changes, by name; the tensors themselves, not copies."""
        named = dict(self.model.named_parameters())
        return {
            "model": {name: p.detach() for name, p in named.items()},
            "optimizer": {name: dict(self.optimizer.state[p]) for name, p in named.items()},
        }

    def step(self, step: int) -> Measured:
        """One update by the windows of that step, counted from 1; on a GPU, only begun when this returns.

        Where the loss or the gradient is not finite, parameters and optimiser stay as they are.

        Raises:
            PeerLost, StepTimeout, PlanMismatch: as every exchange.
        """
        if len(self._under_way) == AHEAD:
            self._under_way.popleft().synchronize()
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(9, dtype=torch.float64, device=self.context.device)
        for part in self.reader.step(step):
            sums[:7] += self._learn(part)
            sums[8] += self._flops(part) / self.sequence_ranks
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        sums[7] = torch.nn.utils.get_total_norm(gradients).double().square()
        add_up(sums, self.group, f"the loss of step {step}")
        sums[4:7] /= self.sequence_ranks  # each rank of a group has these of the whole group
        norm = sums[7].sqrt()
        # What a scaler of gradients would tell the optimiser: by what to divide them, and whether to leave this step
        # out. So they are clipped without another pass over them, and nobody has to wait for a number.
        clip = math.inf if self.job.clip is None else self.job.clip
        self.optimizer.grad_scale = ((norm + 1e-6) / clip).clamp(min=1).float()
        self.optimizer.found_inf = (~torch.isfinite(sums).all()).float()
        rate = learning_rate(self.job, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.context.device.type == "cuda":
            self._under_way.append(torch.cuda.Event(blocking=True))
            self._under_way[-1].record()
        return Measured(step, rate, sums)

    def rows(self, measured: Sequence[Measured], seconds: float) -> list[Row]:
        """The curve of consecutive steps that took so long, the same on every rank; waits for their end.

        Raises:
            NotFinite: the loss or the gradient of one of them is, on every rank.
        """
        rows = []
        speed = self.tokens * len(measured) / seconds
        for one, sums in zip(measured, torch.stack([one.sums for one in measured]).tolist(), strict=True):
            weighted, text, answers, asked, choice, chosen, lookups, square, flops = sums
            loss, norm = weighted / self.windows + choice, math.sqrt(square)
            if not all(map(math.isfinite, sums)):
                raise NotFinite(
                    f"step {one.step}: the loss is {loss} and the norm of its gradient {norm}; expected finite numbers "
                    "(a lower job.learning_rate or a longer job.warmup may help)"
                )
            rows.append(
                Row(
                    step=one.step,
                    loss=loss,
                    bits_per_byte=text / (self.tokens - asked) / math.log(2),
                    answer_bits=answers / asked / math.log(2) if asked else None,
                    chosen=chosen / lookups if lookups else None,
                    held_out_bits=None,
                    learning_rate=one.learning_rate,
                    gradient_norm=norm,
                    mfu=flops * speed / self.tokens / self.peak if self.peak else None,
                    tokens_per_second=speed,
                )
            )
        return rows

    @torch.no_grad()
    def validate(self) -> float:
        """Bits a byte of the held-out windows; all ranks together, and the same on each.

        Raises:
            PeerLost, StepTimeout, PlanMismatch: as every exchange.
        """
        nats = torch.zeros((), dtype=torch.float64, device=self.context.device)
        groups, mine = self.job.data_ranks, self.context.rank // self.sequence_ranks
        for first in range(0, len(self.held_out), groups):
            # Parameters are gathered by all ranks together: a group without a window reads the last one, for nothing.
            number = min(first + mine, len(self.held_out) - 1)
            windows, plans = self.held_out[number]
            one = Shard(windows, plans[0], self.context.device)
            with self._autocast():
                found = self.model.loss(self.model(one.tokens, plans), one.labels).double().sum()
            if number == first + mine:
                nats += found
        if self.group is not None:
            self.model.reshard()  # type: ignore[operator]
        add_up(nats, self.group, "the held-out loss")
        return nats.item() / (len(self.held_out) * self.config.seq_len) / math.log(2)

    def _flops(self, part: Part) -> float:
        """Of a training step's model: products with matrices, and scores and sums of the pairs that are attended.

        The backward pass counts twice the forward pass, and nothing that is computed again (Chowdhery et al., "PaLM",
        2022, appendix B).
        """
        matrices = sum(p.numel() for name, p in self.model.named_parameters() if p.ndim > 1 and name != "embedding")
        tokens = len(part.windows) * self.config.seq_len
        pairs = len(part.windows) * sum(self._pairs(plan) for plan in part.plans)
        return 3.0 * (2 * matrices * tokens + 4 * self.config.model.head_dim * pairs)

    def _pairs(self, plan: Plan) -> float:
        """Of all ranks of the group and all heads."""
        if plan not in self._known_pairs:
            self._known_pairs[plan] = sum(work.pairs for work in plan.work())
        return self._known_pairs[plan]

    def _learn(self, part: Part) -> Tensor:
        """Adds the gradients of this rank's rows of windows side by side to the parameters'.

        Returns float64 [7], see `Measured`: the first four of this rank's rows, the others of all of its group.
        """
        windows, plans = part
        # By position from the text, so that the last row of a shard has the first byte of the next one.
        shard = Shard(windows, plans[0], self.context.device)
        choices: list[Tensor] = []
        numbers: list[Tensor] = []

        def observe(layer: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, extras: AttentionExtras, _: Any) -> None:
            if plans[layer].spec.select is None:
                return
            for row, lookups in enumerate(shard.lookups):
                one = extras._replace(pool_keys=None if extras.pool_keys is None else extras.pool_keys[row : row + 1])
                lost, found = choice_loss(q[row : row + 1], k[row : row + 1], plans[layer], lookups, one)
                choices.append(lost / found[1].clamp(min=1))
                numbers.append(found)

        weight = self.job.choice_weight
        with self._autocast():
            hidden = self.model(shard.tokens, plans, observe if weight else None)
            nats = self.model.loss(hidden, shard.labels)
        weighted = (nats * shard.weights).sum()
        loss = weighted / self.windows
        found = nats.new_zeros(3, dtype=torch.float64)
        if choices:
            choice = torch.stack(choices).mean() * weight * len(windows) / self.windows
            loss = loss + choice
            found = torch.cat((choice.detach().double()[None], torch.stack(numbers).double().sum(0)))
        loss.backward()
        exact = nats.detach().double()
        mine = weighted.detach().double(), (exact * ~shard.asked).sum(), (exact * shard.asked).sum()
        return torch.cat((torch.stack((*mine, shard.asked.sum().double())), found))

    def _autocast(self) -> torch.autocast:
        # What is kept in 16 bits would outlive the gathered parameters that it was made of.
        kept = self.group is None
        return torch.autocast(self.context.device.type, torch.bfloat16, enabled=self.mixed, cache_enabled=kept)


def learning_rate(job: TrainConfig, step: int) -> float:
    """Of a step, counted from 1: in a line up to job.learning_rate at step job.warmup, then half a cosine down to 0."""
    if step <= job.warmup:
        return job.learning_rate * step / job.warmup
    share = (step - 1 - job.warmup) / (job.steps - job.warmup)
    return job.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
