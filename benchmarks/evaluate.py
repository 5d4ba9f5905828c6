"""PGD-50-10 on the examples that are still robust, against a plain attack on all of them, with the same verdicts.

    python -m benchmarks.evaluate --quick      # two CPU cores: a few minutes
    python -m benchmarks.evaluate --run runs/cifar10_fgsm
    python -m benchmarks.evaluate --run runs/cifar10_fgsm --bf16 --limit 300   # verdicts and time of a search in bf16

Without --run a small network is trained first (Fashion-MNIST, one epoch) and attacked at a radius at which less than half
of the examples stay robust, as with the paper's CIFAR-10 models: the fewer stay, the more there is to gain. Where
Fashion-MNIST is not found, or with --generated, its place is taken by images that are generated.
"""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path

import torch

from benchmarks import measure, usual_loop
from fastrobust.attack.base import Setting
from fastrobust.attack.pgd import NOISE_CHUNK, Pgd, pgd, start_noise
from fastrobust.attack.rounds import run_rounds
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import classified, evaluating
from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.data import loaders, sets
from fastrobust.data.loaders.resident import Resident
from fastrobust.evaluation.trained import open_trained
from fastrobust.runtime import distributed, half
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import ConfigError, DataError
from fastrobust.train.schedules import steps_in
from fastrobust.train.step import build


def generated(count: int, seed: int) -> sets.ImageSet:
    """Images of Fashion-MNIST's size: of each of ten classes a smooth picture, fainter or stronger, in noise."""
    generator = torch.Generator().manual_seed(0)
    coarse = 1.5 * (torch.rand(10, 1, 5, 5, generator=generator) - 0.5)
    pictures = torch.nn.functional.interpolate(coarse, 28, mode="bilinear", align_corners=False)
    generator.manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=generator)
    strength = torch.rand(count, 1, 1, 1, generator=generator)
    noise = torch.randn(count, 1, 28, 28, generator=generator)
    pixels = (0.5 + strength * pictures[labels] + 0.1 * noise).clamp(0, 1).mul(255).round().to(torch.uint8)
    return sets.ImageSet(pixels, labels, tuple("0123456789"), "generated")


def small_model(device: torch.device, train: sets.ImageSet | None) -> tuple[torch.nn.Module, Config]:
    """A network trained for an epoch, on the images given or on Fashion-MNIST."""
    config = reading.load(
        Path(__file__).parent.parent / "configs/quickstart.yaml",
        ["phases.0.epochs=1", "evaluation.epsilon=0.15", "evaluation.alpha=0.02"],
    )
    phase = config.phases[0]
    if train is None:
        config = loaders.resolve(config, device)
        loader = loaders.Phases(config, device).enter(0)
    else:
        loader = Resident(train, device)
    step = build(config, loader, device)
    for batch in loader.batches(config.seed, 0, phase.batch_size, 0, steps_in(config, phase, len(loader))):
        step(batch)
    return step.learner.model.eval(), config


def compare_precisions(
    model: torch.nn.Module, data: sets.ImageSet, setting: dict, steps: int, restarts: int, repetitions: int
) -> dict:
    """The attack as an evaluation runs it, searching in fp32 and in bf16, and in fp32 with memory as glibc has it: processor
    seconds, and verdicts that differ. A search in fp32 from other starts says how many differ by chance."""
    images, threat = data.images.contiguous(memory_format=torch.channels_last), Threat(setting.pop("epsilon"))
    clean, found = classified(model, images, data.labels, setting["batch_size"]), {}

    def search(name: str, seed: int = 0) -> None:
        found[name] = clean.clone()
        attack = Pgd(Setting(model, images, threat, **setting, seed=seed, bf16=name == "bf16"), (steps, restarts))
        run_rounds(attack, images, data.labels, found[name], threat=threat)

    rows = {
        "fp32, memory given back": measure.with_memory(lambda: search("fp32"), kept=False),
        "fp32": measure.with_memory(lambda: search("fp32"), kept=True),
        "bf16": measure.with_memory(lambda: search("bf16"), kept=True),
    }
    with evaluating(model):
        times = measure.interleaved(rows, torch.device("cpu"), repetitions=repetitions, warm_up=0, clock=time.process_time)
        search("fp32, other starts", 1)
    first = times["fp32, memory given back"]
    return {
        "speedups": {name: measure.summary([a / b for a, b in zip(first, t, strict=True)]) for name, t in times.items()},
        "seconds": {name: measure.summary(t) for name, t in times.items()},
        "clean": int(clean.sum()),
        "robust": {name: int(robust.sum()) for name, robust in found.items()},
        "broken_in_fp32_alone": int((found["bf16"] & ~found["fp32"]).sum()),
        "broken_in_bf16_alone": int((found["fp32"] & ~found["bf16"]).sum()),
        "differ_with_other_starts": int((found["fp32"] != found["fp32, other starts"]).sum()),
    }


def there(dataset: str) -> bool:
    try:
        return bool(sets.locate(dataset))
    except DataError:
        print(f"{dataset} was not found: its place is taken by generated images", file=sys.stderr)
        return False


def main() -> int:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("--run", help="a finished run; default: train a small network")
    p.add_argument("--generated", action="store_true", help="train and attack on generated images")
    p.add_argument("--bf16", action="store_true", help="the same search in fp32 and in bf16, by processor time")
    p.add_argument("--attack", type=int, nargs=2, default=[50, 10], metavar=("STEPS", "RESTARTS"), help="of --bf16")
    p.add_argument("--limit", type=int, help="test images (default 1000, with --quick 200)")
    return main_with_errors(lambda: run(p.parse_args()))


def run(arguments: Namespace) -> int:
    device = distributed.pick_device(arguments.device)
    limit = arguments.limit or (200 if arguments.quick else 1000)
    if arguments.run:
        trained = open_trained(arguments.run, device=device)
        model, config, data = trained.model, trained.config, trained.images(limit)
    elif arguments.generated or not there("fashion_mnist"):
        model, config = small_model(device, generated(20_000, 1))
        data = generated(limit, 2)
    else:
        model, config = small_model(device, None)
        data = loaders.test_set(config, limit)
    epsilon = config.evaluation.epsilon[0]
    if arguments.bf16:
        if not half.has_bf16():
            raise ConfigError("--bf16 needs a processor that has it")
        steps, restarts = arguments.attack
        about = {"alpha": config.evaluation.alpha_at(epsilon), "epsilon": epsilon}
        about["batch_size"] = config.evaluation.batch_size
        found = compare_precisions(model, data, about, steps, restarts, 1 if arguments.quick else 3)
        result = {"examples": len(data.labels), "dataset": config.data.dataset, "model": config.model.name}
        result |= {"epsilon": epsilon, "attack": f"pgd-{steps}-{restarts}", **found}
        table = [
            [name, f"{t['median']:.1f}", f"{found['speedups'][name]['median']:.2f}", str(found["robust"].get(name, ""))]
            for name, t in found["seconds"].items()
        ]
        columns = ["search", "seconds of the processor", "times the first's speed", "robust"]
        measure.report("search", columns, table, result, arguments.json, device)
        return 0
    threat, alpha = Threat(epsilon), config.evaluation.alpha_at(epsilon)
    images = data.images.to(device).contiguous(memory_format=torch.channels_last)
    labels = data.labels.to(device)
    settings = {"alpha": alpha, "steps": 50, "restarts": 10, "batch_size": config.evaluation.batch_size}
    verdicts = {}

    def noise(restart: int, first: int, count: int) -> torch.Tensor:
        parts = [start_noise(images, c, threat, (0, restart)) for c in range(0, len(labels), NOISE_CHUNK)]
        return torch.cat(parts)[first : first + count]

    def plain() -> None:
        with evaluating(model):
            verdicts["plain"] = usual_loop.plain_pgd(model, images, labels, noise, epsilon=epsilon, **settings)

    def shrinking() -> None:
        verdicts["shrinking"] = pgd(model, images, labels, threat=threat, **settings).robust

    rows = {"plain": plain, "shrinking active set": shrinking}
    times = measure.interleaved(rows, device, repetitions=3 if arguments.quick else 5, warm_up=1)
    different = int((verdicts["plain"] != verdicts["shrinking"]).sum())
    speedup = measure.ratio(times["plain"], times["shrinking active set"])
    result = {
        "examples": len(labels),
        "dataset": "generated" if data.source == "generated" else config.data.dataset,
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
