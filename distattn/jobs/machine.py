"""What a rank runs on, and how much of it is used."""

import resource
import sys

import torch

from distattn.jobs.context import Context

# By a part of the name that the device gives itself; the first that fits. NVIDIA's data sheets of H100, H200 and A100.
_PEAKS = (("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12), ("H200", 989e12), ("A100", 312e12))


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


def peak_flops(context: Context) -> float | None:
    """Most bfloat16 FLOP/s of the device, not sparse, by its maker's data sheet; None where it is not known here."""
    if context.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(context.device)
    return next((peak for part, peak in _PEAKS if part in name), None)


def device_name(context: Context) -> str:
    """For a report."""
    if context.device.type == "cuda":
        return torch.cuda.get_device_name(context.device)
    return f"CPU, {torch.get_num_threads()} threads a rank"
