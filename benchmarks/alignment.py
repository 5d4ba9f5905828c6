"""How long before a collapse the gradients of an attack cease to agree."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fastrobust.attack.pgd import pgd
from fastrobust.config import reading
from fastrobust.data import loaders
from fastrobust.data.augment import center_crop
from fastrobust.data.held_out import evenly_spaced
from fastrobust.train import guard, schedules, step


def record(config, every: int) -> dict:
    """Trains without ending at a collapse."""
    device = torch.device("cpu")
    config = loaders.resolve(config, device)
    loader = loaders.Phases(config, device).enter(0)
    training = step.build(config, loader, device)
    learner, phase = training.learner, config.phases[0]
    images, labels, _ = loader.still(evenly_spaced(len(loader), guard.IMAGES))
    images = center_crop(images, phase.resolution)
    steps = schedules.steps_in(config, phase, len(loader))
    robust, trained = [], []
    for i, batch in enumerate(loader.batches(config.seed, 0, phase.batch_size, 0, steps), 1):
        training(batch)
        if i % every == 0:
            scale = training.scale_now()
            settings = {"alpha": config.guard.alpha * scale, "steps": config.guard.steps, "restarts": 1, "seed": 0}
            found = pgd(learner.model, images, labels, threat=training.threat.scaled(scale), **settings)
            learner.model.train()
            _, correct, seen = learner.read_sums()
            learner.reset_sums()
            robust.append(round(found.robust.double().mean().item(), 3))
            trained.append(round(correct / seen, 3))
    return {
        "every": every,
        "robust": robust,
        "trained": trained,
        "epoch_steps": steps / phase.epochs,
        "alignments": [round(a, 3) for a in learner.alignments.tolist()],
    }


if __name__ == "__main__":
    p = argparse.ArgumentParser()
    p.add_argument("config")
    p.add_argument("overrides", nargs="*")
    p.add_argument("--every", type=int, default=20)
    p.add_argument("--json", type=Path)
    a = p.parse_args()
    a.json.write_text(json.dumps(record(reading.load(a.config, a.overrides), a.every)))
