"""The most floating-point operations per second that a device can do: from a datasheet, or measured."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from tercet.model.precision import activations_dtype

MEASURED = "the speed of a measured product of matrices"

# Without sparsity, in TFLOP/s: bf16 or fp16 with fp32 sums, tf32, fp32 outside of tensor cores. None: not there, or
# there for inference alone. From NVIDIA's datasheets, which give most tensor-core figures with sparsity: half of those.
# Names are those of `torch.cuda.get_device_name`, whole, so a laptop's GPU or a slice of a GPU (MIG) is measured.
_TERA = 1e12
_DATASHEETS: tuple[tuple[str, str, float, float | None, float], ...] = (
    # HGX B200 datasheet: a server of eight has 36 PFLOPS of bf16 with sparsity, 18 of tf32, 0.6 of fp32
    (r"B200", "B200", 2250, 1125, 75),
    # H100 datasheet: 1,979 (SXM), 1,513 (PCIe) and 1,671 (NVL) TFLOPS of bf16 with sparsity
    (r"H100 80GB HBM3|H100 SXM5?.*", "H100 SXM", 989.5, 494.5, 67),
    (r"H100 PCIe", "H100 PCIe", 756.5, 378, 51),
    (r"H100 NVL", "H100 NVL", 835.5, 417.5, 60),
    # H200 datasheet: 1,979 (SXM) and 1,671 (NVL) TFLOPS of bf16 with sparsity
    (r"H200", "H200", 989.5, 494.5, 67),
    (r"H200 NVL", "H200 NVL", 835.5, 417.5, 60),
    # GH200 datasheet: 1,979 TFLOPS of bf16 with sparsity
    (r"GH200 (480GB|144G HBM3e)", "GH200", 989.5, 494.5, 67),
    # A100 datasheet
    (r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe", "A100", 312, 156, 19.5),
    # A30, A10 and A10G datasheets
    (r"A30", "A30", 165, 82, 10.3),
    (r"A10", "A10", 125, 62.5, 31.2),
    (r"A10G", "A10G", 70, 35, 31.5),
    # L4 datasheet: 242 TFLOPS of bf16 with sparsity. L40 and L40S datasheets: both figures
    (r"L4", "L4", 121, 60, 30.3),
    (r"L40", "L40", 181, 90.5, 90.5),
    (r"L40S", "L40S", 362, 183, 91.6),
    # RTX A6000 and RTX 6000 Ada datasheets: 309.7 and 728.5 (bf16) TFLOPS with sparsity
    (r"RTX A6000", "RTX A6000", 154.8, 77.4, 38.7),
    (r"RTX 6000 Ada Generation", "RTX 6000 Ada", 364.2, 182.1, 91.1),
    # Whitepapers of the architectures Ampere GA102, Ada and Blackwell, "with FP32 accumulate"
    (r"RTX 3090", "RTX 3090", 71, 35.6, 35.6),
    (r"RTX 4090", "RTX 4090", 165.2, 82.6, 82.6),
    (r"RTX 5090", "RTX 5090", 209.5, 104.8, 104.8),
    # T4 and V100 datasheets: fp16
    (r"T4", "T4", 65, None, 8.1),
    (r"V100-SXM2-(16|32)GB.*", "V100 SXM", 125, None, 15.7),
    (r"V100-PCIE-(16|32)GB", "V100 PCIe", 112, None, 14),
)
_WITHOUT_BF16 = {"T4", "V100 SXM", "V100 PCIe"}

# Matrices of this size reach the speed of larger ones on a CPU; a GPU needs larger ones to be busy.
CPU_SIZE, GPU_SIZE = 512, 4096
MEASURE_SECONDS = 0.03


@dataclass(frozen=True)
class Peak:
    """The speed that a rank's device is measured by."""

    flops_per_second: float
    source: str
    """Completes "38 % of …"."""


def peak_of(device: torch.device, precision: str) -> Peak:
    """Return the peak of a rank's device in a precision: fp32, tf32, bf16 or fp16.

    A datasheet's where it is known, otherwise what a product of matrices reaches now; a CPU takes 0.03 s to measure it.
    On a CPU that depends on what else the machine does."""
    if device.type == "cuda" and (listed := listed_peak(torch.cuda.get_device_name(device), precision)) is not None:
        return listed
    return Peak(_measured(device, precision), f"{MEASURED} in {precision}")


def listed_peak(name: str, precision: str) -> Peak | None:
    """Return the peak of the GPU of a name, as CUDA reports it, from its datasheet; None if it is not known."""
    short_name = re.sub(r"^(NVIDIA |Tesla |GeForce )+", "", name)
    for pattern, label, sixteen_bits, tf32, fp32 in _DATASHEETS:
        if re.fullmatch(pattern, short_name):
            speeds = {"bf16": sixteen_bits, "fp16": sixteen_bits, "tf32": tf32, "fp32": fp32}
            speed = None if precision == "bf16" and label in _WITHOUT_BF16 else speeds[precision]
            return None if speed is None else Peak(speed * _TERA, f"the peak of {label} in {precision}")
    return None


def _measured(device: torch.device, precision: str) -> float:
    """Return the operations per second of the fastest of several products of square matrices."""
    size = CPU_SIZE if device.type == "cpu" else GPU_SIZE
    dtype = activations_dtype(precision)
    draw = torch.Generator().manual_seed(0)  # the training's random numbers stay the same
    left, right = (torch.randn(size, size, generator=draw).to(device, dtype) for _ in range(2))
    fastest = float("inf")
    ends_at = time.monotonic() + MEASURE_SECONDS
    num_products = 0
    while num_products < 3 or time.monotonic() < ends_at:
        started = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - started)
        num_products += 1
    return 2 * size**3 / fastest
