"""The window that weights go through, read as the other process reads it: from the file descriptor alone."""

import mmap
import os

import pytest
import torch

from bbopd.rollouts.vllm_weights import WeightWindow, view_tensors


def random_weights(seed: int, shapes: list[tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{index}": torch.randn(shape, generator=generator) for index, shape in enumerate(shapes)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_arrives_window_by_window(dtype):
    shapes = [(3, 7), (11,), (5_000_000,), (1,), (2_500, 2_500), (9_000_001,), (3, 3, 3), (30_000_000,)]
    weights = random_weights(1, shapes)
    window = WeightWindow((tensor.numel() for tensor in weights.values()), dtype, torch.device("cpu"))
    described = window.describe()
    received = {}
    fills = 0
    with mmap.mmap(os.dup(described["file"]), described["capacity"]) as other:
        seen = torch.frombuffer(other, dtype=torch.uint8)
        for entries in window.fill(weights.items()):
            fills += 1
            assert max(entry["offset"] for entry in entries) < window.capacity
            received |= {name: tensor.clone() for name, tensor in view_tensors(seen, entries, dtype)}
        del seen
    assert fills > 1
    assert list(received) == list(weights)
    for name, tensor in weights.items():
        assert torch.equal(received[name], tensor.to(dtype))
    window.close()


def test_a_window_holds_the_largest_parameter_and_no_second_copy_of_all():
    sizes = [40_000_000, 30_000_000, 20_000_000]
    window = WeightWindow(sizes, torch.bfloat16, torch.device("cpu"))
    assert 80_000_000 <= window.capacity < 81_000_000
    window.close()
    small = WeightWindow([5], torch.float32, torch.device("cpu"))
    assert small.capacity == 64 * 2**20
    small.close()
    small.close()


def test_parameters_that_are_not_contiguous_arrive_in_order():
    base = torch.arange(24.0).reshape(4, 6)
    window = WeightWindow([24], torch.float32, torch.device("cpu"))
    for entries in window.fill([("turned", base.T)]):
        ((_, tensor),) = view_tensors(window.memory, entries, torch.float32)
        assert torch.equal(tensor, base.T)
        del tensor
    window.close()
