"""fastrobust: image classifiers that withstand adversarial examples, trained as fast as the hardware allows."""

from typing import TYPE_CHECKING

from fastrobust.runtime import spin

spin.bound()  # before torch is imported

__version__ = "0.1.0"
__all__ = ["load"]

if TYPE_CHECKING:
    from fastrobust.models.weights import load


def __getattr__(name: str):
    if name == "load":
        from fastrobust.models.weights import load

        return load
    raise AttributeError(f"module 'fastrobust' has no attribute '{name}'")
