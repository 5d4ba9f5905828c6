"""fastrobust: image classifiers that withstand adversarial examples, trained as fast as the hardware allows."""

import importlib
from typing import TYPE_CHECKING

from fastrobust.runtime import spin

spin.bound()  # before torch is imported

__version__ = "0.1.0"
_PLACES = {  # imported when they are first used, so that `import fastrobust` costs nothing
    "fit": "fastrobust.train.from_python",
    "evaluate": "fastrobust.evaluation.from_python",
    "adversarial_images": "fastrobust.evaluation.from_python",
    "verify": "fastrobust.verification.from_python",
    "load": "fastrobust.models.weights",
    "FastrobustError": "fastrobust.runtime.errors",
}
__all__ = ["FastrobustError", "adversarial_images", "evaluate", "fit", "load", "verify"]

if TYPE_CHECKING:
    from fastrobust.evaluation.from_python import adversarial_images, evaluate
    from fastrobust.models.weights import load
    from fastrobust.runtime.errors import FastrobustError
    from fastrobust.train.from_python import fit
    from fastrobust.verification.from_python import verify


def __getattr__(name: str):
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'fastrobust' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
