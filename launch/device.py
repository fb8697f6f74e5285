"""Which kind of device the ranks use."""

from typing import Literal

from distattn.errors import ConfigError

Device = Literal["cpu", "cuda"]


def choose_device(wanted: str) -> Device:
    """What `launcher.device` means on this machine: auto is cuda where there is one.

    Raises:
        ConfigError: it is no such kind, or this machine has none.
    """
    import torch

    gpus = torch.cuda.device_count()
    match wanted:
        case "auto":
            return "cuda" if gpus else "cpu"
        case "cuda":
            if not gpus:
                raise ConfigError("launcher.device is 'cuda', but PyTorch finds no CUDA device on this machine")
            return "cuda"
        case "cpu":
            return "cpu"
    raise ConfigError(f"launcher.device is {wanted!r}; expected auto, cpu or cuda")
