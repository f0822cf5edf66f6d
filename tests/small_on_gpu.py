"""Both ops on a small case of every teacher, for compute-sanitizer to look at: ``python -m tests.small_on_gpu``."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks.gpu_contestants import IMPLS, engine_missing
from benchmarks.inputs import draw
from tests.test_gpu import KINDS, SMALL, of_kind, scores_of, step_of


def main() -> None:
    for impl in IMPLS:
        reason = engine_missing(impl, SMALL)
        if reason:
            print(reason)
            continue
        for kind in KINDS:
            step_of(draw(replace(of_kind(kind, "jsd" if kind.startswith("full") else "forward_kl"), N=5, V=4099)), impl)()
        scores_of(draw(replace(SMALL, N=5, V=4099)), impl)()
        torch.cuda.synchronize()
        print(impl, "ran")


if __name__ == "__main__":
    main()
