"""Machine code of Python functions, by numba."""

from __future__ import annotations

from collections.abc import Callable

from fastrobust.runtime.errors import first_line


def trouble(load: Callable[[], object]) -> str | None:
    """Why what `load` imports, which needs numba, cannot be had; or None."""
    try:
        load()
    except (ImportError, OSError, MemoryError) as error:  # OSError: LLVM does not fit under a limit of memory
        return f"it needs numba (pip install numba): {first_line(error)}"
    return None


def compiled(*signature, **how):
    """Makes machine code of a function, kept on the disk where that can be. It runs without the interpreter's lock."""
    from numba import njit

    def compile(function):
        try:
            return njit(*signature, nogil=True, cache=True, **how)(function)
        except RuntimeError:  # there is no folder for it
            return njit(*signature, nogil=True, **how)(function)

    return compile
