"""What the simulated GPU has seen: see gpusim.cpp."""

from __future__ import annotations

import ctypes

import torch

HERE = torch.cuda.is_available() and torch.cuda.get_device_name(0) == "Simulated GPU"


def _ask(name: str) -> list[str]:
    function = getattr(ctypes.CDLL("libgpusim.so"), f"gpusim_{name}")
    function.restype = ctypes.c_char_p
    return function().decode(errors="replace").splitlines()


def reset() -> None:
    ctypes.CDLL("libgpusim.so").gpusim_reset()


def errors() -> list[str]:
    """Calls since the reset that CUDA forbids."""
    return _ask("errors")


def graph() -> list[str]:
    """The nodes of the last capture since the reset."""
    return _ask("graph")


def counts() -> dict[str, int]:
    """How often what was called since the reset; `stub NAME` is a function that the simulation knows by name alone."""
    return {name: int(n) for n, name in (line.split(" ", 1) for line in _ask("counts"))}


def graphs_with_nccl() -> int:
    """Graphs that live and hold NCCL's work."""
    return ctypes.CDLL("libgpusim.so").gpusim_graphs_with_nccl()
