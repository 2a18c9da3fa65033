"""What the sequence engine's planner has to know of a GPU, and the GPUs whose figures are known."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Device:
    """A GPU. Rates of arithmetic are per SM and cycle, with sums in fp32, not sparse; those of memory are totals."""

    name: str
    capability: int  # 90 is 9.0
    sms: int
    clock: float  # Hz, as held under load
    shared: int  # bytes of shared memory that a block may ask for
    tensor_flops: int  # of 16-bit products
    tf32_flops: int
    fp32_flops: int
    l2_bytes: int
    l2_bandwidth: float  # bytes/s, reading
    memory_bandwidth: float  # bytes/s


# SMs, rates, sizes and memory: NVIDIA's whitepapers of GA100, GA102, AD102 and GH100, data sheets of A10, L4, H100 SXM
# and B200; GeForce cards run 16-bit products with fp32 sums at half the rate. Clocks: boost; H100's as held under load.
# Shared memory: CUDA Programming Guide, technical specifications. L2 bandwidth: A100 and H100 as measured by
# github.com/te42kyfo/gpu-benches (H200's 9.8e12 at 1.98 GHz, the same chip, brought to this clock), RTX 4090 by
# github.com/smallscientist1/cuda_microbenchmark; RTX 3090, A10: 32 bytes a cycle from each of 48 slices; L4, B200 and
# RTX 5090: estimates from their relatives, by SMs and clock.
DEVICES = {
    device.name: device
    for device in (
        Device("A100", 80, 108, 1.41e9, 163 * 1024, 2048, 1024, 128, 40 << 20, 5.4e12, 2.04e12),
        Device("RTX 3090", 86, 82, 1.70e9, 99 * 1024, 512, 256, 256, 6 << 20, 2.6e12, 0.94e12),
        Device("A10", 86, 72, 1.70e9, 99 * 1024, 1024, 512, 256, 6 << 20, 2.6e12, 0.60e12),
        Device("L4", 89, 58, 2.04e9, 99 * 1024, 1024, 512, 256, 48 << 20, 1.8e12, 0.30e12),
        Device("RTX 4090", 89, 128, 2.52e9, 99 * 1024, 512, 256, 256, 72 << 20, 4.9e12, 1.01e12),
        Device("H100", 90, 132, 1.755e9, 227 * 1024, 4096, 2048, 256, 50 << 20, 8.5e12, 3.35e12),
        Device("B200", 100, 148, 1.85e9, 227 * 1024, 8192, 4096, 256, 126 << 20, 1.0e13, 8.0e12),
        Device("RTX 5090", 120, 170, 2.41e9, 99 * 1024, 512, 256, 256, 96 << 20, 6.5e12, 1.79e12),
    )
}


def device_of_cuda(properties: Any) -> Device:
    """The device that `torch.cuda.get_device_properties` describes.

    What torch does not tell is taken from the entry of the same name, else of the nearest older capability (the
    oldest for one that is older still); the bandwidth of L2 grows with SMs and clock.
    """
    capability = properties.major * 10 + properties.minor
    known = _nearest(properties.name, capability)
    sms = properties.multi_processor_count
    clock = min(known.clock, getattr(properties, "clock_rate", 0) * 1e3 or known.clock)  # torch tells the boost clock
    return dataclasses.replace(
        known,
        name=properties.name,
        capability=capability,
        sms=sms,
        clock=clock,
        shared=getattr(properties, "shared_memory_per_block_optin", known.shared),
        l2_bytes=properties.L2_cache_size,
        l2_bandwidth=known.l2_bandwidth * (sms * clock) / (known.sms * known.clock),
    )


def _nearest(name: str, capability: int) -> Device:
    for known in DEVICES.values():
        if re.search(rf"\b{known.name}\b", name):
            return known
    oldest, *newer = sorted(DEVICES.values(), key=lambda known: known.capability)
    return max(
        (known for known in newer if known.capability <= capability), key=lambda known: known.capability, default=oldest
    )
