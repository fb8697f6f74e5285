"""Two published methods, written out token by token in float64."""

import torch
from torch import Tensor

from distattn.extras import Mlp, MlpPool


def mlp_of(mlp: Mlp, members: list[Tensor]) -> Tensor:
    """W2 silu(W1 [x_j + p_j for all j] + b1)"""
    x = torch.cat([member + mlp.positions[j].double() for j, member in enumerate(members)])
    return mlp.w2.double() @ torch.nn.functional.silu(mlp.w1.double() @ x + mlp.b1.double())


def _softmax_row(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query [dim] over keys [n, dim]; zeros if there are none."""
    if not len(keys):
        return torch.zeros(values.shape[-1], dtype=torch.float64)
    return torch.softmax(scale * (keys @ query), dim=0) @ values


def naive_moba(q: Tensor, k: Tensor, v: Tensor, chunk: int, top_k: int, scale: float) -> Tensor:
    """MoBA (Lu et al., 2025): the query's own block, causally, and the top_k - 1 earlier ones of the nearest mean key.

    Each query head chooses by itself; of equal blocks the lower. Returns float64 [batch, N, heads, value_dim].
    """
    q, k, v = q.double(), k.double(), v.double()
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    out = []
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, :, h // group], v[b, :, h // group]
            for t in range(length):
                own = t // chunk
                scores = [float(q[b, t, h] @ keys[j * chunk : (j + 1) * chunk].mean(0)) for j in range(own)]
                blocks = sorted(range(own), key=lambda j, scores=scores: (-scores[j], j))[: top_k - 1]
                tokens = [s for s in range(t + 1) if s // chunk == own or s // chunk in blocks]
                out.append(_softmax_row(q[b, t, h], keys[tokens], values[tokens], scale))
    return torch.stack(out).reshape(batch, heads, length, -1).transpose(1, 2)


def naive_nsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Tensor,
    mlp_pool: MlpPool,
    block: int,
    stride: int,
    select_block: int,
    top_n: int,
    window: int,
    scale: float,
) -> Tensor:
    """NSA (Yuan et al., 2025): a sliding window, compressed blocks and selected blocks, each with a softmax and a gate.

    gates: [batch, N, heads, 3] before the sigmoid: window, compressed, selected. Of the ``top_n`` selected blocks, the
    first, the query's own and the one before it need no score; the others are chosen for all heads of a group by their
    compressed attention. Returns float64 [batch, N, heads, value_dim].
    """
    q, k, v, gates = q.double(), k.double(), v.double(), torch.sigmoid(gates.double())
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    starts = [s for s in range(0, length, stride) if s + block <= length]
    rows: dict[tuple[int, int, int], Tensor] = {}
    for b in range(batch):
        for kv in range(k.shape[2]):
            keys, values = k[b, :, kv], v[b, :, kv]
            small_keys = [mlp_of(mlp_pool.keys, list(keys[s : s + block])) for s in starts]
            small_values = [mlp_of(mlp_pool.values, list(values[s : s + block])) for s in starts]
            for t in range(length):
                own = t // select_block
                done = [m for m, s in enumerate(starts) if s + block <= t + 1]
                mass = [0.0] * own
                compressed = {}
                for h in range(kv * group, (kv + 1) * group):
                    compressed[h] = torch.zeros(values.shape[-1], dtype=torch.float64)
                    if not done:
                        continue
                    p = torch.softmax(scale * torch.stack([small_keys[m] @ q[b, t, h] for m in done]), dim=0)
                    compressed[h] = sum(p[m] * small_values[m] for m in done)
                    weights = p.tolist()
                    for m in done:
                        for piece in range(starts[m], starts[m] + block, stride):
                            if piece // select_block < own:
                                mass[piece // select_block] += weights[m]
                selected = {0, own, max(own - 1, 0)}
                others = sorted(set(range(own)) - selected, key=lambda j, mass=mass: (-mass[j], j))
                selected |= set(others[: max(0, top_n - len(selected))])
                tokens = [s for s in range(t + 1) if s // select_block in selected]
                recent = list(range(max(0, t - window + 1), t + 1))
                for h in range(kv * group, (kv + 1) * group):
                    query, gate = q[b, t, h], gates[b, t, h]
                    near = _softmax_row(query, keys[recent], values[recent], scale)
                    far = _softmax_row(query, keys[tokens], values[tokens], scale)
                    rows[b, t, h] = gate[0] * near + gate[1] * compressed[h] + gate[2] * far
    flat = [rows[b, t, h] for b in range(batch) for t in range(length) for h in range(heads)]
    return torch.stack(flat).reshape(batch, length, heads, -1)
