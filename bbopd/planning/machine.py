"""What a run is given: how many GPUs, with how much memory, and how fast they and the wires between them are by their data sheets."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bbopd.errors import ConfigError

__all__ = ["GPUS", "Gpu", "Machine", "find_gpu"]

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """Memory in GiB; dense bfloat16 products in TFLOP/s; memory, and links to GPUs of the same and of other nodes, in GB/s each way."""

    name: str
    memory: float
    peak: float
    bandwidth: float
    link: float
    network: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80, 312, 2039, 300, 25),
        Gpu("b200", 180, 2250, 8000, 900, 50),
        Gpu("h100", 80, 989, 3350, 450, 50),
        Gpu("h200", 141, 989, 4800, 450, 50),
        Gpu("l40s", 48, 362, 864, 32, 12.5),
        Gpu("rtx4090", 24, 165, 1008, 32, 12.5),
    )
}
"""By their makers' data sheets; ``network`` is that of a common server: an adapter of 400 Gb/s a GPU beside h100, 200 beside a100."""


@dataclass(frozen=True, slots=True)
class Machine:
    """``gpus`` of the trainer, and ``engines``, GPUs that sample. ``gpu_bytes`` None: nobody said how much memory one has."""

    gpus: int
    gpu_bytes: float | None
    gpu: Gpu | None
    engines: int = 1
    gpus_of_node: int = 8

    def with_gpus(self, count: int) -> Machine:
        return replace(self, gpus=count)


def find_gpu(name: str) -> Gpu:
    """Raises `ConfigError` for one that is not in `GPUS`."""
    if name not in GPUS:
        raise ConfigError(f"--gpu {name} is not known here: take one of {', '.join(sorted(GPUS))}, or give --gpu-memory and --rates")
    return GPUS[name]
