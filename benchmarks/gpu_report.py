"""Everything that needs a GPU, most important first: tests, benchmarks, then Table 3's FGSM row on CIFAR-10, three seeds.

    make gpu-report        # the same as python -m benchmarks.gpu_report --minutes 25

Every part writes a file under benchmarks/results/gpu/ when it ends, and is skipped where that file is there: a report that
was interrupted goes on where it was. CIFAR-10 is looked for as in training; without it those parts are skipped. The training
runs are those of `benchmarks.reproduce`, which shows them beside the paper's:

    python -m benchmarks.reproduce table3 --show --results benchmarks/results/gpu/reproduce
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from fastrobust.data import sets
from fastrobust.runtime.errors import DataError
from fastrobust.runtime.files import write_text

RESULTS = Path("benchmarks/results/gpu")
ROW, SEEDS = "cifar10_fgsm_fast", 3  # of Table 3


def parts() -> list[tuple[str, list[str]]]:
    """(the result file in RESULTS, the arguments of python that write it)."""

    def benchmark(name: str, *options: str, result: str = "") -> tuple[str, list[str]]:
        result = f"{result or name}.json"
        return result, ["-m", f"benchmarks.{name}", "--json", str(RESULTS / result), *options]

    found = [
        ("tests.txt", ["-m", "pytest", "-m", "gpu"]),
        benchmark("step", "--quick", result="step_quick"),
        benchmark("epoch"),
        benchmark("imagenet", "--repetitions", "3", "--steps", "10"),
        benchmark("epoch", "--batch-size", "512", result="epoch_512"),
        benchmark("profile"),
    ]
    try:
        sets.locate("cifar10")
        train = ["-m", "benchmarks.reproduce", "table3", "--only", ROW, "--results", str(RESULTS / "reproduce")]
        for seed in range(SEEDS):  # `--seeds N` trains those of the first N that have no result yet
            found.append((f"reproduce/full/{ROW}_seed{seed}.json", [*train, "--seeds", str(seed + 1)]))
    except DataError:
        print("CIFAR-10 was not found: its training runs are left out (set FASTROBUST_DATA)", file=sys.stderr)
    return [*found, benchmark("evaluate"), benchmark("step")]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--minutes", type=float, default=25)
    arguments = p.parse_args()
    if not torch.cuda.is_available():
        print("error: no CUDA GPU is visible; this report is about one", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * arguments.minutes
    RESULTS.mkdir(parents=True, exist_ok=True)
    failed = []
    for result, command in parts():
        left = end - time.monotonic()
        if (RESULTS / result).exists():
            print(f"{result}: done before", flush=True)
            continue
        if left < 30:
            print(f"{result}: no time left; run this again", flush=True)
            continue
        print(f"{result}: python {' '.join(command)}", flush=True)
        began = time.monotonic()
        log = RESULTS / f"{Path(result).stem}.log"
        with log.open("w") as out:
            try:
                status = subprocess.run([sys.executable, *command], stdout=out, stderr=out, timeout=left).returncode
            except subprocess.TimeoutExpired:
                status = 124
        text = log.read_text()
        print("\n".join(text.splitlines()[-12:]), flush=True)
        print(f"{result}: {'done' if status == 0 else f'FAILED ({status})'} in {time.monotonic() - began:.0f} s", flush=True)
        if status:
            failed.append(result)
        elif result == "tests.txt":
            write_text(RESULTS / result, text)
    print(f"failed: {', '.join(failed)}" if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
