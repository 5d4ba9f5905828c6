"""What `make endure` does: name -> a function of (folder, quick) that returns its figures, with what is wrong in a list."""

from __future__ import annotations

import signal
from pathlib import Path

from endure import fuzz, kills, limits, tiny


def _config(folder: Path) -> Path:
    return tiny.write_config(folder, tiny.write_images(folder / "data"))


def _fuzzer(name: str, files: int):
    return lambda folder, quick: fuzz.fuzz(name, folder / "files", 30 if quick else files)


PARTS = {
    # A line more for every Job that can be killed: a converter's write, training in several processes with a dead rank.
    "sigkill": lambda folder, quick: kills.kill_at_random(kills.training(_config(folder)), folder, 3 if quick else 100),
    "sigkill_in_a_write": lambda folder, quick: kills.kill_in_writes(_config(folder), folder, 2 if quick else 20),
    "torn_checkpoint": lambda folder, quick: kills.kill_at_random(
        kills.training(_config(folder)), folder, 2 if quick else 20, seed=1, tear=kills.tear_checkpoint
    ),
    "sigterm": lambda folder, quick: kills.kill_at_random(
        kills.training(_config(folder)), folder, 2 if quick else 20, seed=2, signum=signal.SIGTERM
    ),
    "full_disk": lambda folder, quick: limits.full_disk(_config(folder), folder, 2 if quick else 8),
    "read_only_disk": lambda folder, quick: limits.read_only_disk(_config(folder), folder),
    "clock": lambda folder, quick: limits.clock(_config(folder), folder, 1 if quick else 4),
    "growth": lambda folder, quick: limits.growth(folder, tiny.write_images(folder / "data"), 12 if quick else 200),
    "out_of_memory": lambda folder, quick: limits.out_of_memory(folder),
    "fuzz_configs": _fuzzer("configs", 10_000),
    "fuzz_idx": _fuzzer("idx", 5_000),
    "fuzz_cifar_pickles": _fuzzer("cifar_pickles", 5_000),
    "fuzz_archives": _fuzzer("archives", 5_000),
    "fuzz_images": _fuzzer("images", 10_000),
    "fuzz_checkpoints": _fuzzer("checkpoints", 5_000),
    "fuzz_sealed_checkpoints": _fuzzer("sealed_checkpoints", 5_000),
    "fuzz_weights": _fuzzer("weights", 5_000),
}
