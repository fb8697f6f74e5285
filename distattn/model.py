"""A small byte-level decoder over a sharded sequence, for jobs that need a real model around `attend`.

Pre-norm transformer: RMSNorm, rotary positions, grouped-query attention through `attend`, SwiGLU. Attention
is the only place where tokens meet, so everything else runs in slices of rows: a rank with half a million
tokens never holds an MLP activation or a logit for more than one slice of them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from distattn.attend import Selection, attend
from distattn.data import IGNORE
from distattn.decoding import Step
from distattn.errors import ConfigError
from distattn.extras import AttentionExtras
from distattn.plan import Plan
from distattn.rotary import rotary_table, rotate

Observer = Callable[[int, Tensor, Tensor, Tensor, Tensor, AttentionExtras, Selection | None], None]
"""observe(layer, q, k, v, out, extras, selection): what went into `attend` in a layer and what came out, this rank's
rows."""

# Rows whose gradients are added up at a time, see _Lookup.
_LOOKED_UP = 1 << 14
SHAPES = ("layers", "width", "heads", "kv_heads", "head_dim", "hidden")
"""Fields of a ModelConfig from which the shapes of parameters follow."""

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a decoder.

    Attributes:
        layers: number of blocks.
        width: features of the residual stream.
        heads, kv_heads: query heads and key/value heads; kv_heads divides heads.
        head_dim: features a head, even (rotary positions turn pairs).
        hidden: features inside the SwiGLU.
        rope_theta: base of the rotary wavelengths, 2 pi to 2 pi theta^((head_dim - 2) / head_dim) tokens.
        vocab: number of token values; 256 for bytes.
        dtype: of parameters and activations; a key of DTYPES.
        slice_rows: rows that norms, projections, the MLP and the loss treat at a time.
        select_from: a layer whose choice of chunks all later layers take over (after GLM-5.2's shared index); None:
            each layer chooses for itself. Layers from it on have the same selection in their specs, or none.
        unrotated_layers: layers without rotary positions: what they read far away looks the same at every distance
            (Kazemnejad et al., "The impact of positional encoding on length generalization", 2023).
        grow_from: queries of unrotated layers are multiplied by max(1, log(p + 1) / log(grow_from)), p their position:
            the weight of one key among p then stays as p grows (Nakanishi, "Scalable-Softmax", 2025, equation 4, there
            with a learned factor); None: they are not.

    Raises:
        ConfigError: a size is below 1, kv_heads does not divide heads, head_dim is odd, dtype is unknown, a layer is
            none of the decoder's, or grow_from is below 2.
    """

    layers: int = 2
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    hidden: int = 640
    rope_theta: float = 1_000_000.0
    vocab: int = 256
    dtype: str = "float32"
    slice_rows: int = 1024
    select_from: int | None = None
    unrotated_layers: Sequence[int] = ()
    grow_from: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden", "vocab", "slice_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; expected at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(f"model.heads is {self.heads}; expected a multiple of model.kv_heads, {self.kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim is {self.head_dim}; expected an even number")
        if not self.rope_theta > 0:
            raise ConfigError(f"model.rope_theta is {self.rope_theta}; expected more than 0")
        if self.select_from is not None and not 0 <= self.select_from < self.layers:
            raise ConfigError(f"model.select_from is {self.select_from}; expected a layer from 0 to {self.layers - 1}")
        for layer in self.unrotated_layers:
            if not 0 <= layer < self.layers:
                raise ConfigError(f"model.unrotated_layers has {layer}; expected a layer from 0 to {self.layers - 1}")
        if self.grow_from is not None and self.grow_from < 2:
            raise ConfigError(f"model.grow_from is {self.grow_from}; expected at least 2, or null")
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")


class Block(nn.Module):
    """One layer: attention, and the two row-wise halves on either side of it."""

    def __init__(self, config: ModelConfig, rotated: bool) -> None:
        super().__init__()
        self.config, self.rotated = config, rotated
        dtype = DTYPES[config.dtype]
        width, hidden, inner = config.width, config.hidden, config.heads * config.head_dim
        heads_out = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.attention_norm = nn.Parameter(torch.ones(width, dtype=dtype))
        self.qkv = nn.Parameter(torch.empty(heads_out, width, dtype=dtype))
        self.attention_out = nn.Parameter(torch.empty(width, inner, dtype=dtype))
        self.mlp_norm = nn.Parameter(torch.ones(width, dtype=dtype))
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, width, dtype=dtype))
        self.down = nn.Parameter(torch.empty(width, hidden, dtype=dtype))

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        plan: Plan,
        selection: Selection | None = None,
        observe: Callable[..., None] | None = None,
    ) -> tuple[Tensor, Selection | None]:
        """This rank's rows after the layer, and what it chose.

        Args:
            x: [B, plan.tokens, width]; without gradients it is overwritten.
            positions: int64 [1, plan.tokens].
            selection: a choice to share; None: one is made where the plan has any.
            observe: as that of :class:`Decoder`, without the layer.
        """
        pools = self.rotated and not plan.spec.is_static
        rows = self.config.slice_rows
        q, k, v, *plain = by_rows(rows, partial(self.before, pools=pools), x, positions)
        extras = AttentionExtras(pool_keys=plain[0], rotate=self.turn) if pools else AttentionExtras()
        chosen: Selection | None = None
        if plan.spec.select is None:
            attended = attend(q, k, v, plan, extras=extras)
        else:
            attended, chosen = attend(q, k, v, plan, extras=extras, selection=selection, return_selection=True)
        if observe is not None:
            observe(q, k, v, attended, extras, chosen)
        del q, k, v, plain, extras
        (x,) = by_rows(rows, self.after, x, attended, overwrite=True)
        return x, chosen

    def before(self, x: Tensor, positions: Tensor, pools: bool) -> tuple[Tensor, ...]:
        """x [B, T, width], positions int64 [1, T] -> q [B, T, H, D], k and v [B, T, Hkv, D]; q, k turned.

        pools: also k before it was turned, which is what summaries are made of; only where keys are turned.
        """
        c = self.config
        heads = F.linear(_rms_norm(x, self.attention_norm), self.qkv).unflatten(
            2, (c.heads + 2 * c.kv_heads, c.head_dim)
        )
        q, k, v = torch.split(heads, [c.heads, c.kv_heads, c.kv_heads], dim=2)
        if not self.rotated:
            if c.grow_from is not None:
                growth = ((positions + 1).double().log() / math.log(c.grow_from)).clamp(min=1)
                q = (q * growth[..., None, None]).to(q.dtype)
            return q, k, v
        cos, sin = rotary_table(positions, c.head_dim, c.rope_theta, _accurate(x.dtype))
        turned = rotate(q, cos, sin), rotate(k, cos, sin), v
        return (*turned, k) if pools else turned

    def turn(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Pooled keys to the centres of their chunks; see `AttentionExtras.rotate`."""
        c = self.config
        return rotate(keys, *rotary_table(positions.unsqueeze(0), c.head_dim, c.rope_theta, _accurate(keys.dtype)))

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """x [B, T, width] and attended [B, T, H, D] -> the next x."""
        x = x + F.linear(attended.flatten(2), self.attention_out)
        gate, up = F.linear(_rms_norm(x, self.mlp_norm), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Decoder(nn.Module):
    """A decoder whose sequence is sharded over ranks as its plans say.

    Parameters are the same on every rank for the same seed; they are drawn in float32 on the CPU, without
    touching the global random state, and only then converted to the model's dtype.

    Args:
        config: sizes.
        seed: of the parameters.
    """

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        dtype = DTYPES[config.dtype]
        self.embedding = nn.Parameter(torch.empty(config.vocab, config.width, dtype=dtype))
        self.blocks = nn.ModuleList(
            Block(config, layer not in config.unrotated_layers) for layer in range(config.layers)
        )
        self.norm = nn.Parameter(torch.ones(config.width, dtype=dtype))
        self.head = nn.Parameter(torch.empty(config.vocab, config.width, dtype=dtype))
        self._draw(seed)

    def forward(self, tokens: Tensor, plans: Sequence[Plan], observe: Observer | None = None) -> Tensor:
        """Run all layers on this rank's tokens.

        Without gradients every buffer is written slice by slice and x is overwritten in place: the peak is x,
        q, k, v, the attention output and what `attend` needs. With gradients the same code runs under
        checkpointing: a slice is computed again in the backward pass.

        Args:
            tokens: [B, T], any integer dtype, with T = plan.tokens.
            plans: one plan a layer, all over the same rows; one plan may serve many layers.
            observe: called once a layer; the tensors are freed afterwards, so copy the rows to keep.

        Returns:
            hidden [B, T, width], to be given to `loss` or `logits`.

        Raises:
            ValueError: the number of plans is not the number of layers, they differ in their rows or do not
                fit the model's heads, the layer ``select_from`` selects nothing, or tokens have another shape.
        """
        self._check(tokens, plans)
        positions = plans[0].on(tokens.device, "positions").unsqueeze(0)
        (x,) = by_rows(self.config.slice_rows, self._embed, tokens)
        kept: Selection | None = None
        for layer, (block, plan) in enumerate(zip(self.blocks, plans, strict=True)):
            seen = None if observe is None else partial(observe, layer)
            x, chosen = block(x, positions, plan, kept if plan.spec.select is not None else None, seen)
            if layer == self.config.select_from:
                kept = chosen
        return x

    @torch.no_grad()
    def read(self, tokens: Tensor, step: Step) -> Tensor:
        """Run all layers on new tokens of sequences in a cache, which keeps their keys and values.

        Args:
            tokens: [1, T], any integer dtype: this rank's rows of the step, in their order.
            step: of a cache with a spec a layer.

        Returns:
            hidden [1, T, width], to be given to `logits`.
        """
        positions = step.positions.to(tokens.device).unsqueeze(0)
        rows = self.config.slice_rows
        (x,) = by_rows(rows, self._embed, tokens)
        source = self.config.select_from
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            spec = step.cache.specs[layer]
            pools = block.rotated and not spec.is_static
            q, k, v, *plain = by_rows(rows, partial(block.before, pools=pools), x, positions)
            extras = AttentionExtras(pool_keys=plain[0], rotate=block.turn) if pools else AttentionExtras()
            taken = source if source is not None and layer > source and spec.select is not None else None
            attended = step.attend(layer, q, k, v, extras=extras, choice_of=taken)
            (x,) = by_rows(rows, block.after, x, attended, overwrite=True)
        step.end()
        return x

    def compile_rows(self) -> None:
        """Let torch.compile join what is done row by row; `attend` stays as it is. The first pass then takes longer."""
        for block in self.blocks:
            assert isinstance(block, Block)
            block.before = torch.compile(block.before)  # type: ignore[method-assign]
            block.after = torch.compile(block.after)  # type: ignore[method-assign]
        self._loss_rows = torch.compile(self._loss_rows)  # type: ignore[method-assign]

    def loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the next byte, a token: float32 [B, T] in nats, 0 where the label is `IGNORE`.

        The mean over a sharded sequence is the sum of all ranks divided by the number of labels of all ranks.

        Args:
            hidden: [B, T, width], from `forward`.
            labels: int64 [B, T].

        Raises:
            ValueError: labels have another shape than hidden's first two dimensions.
        """
        if labels.shape != hidden.shape[:2]:
            shapes = tuple(labels.shape), tuple(hidden.shape[:2])
            raise ValueError(f"labels has the shape {shapes[0]}; expected {shapes[1]}, as hidden")
        (nats,) = by_rows(self.config.slice_rows, self._loss_rows, hidden, labels)
        return nats

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of the next byte: [..., width] -> float32 [..., vocab] (float64 for a float64 model).

        For chosen rows; `loss` keeps to a slice at a time.
        """
        return F.linear(_rms_norm(hidden, self.norm), self.head).to(_accurate(hidden.dtype))

    def _embed(self, tokens: Tensor) -> Tensor:
        found: Tensor = _Lookup.apply(tokens.long(), self.embedding)  # type: ignore[no-untyped-call]
        return found

    def _loss_rows(self, hidden: Tensor, labels: Tensor) -> Tensor:
        scores = self.logits(hidden).flatten(0, 1)
        nats = F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORE, reduction="none")
        return nats.view(labels.shape)

    def _check(self, tokens: Tensor, plans: Sequence[Plan]) -> None:
        if len(plans) != self.config.layers:
            raise ValueError(f"plans has {len(plans)} plans; expected one a layer, {self.config.layers}")
        first = plans[0]
        for layer, plan in enumerate(plans):
            if (plan.seq_len, plan.segments) != (first.seq_len, first.segments):
                raise ValueError(f"plans[{layer}] has {_rows_of(plan)}; expected those of plans[0], {_rows_of(first)}")
        source = self.config.select_from
        if source is not None and plans[source].spec.select is None:
            found = f"plans[{source}] is for {plans[source].spec!r}"
            raise ValueError(f"{found}; expected a spec with select, since model.select_from is {source}")
        if tokens.ndim != 2 or tokens.shape[1] != first.tokens:
            raise ValueError(f"tokens has the shape {tuple(tokens.shape)}; expected [batch, {first.tokens}]")

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Every matrix ~ N(0, 1 / inputs), so that activations and attention scores start near size 1.

        Matrices that add to the residual stream are smaller by sqrt(2 layers), as in GPT-2 (Radford et al.,
        2019, section 2.3). The head is smaller by sqrt(width): predictions start near uniform, 8 bits a byte.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                continue  # norms start at 1
            std = parameter.shape[1] ** -0.5
            if name == "embedding":
                std = 1.0
            elif name == "head":
                std /= math.sqrt(self.config.width)
            elif name.endswith(("attention_out", "down")):
                std /= math.sqrt(2 * self.config.layers)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


class _Lookup(torch.autograd.Function):
    """Rows of a table, whose gradient is a product of matrices: that of `F.embedding` on a GPU is summed up in another
    order each time, and the same seed would not give the same decoder again."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.size = len(table)
        return table[tokens]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        (tokens,), grad = ctx.saved_tensors, grads[0].flatten(0, 1)
        every = torch.arange(ctx.size, device=tokens.device)[:, None]
        total = grad.new_zeros((ctx.size, grad.shape[1]), dtype=_accurate(grad.dtype))
        for some, rows in zip(tokens.flatten().split(_LOOKED_UP), grad.split(_LOOKED_UP), strict=True):
            total += (some == every).to(total.dtype) @ rows.to(total.dtype)
        return None, total.to(grad.dtype)


def by_rows(
    rows: int, compute: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor, overwrite: bool = False
) -> tuple[Tensor, ...]:
    """Apply a row-wise function slice by slice along dimension 1, and join what it returns along it.

    Args:
        rows: of a slice, over the whole batch.
        compute: takes a slice of each input, returns one tensor or several, with the rows in dimension 1.
        inputs: [B or 1, T, ...].
        overwrite: without gradients, write the result (one tensor, shaped as inputs[0]) into inputs[0].
    """
    batch, total = inputs[0].shape[:2]
    rows = max(1, rows // max(1, batch))
    # split, not indexing: its backward joins the gradients once instead of padding each to full length
    slices = list(zip(*(torch.split(x, rows, dim=1) for x in inputs), strict=True))
    if torch.is_grad_enabled():
        if len(slices) == 1:
            return _as_tuple(compute(*slices[0]))
        parts = [_as_tuple(checkpoint(compute, *piece, use_reentrant=False)) for piece in slices]
        return tuple(torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    whole: tuple[Tensor, ...] = (inputs[0],) if overwrite else ()
    for start, piece in zip(range(0, max(1, total), rows), slices, strict=True):
        part = _as_tuple(compute(*piece))
        whole = whole or tuple(x.new_empty(x.shape[0], total, *x.shape[2:]) for x in part)
        for target, x in zip(whole, part, strict=True):
            target[:, start : start + rows] = x
    return whole


def _rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps=1e-6)


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _as_tuple(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (x,) if isinstance(x, Tensor) else x


def _rows_of(plan: Plan) -> str:
    return f"{plan.tokens} of {plan.seq_len} rows in {len(plan.segments)} segments"
