"""Rotary positions."""

import torch
from torch import Tensor


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles p theta^(-2 i / head_dim) (Su et al., "RoFormer", 2021, section 3.2.2).

    Angles are taken in float64: in float32 they would be wrong by hundredths of a radian at position one million.

    Args:
        positions: int64 or float64 [..., T].
        head_dim: even.
        theta: base of the wavelengths, which are 2 pi to 2 pi theta^((head_dim - 2) / head_dim) tokens.
        dtype: of the result.

    Returns:
        cos and sin [..., T, 1, head_dim / 2], to be broadcast over heads.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions.double().unsqueeze(-1) * theta ** (-pair / head_dim)
    angles = angles.unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x[i], x[i + D/2]) by the angles of a rotary table.

    Args:
        x: [..., T, H, D].
        cos, sin: [..., T, 1, D / 2], at least as precise as x.

    Returns:
        [..., T, H, D] in the dtype of x.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
