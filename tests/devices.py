"""Where kernels are tested: in Triton's interpreter on a CPU, and on a GPU where there is one."""

from __future__ import annotations

from importlib import metadata, util

import pytest
import torch

# only the interpreter needs the newer one: that of 3.6 stumbles over numpy 2.4
INTERPRETS = util.find_spec("triton") is not None and tuple(map(int, metadata.version("triton").split(".")[:2])) >= (3, 7)

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETS, reason="needs the interpreter of Triton 3.7"))
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])
