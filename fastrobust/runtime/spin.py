"""How long OpenMP's threads wait actively for work. This must be settled before torch is imported."""

import os

LOOPS = "10000"  # of waiting before a thread sleeps; the default is to wait actively for milliseconds


def bound() -> None:
    """Bound the active waiting, unless the user has settled it. By default a thread without work occupies its core: a small
    network beside one busy core then trains ten times slower than with one thread."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", LOOPS)
