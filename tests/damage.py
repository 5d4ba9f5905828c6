"""Contents of a file that no longer are what was written."""

from __future__ import annotations

import random
from collections.abc import Iterator


def damages(content: bytes) -> Iterator[bytes]:
    noise = random.Random(0)
    yield b""
    yield b"\0"
    yield b"not a file of this kind at all"
    yield noise.randbytes(5000)
    for share in (0.05, 0.5, 0.95):
        yield content[: int(len(content) * share)]
    yield content[:-1]
