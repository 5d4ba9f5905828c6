"""Verified, undecided and falsified against epsilon: the curve of a run, as JSON and as a plot.

    python -m benchmarks.verification runs/mnist_fgsm_warmup --limit 100 --output benchmarks/results/verification

Verdicts are kept in the run's directory: an interrupted call goes on, and a finer grid costs only its new points.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

from fastrobust.__main__ import count, pixels
from fastrobust.__main__ import main as fastrobust
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.files import write_json


def plot(points: list[dict], title: str, file: Path) -> None:
    """Stacked shares: verified below, then undecided, falsified and misclassified."""
    epsilons = [p["epsilon"] for p in points]
    kinds = ("verified", "timeout", "falsified", "misclassified")
    shares = [[100 * p[kind] / p["examples"] for p in points] for kind in kinds]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.stackplot(
        epsilons,
        shares,
        labels=("verified", "undecided", "falsified", "misclassified"),
        colors=("#3b7d5a", "#d9d3c3", "#c8643c", "#5c4a4a"),
    )
    for epsilon in epsilons:
        axes.axvline(epsilon, color="black", linewidth=0.4, alpha=0.3)
    axes.set(xlabel="epsilon", ylabel="% of test images", title=title, ylim=(0, 100), xlim=(epsilons[0], epsilons[-1]))
    axes.legend(loc="lower left")
    figure.savefig(file, dpi=130)


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.verification", description=__doc__.splitlines()[0])
    p.add_argument("run", type=Path, help="a run directory, or a model.safetensors alone in its folder")
    p.add_argument("--epsilons", type=pixels, nargs="+", default=[0.05, 0.1, 0.15, 0.2, 0.25, 0.3])
    p.add_argument("--limit", type=count, default=100)
    p.add_argument("--timeout", default="60")
    p.add_argument("--workers", type=count)
    p.add_argument("--output", type=Path, default=Path("benchmarks/results/verification"), help="without .json and .png")
    arguments = p.parse_args()

    def measure() -> int:
        points, folder = [], arguments.run if arguments.run.is_dir() else arguments.run.resolve().parent
        for epsilon in sorted(arguments.epsilons):
            command = ["verify", str(arguments.run), "--epsilon", f"{epsilon!r}", "--limit", f"{arguments.limit}"]
            command += ["--timeout", arguments.timeout]
            command += ["--workers", f"{arguments.workers}"] if arguments.workers else []
            status = fastrobust(command)
            if status:
                return status
            summary = folder / "verification" / f"epsilon-{epsilon:g}" / "summary.json"
            points.append(json.loads(summary.read_text()))
        write_json(arguments.output.with_suffix(".json"), {"run": folder.name, "points": points})
        plot(points, f"{folder.name}, {arguments.limit} test images", arguments.output.with_suffix(".png"))
        return 0

    return main_with_errors(measure)


if __name__ == "__main__":
    sys.exit(main())
