"""Detectors of catastrophic overfitting, of divergence and of a collapsed loss scale: three things, three remedies.

Catastrophic overfitting is single-step training that stops making models robust, from one epoch to the next. After each
epoch the guard attacks the same training images with PGD, without augmentation, and compares what it finds with the epoch
before, image by image. A diverged model has weights that are not numbers. When fp16's loss scale collapses the weights stay
as they are: every update overflows and is skipped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastrobust.attack.pgd import pgd
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import Verdicts
from fastrobust.config.schema import Config
from fastrobust.runtime.distributed import World
from fastrobust.train.methods.awp import Awp
from fastrobust.train.methods.base import Method
from fastrobust.train.methods.n_fgsm import NFgsm
from fastrobust.train.methods.pgd import Pgd

IMAGES = 512  # training images that are attacked, evenly spaced over all; fewer only where there are fewer
ENOUGH = 256  # images for a verdict that ends a run
SURE = 3.3  # standard deviations: a fall by chance alone is so significant in one epoch of 2,000
FREE_JUMP = 0.1  # a rise of training accuracy within an epoch that the epochs before it do not explain
GAP = 0.5  # between the accuracy under the training attack and under PGD
RECOVERIES = 2  # of a run with `guard.action: recover`; overfitting after that stops it
LOW = 0.1  # alignment of the attack's gradients below which they hardly agree; a warning where it was 3 times as high
PATIENCE = 3  # epochs that such a gap may last without PGD accuracy rising: some runs start with one and close it
WENT_BACK = "went_back_to"  # in the record of an epoch: the epoch whose state the run recovered
ADVICE = "train with a smaller alpha, with method n_fgsm, or with more noise"


def look(
    model: torch.nn.Module, images: Tensor, labels: Tensor, threat: Threat, alpha: float, steps: int, seed: int, world: World
) -> Verdicts:
    """PGD on the guard's images, which every process has and attacks its share of: the verdicts of all, on the CPU. images:
    uint8 N x C x H x W, labels int64 N, on the model's device."""
    mine = slice(world.rank, None, world.size)
    found = pgd(model, images[mine], labels[mine], threat=threat, alpha=alpha, steps=steps, restarts=1, seed=seed)
    clean, robust = (torch.zeros(len(labels), dtype=torch.bool) for _ in range(2))
    for rank, (their_clean, their_robust) in enumerate(world.gather((found.clean.cpu(), found.robust.cpu()))):
        clean[rank :: world.size], robust[rank :: world.size] = their_clean, their_robust
    return Verdicts(clean, robust)


def fell(before: Tensor, now: Tensor, drop: float) -> bool:
    """Whether PGD accuracy is more than `drop` below the epoch before (paper, appendix B), and by more than chance: of the
    images whose verdict changed, so many more were lost than won that a fair coin would not do it (McNemar's test). before,
    now: which of the same images are robust, bool N."""
    lost, won = int((before & ~now).sum()), int((now & ~before).sum())
    fall = (lost - won) / len(now)
    return fall > drop + 1e-9 and lost - won > SURE * math.sqrt(lost + won)


def gapes(record: dict) -> bool:
    """The training attack is beaten, PGD is not."""
    return record["train_accuracy"] - record["guard_accuracy"] > GAP


def never_rises(history: list[dict]) -> bool:
    """The gap has lasted for PATIENCE epochs and PGD accuracy has not risen in them: the model overfits its attack, and
    may never have been robust, so that nothing can fall."""
    last = history[-PATIENCE:]
    return len(last) == PATIENCE and all(map(gapes, last)) and last[-1]["guard_accuracy"] <= last[0]["guard_accuracy"]


def jumped(history: list[dict]) -> bool:
    """Accuracy on the training attack rises by more than FREE_JUMP, and by more than twice what the epoch before gained.
    Costs nothing, and is a hint only: some healthy runs take off late."""
    if len(history) < 3:
        return False
    a, b, c = (record["train_accuracy"] for record in history[-3:])
    return c - b > FREE_JUMP and c - b > 2 * max(b - a, 0.0) and b > 0.2


def sank(history: list[dict], images: int) -> dict | None:
    """The epoch with the best PGD accuracy, where the last one has less by a third, by more than chance, and clean accuracy
    is no lower: overfitting that takes several epochs. images: that were attacked."""
    best, last = max(history, key=lambda record: record["guard_accuracy"]), history[-1]
    p, q = best["guard_accuracy"], last["guard_accuracy"]
    chance = SURE * math.sqrt((p * (1 - p) + q * (1 - q)) / images)
    lower = last["guard_clean_accuracy"] < best["guard_clean_accuracy"]
    return best if p - q > max(chance, p / 3) and not lower else None


def comparable(history: list[dict]) -> list[dict]:
    """The last epochs that were trained as the last of all: in its phase and with its radius. While epsilon warms up every
    epoch has a larger radius than the one before, and a lower accuracy is to be expected. What a recovery has undone is
    left out."""
    alike = ("phase", "guard_epsilon")
    last, kept, undone = history[-1], [], math.inf
    for record in reversed(history):
        undone = min(undone, record.get(WENT_BACK, math.inf))
        if record.get("epoch", 0) > undone:
            continue
        if "guard_accuracy" not in record or any(record.get(key) != last.get(key) for key in alike):
            break
        kept.insert(0, record)
    return kept


def verdict(history: list[dict], before: Tensor | None, now: Tensor, drop: float) -> tuple[str, str] | None:
    """("overfit" or "suspect", why) for the last epoch of the history, or None when it looks healthy. before, now: which of
    the guard's images were robust after the epoch before, and are (bool N); before is None where the two cannot be
    compared. A model that overfits its attack classifies the images themselves as well as before: where clean accuracy
    falls too, the model has become worse in another way, and may recover."""
    history = comparable(history)
    last = history[-1]
    if len(history) > 1 and before is not None and fell(before, now, drop):
        then = before.double().mean().item()
        why = f"PGD accuracy on {len(now)} training images fell from {then:.1%} to {last['guard_accuracy']:.1%}"
        clean = history[-2]["guard_clean_accuracy"] - last["guard_clean_accuracy"]
        if then - last["guard_accuracy"] - max(0.0, clean) <= drop:
            return "suspect", f"{why}, and clean accuracy with it"
        return ("overfit" if len(now) >= ENOUGH else "suspect"), why
    if len(history) > 1 and gapes(last):
        why = f"{last['train_accuracy']:.1%} under the training attack, but {last['guard_accuracy']:.1%} under PGD"
        if never_rises(history) and len(now) >= ENOUGH:
            return "overfit", f"{why}, and no better than {PATIENCE - 1} epochs before"
        return "suspect", why
    if best := sank(history, len(now)):
        then, current = best["guard_accuracy"], last["guard_accuracy"]
        why = f"PGD accuracy sank from {then:.1%} in epoch {best['epoch']} to {current:.1%}, clean accuracy did not"
        return "suspect", why
    if jumped(history):
        then, current = history[-2]["train_accuracy"], last["train_accuracy"]
        return "suspect", f"accuracy under the training attack jumped from {then:.1%} to {current:.1%}"
    return None


def disagreement(history: list[dict]) -> tuple[str, str] | None:
    """("suspect", why) where the gradients at both ends of the attack have ceased to agree (`alignment.py`)."""
    known = [record["alignment"] for record in comparable(history) if "alignment" in record]
    if not known or known[-1] >= LOW or max(known) <= 3 * LOW:
        return None
    why = f"alignment {known[-1]:.2f}, at best {max(known):.2f}"
    return "suspect", f"the gradients at both ends of the attack hardly agree: {why}"


def recoveries(history: list[dict]) -> int:
    return sum(WENT_BACK in record for record in history)


def remedy(method: Method, epsilon: float, before: int) -> Method:
    """What a run goes on with after `method` has overfitted. At first what costs no more: the same with more noise, by an
    epsilon, where it has noise, else N-FGSM by its published rule (noise 2, alpha epsilon). After one recovery `before`
    what is sure: PGD with three steps of epsilon / 2."""
    if isinstance(method, Awp):
        return method.model_copy(update={"of": remedy(method.of, epsilon, before)})
    batchnorm = {"attack_batchnorm": method.batchnorm_in_attack}
    if before:
        return Pgd(name="pgd", steps=3, alpha=epsilon / 2, **batchnorm)
    if hasattr(method, "noise"):
        return method.model_copy(update={"noise": method.noise + 1})
    return NFgsm(name="n_fgsm", alpha=epsilon, **batchnorm)


def method_now(config: Config, history: list[dict]) -> Method:
    """The method of a run's next step."""
    method = config.method
    for before in range(recoveries(history)):
        method = remedy(method, config.epsilon, before)
    return method


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every number of the tensors is one. Waits for the device once."""
    finite = [t.isfinite().all() for t in tensors if t.is_floating_point()]
    return bool(torch.stack(finite).all())


def trouble(learner) -> str | None:
    """What has gone wrong with the numbers of a learner since its sums were reset, and what helps; None if nothing has.
    Looks at the weights too: the loss of an update is taken before it, so that the last update of an epoch can spoil them
    unseen. fp16 skips updates that overflow and halves its loss scale at each, to find its place; below 1 it has none."""
    loss, fp16 = learner.loss_sum.item(), learner.scaler.is_enabled()
    finite = all_finite(t for name, t in learner.tensors().items() if not name.startswith("sums."))
    if not finite or (not fp16 and not math.isfinite(loss)):
        spoilt = "weights or optimiser hold infinite numbers or NaN" if math.isfinite(loss) else f"the loss became {loss}"
        return f"training diverged: {spoilt}. Lower the learning rate (schedule) and start anew"
    if fp16 and learner.scaler.get_scale() < 1:
        return (
            f"fp16's loss scale collapsed to {learner.scaler.get_scale():g}: every update overflows and is skipped, the "
            "weights stand still. Use precision: bf16 or fp32, or lower the learning rate, and start anew"
        )
    return None
