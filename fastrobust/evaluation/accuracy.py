"""Clean and robust accuracy of a model on a test set: what `summary.json` and the evaluate command report."""

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.attack import base
from fastrobust.attack.gradient import input_gradient
from fastrobust.attack.pgd import Pgd, pgd
from fastrobust.attack.rounds import Place, run_rounds
from fastrobust.attack.threat import ball
from fastrobust.attack.verdicts import arithmetic, check_images, classified, evaluating
from fastrobust.config.numbers import radius_in_words
from fastrobust.config.parts import ATTACK_GROUPS
from fastrobust.data import sets
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import results
from fastrobust.evaluation.answers import alike, answers, unsteady
from fastrobust.models.weights import weights_digest
from fastrobust.runtime import half, memory, trial
from fastrobust.runtime.distributed import ALONE, World
from fastrobust.runtime.progress import Overall, Progress

ARITHMETICS = ("bf16", "tf32", "fp32", None)  # of several attacks the coarsest is told
SAVE_EVERY = 10.0  # seconds


def evaluate(
    model: nn.Module,
    data: sets.ImageSet,
    *,
    epsilon: float,
    alpha: float,
    steps: int,
    restarts: int,
    batch_size: int,
    seed: int = 0,
    norm: str = "linf",
    precision: str = "fp32",
    folder: Path | None = None,
    overall: Overall | None = None,
    world: World = ALONE,
) -> dict[str, Any]:
    """Clean accuracy and accuracy under PGD-`steps`-`restarts` at radius epsilon, each with its 95 % confidence interval.
    Clean accuracy and every success are decided in fp32; `arithmetic` says what the attack's steps computed in, and
    `precision` asks for it (`searched_in`). With a `folder` an interrupted call goes on where it was (`run_attacks`).
    epsilon and alpha are in pixels of [0, 1], in the norm `linf` or `l2`. The model may be on any device; its mode and
    gradients are left as they are."""
    name = f"pgd-{steps}-{restarts}"
    settings = {"norm": norm, "epsilon": epsilon, "alpha": alpha, "batch_size": batch_size, "seed": seed}
    settings |= {"precision": precision, "folder": folder, "overall": overall, "world": world}
    settings |= {"notes": {"data": None, "chosen": data.chosen}}
    return report(name, run_attacks(model, data, [name], **settings))


def report(name: str, records: list[results.Record]) -> dict[str, Any]:
    """The figures of attacks that ran one after the other, each on what the ones before left robust."""
    n, settings = records[0].settings["examples"], records[0].settings
    clean, robust = int(records[0].clean.sum()), int(results.worst_case(records).sum())
    found = {
        "clean_accuracy": clean / n,
        "clean_interval": list(results.wilson(clean, n)),
        "robust_accuracy": robust / n,
        "robust_interval": list(results.wilson(robust, n)),
        "examples": n,
        "resolution": settings["resolution"],
        "norm": results.norm_of(settings),
        "epsilon": settings["epsilon"],
        "attack": name,
        "alpha": next((r.settings["alpha"] for r in records if "alpha" in r.settings), None),
        "arithmetic": min((arithmetic_of(r) for r in records), key=ARITHMETICS.index),
        "seconds": round(sum(r.facts["seconds"] for r in records), 3),
    }
    if len(records) == 1 and base.parse(name)[0] is Pgd:
        found["robust_accuracy_after_one_restart"] = records[0].facts["after_one_restart"] / n
    return found


def arithmetic_of(record: results.Record) -> str | None:
    """What the steps of an attack computed in; None where version 0.1 did not say."""
    return record.facts.get("arithmetic", "fp32" if record.settings["device"] == "cpu" else None)


def searched_in(asked: str, model: nn.Module, images: Tensor) -> str:
    """`bf16` or `fp32`: what the steps of attacks that can do with either compute in. bf16 is for CPUs that have it. `auto`:
    what a trial on some of the images (uint8 N x C x H x W) finds faster."""
    if asked == "fp32" or images.device.type != "cpu" or not half.has_bf16():
        return "fp32"
    if asked == "auto":
        x, labels = to_unit(images[: trial.IMAGES]), torch.zeros(trial.IMAGES, dtype=torch.int64)
        with evaluating(model):
            search = lambda x: input_gradient(model, x, labels[: len(x)])
            ratio = trial.speed(model, x, search, half.FP32, half.BF16)
        return "bf16" if ratio is not None and ratio >= trial.SURE else "fp32"
    return asked


def as_named(text: str) -> str:
    """The attacks of a command line as results name them: `PGD-50-10, AutoAttack` -> `pgd-50-10,autoattack`."""
    words = text.replace(" ", "").split(",")
    return ",".join(word if ":" in word else word.lower() for word in words)


def attack_names(text: str) -> list[str]:
    """`pgd-50-10,autoattack` -> its single attacks, in order and once each. Raises ConfigError."""
    names: list[str] = []
    for word in as_named(text).split(","):
        for name in ATTACK_GROUPS.get(word, (word,)):
            names += [name] if name not in names else []
    for name in names:
        base.parse(name)
    return names


def run_attacks(
    model: nn.Module,
    data: sets.ImageSet,
    names: list[str],
    *,
    epsilon: float,
    alpha: float,
    batch_size: int,
    seed: int = 0,
    norm: str = "linf",
    precision: str = "fp32",
    folder: Path | None = None,
    fresh: bool = False,
    notes: dict[str, Any] | None = None,
    found: Tensor | None = None,
    overall: Overall | None = None,
    world: World = ALONE,
) -> list[results.Record]:
    """Run single attacks one after the other, each on the examples that the ones before left robust. A success counts if
    it lies in the threat model and a plain forward pass in fp32 confirms it (`attack.verdicts.breaks`). With a folder,
    records are kept there as the work goes on: a finished attack is not run again, and an unfinished one goes on where it
    was, with the same verdicts as without the interruption; `fresh` starts anew. precision: see `searched_in`; where there
    is a record of a search in fp32, that one counts and goes on. New records keep `notes`, on which verdicts do not depend,
    among their facts. In a world of several processes each attacks its share, with the starts that it would
    have in one, and all get the records of the whole. `found` takes the adversarial images (see `run_rounds`) of the
    attacks that are run now. `overall` has a part for each attack."""
    device = next(model.parameters()).device
    images = data.images.to(device).contiguous(memory_format=torch.channels_last)
    labels = data.labels.to(device)
    check_images(images, labels, ball(norm, epsilon))
    about = {"weights": weights_digest(model), "data": data.checksum()}
    kinds = {name: base.parse(name)[0] for name in names}
    made_by = {name: kind.made_by() for name, kind in kinds.items()}  # whose package may be missing
    with Progress("clean accuracy", len(labels)) as bar:
        clean = classified(model, images, labels, batch_size, lambda n: bar.advance(n, "" if bar.due() else None))
    for kind in kinds.values():  # what cannot be run here is said before hours of other attacks
        kind.check_model(model, images)
    if world.rank == 0 and (trouble := unsteady(model, images)):
        print(f"warning: {trouble}", file=sys.stderr)
    answered = answers(model, images.shape[1:])
    robust, searched = clean.clone(), world.first(lambda: searched_in(precision, model, images))
    records = []
    for name in names:
        settings = {"attack": name, "epsilon": epsilon, "examples": len(labels), "batch_size": batch_size, "seed": seed}
        if norm != "linf":  # records without a norm are of L-infinity, those of earlier versions too
            settings["norm"] = norm
        if kinds[name].has_alpha:
            settings["alpha"] = alpha
        settings |= {"resolution": images.shape[-1], "device": device.type, "made_by": made_by[name], **about}
        facts = {
            "settings": settings,
            "seconds": 0.0,
            "refused": 0,
            "arithmetic": arithmetic(device),
            "answers": answered,
            "after_one_restart": int(robust.sum()),
            "finished": False,
        }
        broken = torch.zeros(len(labels), dtype=torch.bool)
        record = results.Record(facts | (notes or {}), clean.cpu(), robust.cpu().clone(), broken)
        in_bf16 = searched == "bf16" and kinds[name].takes_bf16
        record = world.first(lambda new=record, half=in_bf16: _kept(new, folder, fresh, half))
        kept = record.facts["finished"]
        if not record.facts["finished"]:
            part = record if world.size == 1 else _kept(_share(record, world), folder, fresh)
            if not part.facts["finished"]:
                attack = build(model, images, part.settings)
                with evaluating(model):
                    _run(attack, part, images, labels, folder, found, overall)
            if world.size > 1:
                record = _put_together(record, world.gather(part))
                world.first(lambda whole=record: None if folder is None else whole.save(folder))
                if folder is not None:
                    part.path(folder).unlink(missing_ok=True)
        robust &= ~record.broken.to(device)
        records.append(record)
        if overall is not None:
            overall.next(skipped=kept)
    return records


def _kept(record: results.Record, folder: Path | None, fresh: bool, in_bf16: bool = False) -> results.Record:
    """What is kept of this record already, or else the record itself; `in_bf16` as one of a search in bf16."""
    if folder is not None and not fresh and record.path(folder).exists():
        kept = results.read(record.path(folder))
        if alike(kept.facts.get("answers"), record.facts["answers"]):
            return kept
        print(f"warning: the model's code is not what {record.path(folder)} is about: attacked anew", file=sys.stderr)
    if in_bf16:
        facts = record.facts | {"settings": record.settings | {"arithmetic": "bf16"}, "arithmetic": "bf16"}
        return _kept(replace(record, facts=facts), folder, fresh)
    return record


def _share(record: results.Record, world: World) -> results.Record:
    """The record of this process's part of an attack, not begun: every size-th image."""
    attacked = record.attacked & (torch.arange(len(record.attacked)) % world.size == world.rank)
    return results.Record(
        record.facts | {"after_one_restart": int(attacked.sum())}, record.clean, attacked, torch.zeros_like(record.broken)
    )


def _put_together(record: results.Record, parts: list[results.Record]) -> results.Record:
    """The record of the whole, from those of all processes."""
    sums = {name: sum(part.facts[name] for part in parts) for name in ("refused", "after_one_restart")}
    facts = record.facts | sums | {"seconds": max(part.facts["seconds"] for part in parts), "finished": True}
    broken = torch.stack([part.broken for part in parts]).any(0)
    return results.Record(facts, record.clean, record.attacked, broken)


def build(model: nn.Module, images: Tensor, settings: dict[str, Any]) -> base.Attack:
    """The attack that a record's settings describe. Raises ConfigError."""
    kind, numbers = base.parse(settings["attack"])
    threat, alpha = ball(results.norm_of(settings), settings["epsilon"]), settings.get("alpha", 0.0)
    bf16 = settings.get("arithmetic") == "bf16"
    return kind(base.Setting(model, images, threat, alpha, settings["batch_size"], settings["seed"], bf16), numbers)


def _run(
    attack,
    record: results.Record,
    images: Tensor,
    labels: Tensor,
    folder: Path | None,
    found: Tensor | None,
    overall: Overall | None,
) -> None:
    """Run the attack to the end, from where the record stands, which is updated and saved on the way."""
    name, threat = record.settings["attack"], attack.setting.threat
    robust = (record.attacked & ~record.broken).to(images.device)
    place, earlier, began = record.place, record.facts["seconds"], time.monotonic()
    if place is not None:
        place = Place(place.round, place.batches, place.alive.to(images.device))
    each = int(record.attacked.sum())  # examples in a round, at most
    saved, label = began, f"{name.upper()} at {radius_in_words(threat.radius, threat.norm)}"
    base = _examples_done(attack, place, each)
    with Progress(label, attack.rounds * each, base, overall) as bar:

        def tick(share: float) -> None:
            goal = base + int(share * min(record.settings["batch_size"], each))
            bar.advance(max(0, goal - bar.done), "within a batch" if bar.due() else None)

        def after(at: Place, examples: int, refused: int) -> None:
            nonlocal saved, base
            bar.done = base = _examples_done(attack, at, each)
            word = "restart" if isinstance(attack, Pgd) else "round"
            rounds = f"{word} {at.round + 1}/{attack.rounds}, " if attack.rounds > 1 else ""
            bar.advance(0, f"{rounds}{int(robust.sum())} robust" if bar.due() else None)
            record.place = at
            record.facts["refused"] += refused
            if at.round == 0:
                record.facts["after_one_restart"] = int(robust.sum())
            now = time.monotonic()
            record.facts["seconds"] = earlier + now - began
            if folder is not None and now - saved > SAVE_EVERY:
                saved = now
                keep()

        def keep() -> None:
            record.broken = (record.attacked.to(robust.device) & ~robust).cpu()
            if record.place is not None:
                record.place = Place(record.place.round, record.place.batches, record.place.alive.cpu())
            if folder is not None and (record.place is not None or record.facts["finished"]):
                record.save(folder)

        def one_step(images: Tensor, labels: Tensor) -> None:
            settings = {"threat": threat, "alpha": threat.radius / 4, "steps": 1, "restarts": 1}
            pgd(attack.model, images, labels, **settings, batch_size=len(images))

        attack.tick = tick
        try:
            batch = images[: attack.batch_size], labels[: attack.batch_size]
            with memory.explained("evaluation", "evaluation.batch_size", one_step, *batch):
                run_rounds(attack, images, labels, robust, threat=threat, place=place, found=found, after=after)
            record.facts["finished"] = True
            record.facts["seconds"] = earlier + time.monotonic() - began
            record.place = None
        finally:
            keep()


def _examples_done(attack, place: Place | None, each: int) -> int:
    """How many examples an attack has dealt with, `each` in a round: those that no longer need attacking are done."""
    return 0 if place is None else place.round * each + min(place.batches * attack.batch_size, int(place.alive.sum()))
