"""What `make stress` does: for each part a function of (folder, count) that returns its figures, with what is wrong in a
list, the full count, and the few of the quick form."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.stress import fuzz, kills, limits, ranks, tiny


class Part(NamedTuple):
    run: Callable[[Path, int], dict]
    full: int
    quick: int


def _killed(seed: int = 0, **options) -> Callable[[Path, int], dict]:
    return lambda folder, count: kills.kill_at_random(kills.training(_config(folder)), folder, count, seed, **options)


def _written(kind: str, kill: Callable) -> Callable[[Path, int], dict]:
    return lambda folder, count: kill(kills.writing(kind, tiny.write_images(folder / "data")), folder, count)


def _config(folder: Path) -> Path:
    return tiny.write_config(folder, tiny.write_images(folder / "data"))


def _fuzzer(name: str) -> Callable[[Path, int], dict]:
    return lambda folder, count: fuzz.fuzz(name, folder / "files", count)


PARTS = {
    "sigkill": Part(_killed(), 100, 2),
    "sigkill_in_a_write": Part(
        lambda folder, count: kills.kill_in_writes(kills.training(_config(folder)), folder, count), 40, 2
    ),
    "sigkill_write_ffcv": Part(_written("ffcv", kills.kill_at_random), 100, 2),
    "sigkill_write_dali": Part(_written("dali", kills.kill_at_random), 100, 2),
    "sigkill_write_ffcv_in_a_write": Part(_written("ffcv", kills.kill_in_writes), 40, 2),
    "sigkill_write_dali_in_a_write": Part(_written("dali", kills.kill_in_writes), 40, 2),
    "torn_checkpoint": Part(_killed(1, tear=kills.tear_checkpoint), 40, 1),
    "sigterm": Part(_killed(2, signum=signal.SIGTERM), 40, 1),
    "lost_process": Part(ranks.lost_process, 40, 1),
    "full_disk": Part(lambda folder, count: limits.full_disk(_config(folder), folder, count), 16, 2),
    "read_only_disk": Part(lambda folder, count: limits.read_only_disk(_config(folder), folder), 1, 1),
    "clock": Part(lambda folder, count: limits.clock(_config(folder), folder, count), 10, 1),
    "repeated": Part(lambda folder, count: limits.repeated(folder, tiny.write_images(folder / "data"), count), 10, 1),
    "growth": Part(lambda folder, count: limits.growth(folder, tiny.write_images(folder / "data"), count), 200, 40),
    "out_of_memory": Part(lambda folder, count: limits.out_of_memory(folder), 1, 1),
    "fuzz_configs": Part(_fuzzer("configs"), 10_000, 30),
    "fuzz_idx": Part(_fuzzer("idx"), 5_000, 30),
    "fuzz_cifar_pickles": Part(_fuzzer("cifar_pickles"), 5_000, 30),
    "fuzz_archives": Part(_fuzzer("archives"), 5_000, 30),
    "fuzz_images": Part(_fuzzer("images"), 10_000, 30),
    "fuzz_checkpoints": Part(_fuzzer("checkpoints"), 5_000, 30),
    "fuzz_sealed_checkpoints": Part(_fuzzer("sealed_checkpoints"), 5_000, 30),
    "fuzz_weights": Part(_fuzzer("weights"), 5_000, 30),
    "fuzz_prepared": Part(_fuzzer("prepared"), 10_000, 30),
    "fuzz_decoders": Part(_fuzzer("decoders"), 5_000, 15),
}
