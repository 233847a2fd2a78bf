"""What a worker's device could do, and what memory is in use there."""

from __future__ import annotations

import resource

import torch

# FLOP/s of dense bf16 products of matrices, by a part of the device's name: NVIDIA's data sheets.
_PEAKS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "V100": 125e12,  # fp16
}


def peak_flops() -> float | None:
    """Of this rank's GPU; None where it is unknown, as every CPU's."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def peak_memory() -> int:
    """Bytes that tensors have had on the GPU at most, or this process on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
