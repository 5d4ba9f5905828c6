"""Machine code of Python functions, by numba."""

from __future__ import annotations

from numba import njit


def compiled(*signature, **how):
    """Makes machine code of a function, kept on the disk where that can be. It runs without the interpreter's lock."""

    def compile(function):
        try:
            return njit(*signature, nogil=True, cache=True, **how)(function)
        except RuntimeError:  # there is no folder for it
            return njit(*signature, nogil=True, **how)(function)

    return compile
