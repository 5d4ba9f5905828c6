"""Where Triton's kernels can be tested: on a GPU, or in Triton's interpreter on a CPU (see conftest.py)."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    numbers = [tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy")]
    if not CUDA and numbers[0] <= (3, 6) and numbers[1] >= (2, 4):
        return "the interpreter of Triton 3.6 needs numpy < 2.4"
    return None


needs_kernels = pytest.mark.skipif(missing() is not None, reason=str(missing()))
