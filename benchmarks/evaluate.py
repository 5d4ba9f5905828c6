"""PGD-50-10 on the examples that are still robust, against a plain attack on all of them, with the same verdicts.

    python -m benchmarks.evaluate --quick      # two CPU cores: a few minutes
    python -m benchmarks.evaluate --run runs/cifar10_fgsm

Without --run a small network is trained first (Fashion-MNIST, one epoch) and attacked at a radius at which less than half
of the examples stay robust, as with the paper's CIFAR-10 models: the fewer stay, the more there is to gain.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from benchmarks import measure, usual_loop
from fastrobust.attack.pgd import NOISE_CHUNK, pgd, start_noise
from fastrobust.attack.verdicts import evaluating
from fastrobust.config import reading
from fastrobust.data import loaders
from fastrobust.models.weights import read_weights
from fastrobust.runtime import distributed
from fastrobust.train.training import Training


def small_model(device: torch.device):
    config = reading.load(
        Path(__file__).parent.parent / "configs/quickstart.yaml",
        ["phases.0.epochs=1", "guard.action=off", "evaluation.epsilon=0.15", "evaluation.alpha=0.02"],
    )
    with tempfile.TemporaryDirectory() as folder:
        job = Training(config, Path(folder), device)
        job.train()
    return job.learner.model.eval(), config


def main() -> None:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("--run", help="a finished run; default: train a small network")
    p.add_argument("--limit", type=int, default=1000)
    arguments = p.parse_args()
    device = distributed.pick_device(arguments.device)
    if arguments.run:
        model, config, _ = read_weights(arguments.run)
        model = model.to(device)
    else:
        model, config = small_model(device)
    epsilon, alpha = config.evaluation.epsilon[0], config.evaluation.alpha
    alpha = epsilon / 4 if alpha is None else alpha
    data = loaders.test_set(config, 200 if arguments.quick else arguments.limit)
    images = data.images.to(device).contiguous(memory_format=torch.channels_last)
    labels = data.labels.to(device)
    settings = {"epsilon": epsilon, "alpha": alpha, "steps": 50, "restarts": 10, "batch_size": config.evaluation.batch_size}
    verdicts = {}

    def noise(restart: int, first: int, count: int) -> torch.Tensor:
        parts = [start_noise(images, c, epsilon, (0, restart)) for c in range(0, len(labels), NOISE_CHUNK)]
        return torch.cat(parts)[first : first + count]

    def plain() -> None:
        with evaluating(model):
            verdicts["plain"] = usual_loop.plain_pgd(model, images, labels, noise, **settings)

    def shrinking() -> None:
        verdicts["shrinking"] = pgd(model, images, labels, **settings).robust

    rows = {"plain": plain, "shrinking active set": shrinking}
    times = measure.interleaved(rows, device, repetitions=3 if arguments.quick else 5, warm_up=1)
    different = int((verdicts["plain"] != verdicts["shrinking"]).sum())
    speedup = measure.ratio(times["plain"], times["shrinking active set"])
    result = {
        "examples": len(labels),
        "dataset": config.data.dataset,
        "attack": "pgd-50-10",
        "epsilon": epsilon,
        "robust_accuracy": verdicts["shrinking"].float().mean().item(),
        "different_verdicts": different,
        "speedup_over_plain": speedup,
        "seconds": {name: measure.summary(t) for name, t in times.items()},
    }
    table = []
    for name, t in times.items():
        s = measure.summary(t)
        spread = f"{s['median']:.2f} ({s['min']:.2f} to {s['max']:.2f})"
        table.append([name, spread, f"{measure.ratio(times['plain'], t):.2f}", str(different)])
    columns = ["PGD-50-10", "seconds, median (min to max)", "times the plain attack's speed", "verdicts that differ"]
    measure.report("evaluate", columns, table, result, arguments.json, device)


if __name__ == "__main__":
    main()
