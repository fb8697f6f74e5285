"""Weights of a decoder in one file (safetensors), with the sizes and the attention that they were trained with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distattn.errors import CheckpointError
from distattn.model import DTYPES, Decoder, ModelConfig

SHIPPED = Path(__file__).parent / "trained" / "needle.safetensors"
"""A small decoder that looks facts up, see scripts/results/EVALUATION.md."""


class Weights(NamedTuple):
    """decoder: in float32. settings: what `export` was given."""

    decoder: Decoder
    settings: dict[str, Any]


def export(
    path: Path,
    config: ModelConfig,
    parameters: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Write a decoder's parameters.

    Args:
        path: of the file; its folder is made if it does not exist.
        config: of the decoder.
        parameters: of the decoder, by name, in whole.
        settings: of JSON types; what whoever reads the file needs to know.
        dtype: of the numbers in the file.
    """
    tensors = {name: p.detach().to("cpu", dtype).contiguous() for name, p in parameters.items()}
    sizes = asdict(config) | {"unrotated_layers": [*config.unrotated_layers]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"model": json.dumps(sizes), "settings": json.dumps(dict(settings))})


def load(path: Path, dtype: str = "float32", slice_rows: int | None = None) -> Weights:
    """The decoder of a file that `export` wrote.

    Args:
        dtype: of its parameters, a key of `distattn.model.DTYPES`.
        slice_rows: see :class:`ModelConfig`; None: as in the file.

    Raises:
        CheckpointError: the file cannot be read, or is of something else.
    """
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = ModelConfig(**json.loads(said["model"]))
        decoder = Decoder(replace(config, dtype=dtype, slice_rows=slice_rows or config.slice_rows))
        decoder.load_state_dict({name: x.to(DTYPES[dtype]) for name, x in tensors.items()})
        return Weights(decoder, json.loads(said["settings"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"weights {path} cannot be read: {why}") from error
