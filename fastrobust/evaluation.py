"""Clean and robust accuracy of a model on a test set: what `summary.json` and the evaluate command report."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust import attacks, memory
from fastrobust.data import sources
from fastrobust.progress import Progress


def evaluate(
    model: nn.Module,
    data: sources.ImageSet,
    *,
    epsilon: float,
    alpha: float,
    steps: int,
    restarts: int,
    batch_size: int,
    seed: int = 0,
) -> dict[str, Any]:
    """Clean accuracy and accuracy under PGD-`steps`-`restarts` at radius epsilon, in fp32. epsilon and alpha are in pixels
    of [0, 1]. The model may be on any device; its mode and gradients are left as they are."""
    device = next(model.parameters()).device
    images = data.images.to(device).contiguous(memory_format=torch.channels_last)
    labels = data.labels.to(device)
    began = time.monotonic()
    with Progress(f"PGD-{steps}-{restarts} at epsilon {describe(epsilon)}", restarts * len(labels)) as bar:
        state = {"restart": 0, "left": len(labels), "next": 0}

        def progress(restart: int, examples: int) -> None:
            if restart != state["restart"]:  # the examples that no longer need attacking are done
                bar.done = restart * len(labels)
                state["restart"] = restart
            bar.advance(examples, f"restart {restart + 1} of {restarts}" if bar.due() else None)

        def one_step(images: Tensor, labels: Tensor) -> None:
            attacks.pgd(model, images, labels, epsilon=epsilon, alpha=alpha, steps=1, restarts=1, batch_size=len(images))

        batch = images[:batch_size], labels[:batch_size]
        with memory.explained("evaluation", "evaluation.batch_size", one_step, *batch):
            verdicts = attacks.pgd(
                model,
                images,
                labels,
                epsilon=epsilon,
                alpha=alpha,
                steps=steps,
                restarts=restarts,
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        clean, robust = int(verdicts.clean.sum()), int(verdicts.robust.sum())
    return {
        "clean_accuracy": clean / len(labels),
        "robust_accuracy": robust / len(labels),
        "robust_accuracy_after_one_restart": verdicts.after[0] / len(labels),
        "examples": len(labels),
        "resolution": images.shape[-1],
        "epsilon": epsilon,
        "attack": f"pgd-{steps}-{restarts}",
        "alpha": alpha,
        "seconds": round(time.monotonic() - began, 3),
    }


def describe(epsilon: float) -> str:
    """0.3 -> `0.3`, 8/255 -> `8/255`."""
    scaled = epsilon * 255
    return f"{round(scaled)}/255" if abs(scaled - round(scaled)) < 1e-6 and round(scaled) else f"{epsilon:g}"
