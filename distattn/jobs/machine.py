"""What a rank runs on, and how much of it is used."""

import resource
import sys

import torch

from distattn.jobs.context import Context


def synchronize(context: Context) -> None:
    """Wait for the device, before time is taken."""
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


def peak_bytes(context: Context) -> int:
    """Most memory held: by the CUDA allocator, or by this process."""
    if context.device.type == "cuda":
        return torch.cuda.max_memory_allocated(context.device)
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(context: Context) -> str:
    """For a report."""
    if context.device.type == "cuda":
        return torch.cuda.get_device_name(context.device)
    return f"CPU, {torch.get_num_threads()} threads a rank"
