"""The evaluate command."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from fastrobust.attack.threat import ball
from fastrobust.config.numbers import ball_in_words
from fastrobust.evaluation import masking, results
from fastrobust.evaluation.accuracy import as_named, attack_names, report, run_attacks
from fastrobust.evaluation.trained import Trained, open_trained
from fastrobust.runtime import distributed
from fastrobust.runtime.errors import ConfigError, FastrobustError, first_line
from fastrobust.runtime.files import explained, write_json
from fastrobust.runtime.progress import Progress

SANITY_IMAGES = 300


def command(arguments) -> int:
    with distributed.joined(arguments.device) as (world, device):
        return evaluate_in(world, device, arguments)


def evaluate_in(world, device, arguments) -> int:
    trained = open_trained(arguments.run, arguments.data, device)
    settings = trained.config.evaluation
    attack = arguments.attack or f"pgd-{arguments.steps or settings.steps}-{arguments.restarts or settings.restarts}"
    attack, radii = as_named(attack), arguments.epsilon or [settings.epsilon[0]]
    names = attack_names(attack)
    norm = arguments.norm or trained.config.norm
    if norm != trained.config.norm and not arguments.epsilon:
        raise ConfigError(f"--norm {norm} needs --epsilon: the run's own radius is of the norm {trained.config.norm}")
    for option, values in (("--epsilon", radii), ("--alpha", [arguments.alpha or 0])):
        if norm == "linf" and max(values) > 1:
            meant = f"did you mean {max(values):g}/255? Only with --norm l2 it may be larger"
            raise ConfigError(f"{option} is outside the pixel range [0, 1]; {meant}")
    if arguments.transfer and not arguments.sanity:
        raise ConfigError("--transfer is one of the checks of --sanity: give both")
    if arguments.sanity and 0 in radii:
        raise ConfigError("--sanity needs a radius above 0: --epsilon 8/255")
    if arguments.attack and (arguments.steps or arguments.restarts):
        raise ConfigError("--steps and --restarts stand in the name of the attack: --attack pgd-50-10")
    if arguments.sanity and world.size > 1:
        raise ConfigError("--sanity runs in one process: leave torchrun away")
    data = trained.images(arguments.limit or settings.limit)
    folder = world.first(lambda: keeping(trained.path))
    if folder:
        world.first(lambda: results.take_over(folder, trained.digest, data))
    found = [at_radius(world, arguments, trained, data, norm, epsilon, attack, names, folder) for epsilon in radii]
    if arguments.json:
        print(json.dumps(found[0] if len(found) == 1 else {"evaluations": found}))
    return 0


def at_radius(world, arguments, trained: Trained, data, norm, epsilon: float, attack: str, names, folder) -> dict:
    """Evaluate at one radius: what is printed, and what --json gives."""
    config, settings = trained.config, trained.config.evaluation
    alpha = settings.alpha_at(epsilon) if norm == config.norm else epsilon / 4
    seed = config.seed if arguments.seed is None else arguments.seed
    batch_size = arguments.batch_size or settings.batch_size
    other = other_model(arguments.transfer, trained, data, ball(norm, epsilon), seed) if arguments.sanity else None
    earlier = results.stored(folder, trained.digest, data.checksum(), epsilon, norm) if folder else []
    records = run_attacks(
        trained.model,
        data,
        names,
        epsilon=epsilon,
        alpha=alpha if arguments.alpha is None else arguments.alpha,
        batch_size=batch_size,
        seed=seed,
        norm=norm,
        folder=folder,
        fresh=arguments.fresh,
        notes={"data": arguments.data},
        world=world,
    )
    result = report(attack, records) | {"weights": trained.digest, "images": data.checksum()}
    result["attacks"] = [
        {"attack": r.settings["attack"], "attacked": int(r.attacked.sum()), "broken": int(r.broken.sum()), **facts(r)}
        for r in records
    ]
    every = {r.path(Path()): r for r in (*earlier, *records)}.values()
    robust = int(results.worst_case(list(every)).sum())
    result["worst_case"] = {
        "robust_accuracy": robust / result["examples"],
        "robust_interval": list(results.wilson(robust, result["examples"])),
        "attacks": sorted({r.settings["attack"] for r in every}),
    }
    show(result, config.data.dataset, folder)
    if other is not None:
        result["sanity"] = check_sanity(trained, other, result, norm, epsilon, batch_size, seed, folder)
    return result


def check_sanity(
    trained: Trained, other, result: dict, norm: str, epsilon: float, batch_size: int, seed: int, folder: Path | None
) -> dict:
    """Prints the checks as they are done, then the verdict, and writes them beside the records."""
    data = trained.images(min(result["examples"], SANITY_IMAGES))
    with Progress("masking checks", masking.CHECKS) as bar:

        def tell(check) -> None:
            bar.line(f"{'ok  ' if check.passed else 'FAIL'} {check.name:<16} {check.says}")
            bar.advance(1, check.name if bar.due() else None)

        common = {"norm": norm, "epsilon": epsilon, "batch_size": batch_size, "seed": seed}
        checks = masking.check_all(trained.model, data, **common, surrogate=other, tell=tell)
    failed = [check.name for check in checks if not check.passed]
    found = {
        "verdict": masking.verdict(checks),
        "failed": failed,
        "examples": len(data.labels),
        "norm": norm,
        "epsilon": epsilon,
        "weights": trained.digest,
        "images": data.checksum(),
        "checks": [vars(check) for check in checks],
    }
    if failed:
        why = f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)})"
        print(f"verdict          MASKED: {why}; do not trust this model's accuracy under weak attacks")
    else:
        print(f"verdict          healthy: all {len(checks)} checks passed on {len(data.labels)} images")
    if folder:
        write_json(folder / f"sanity_{'' if norm == 'linf' else f'{norm}-'}epsilon-{epsilon:.6g}.json", found)
    return found


def other_model(transfer: str | None, trained: Trained, data, threat, seed: int):
    """The model of --transfer, or a small one trained on 3,000 training images."""
    device = next(trained.model.parameters()).device
    if transfer is None:
        train = trained.training_images(3000)
        print(f"training a small model on {len(train.labels)} training images, for the transfer attack", flush=True)
        return masking.train_surrogate(train, threat, len(train.classes), device, seed)
    other = open_trained(transfer, device=device)
    if other.classes != data.classes:
        theirs, ours = (", ".join(classes[:5]) for classes in (other.classes, data.classes))
        raise ConfigError(f"--transfer {transfer}: its classes are {theirs} ..., those of the images {ours} ...")
    try:
        with torch.no_grad():
            other.model(data.images[:1].to(device).float() / 255)
    except RuntimeError as error:
        raise ConfigError(f"--transfer {transfer}: it does not take these images: {first_line(error)}") from None
    return other.model


def keeping(path: Path) -> Path | None:
    """The folder where results are kept, made if need be; None (said once) where there can be none."""

    if not path.is_dir():
        return None
    try:
        with explained(f"{path} cannot be written to"):
            (path / results.FOLDER).mkdir(exist_ok=True)
            if not os.access(path / results.FOLDER, os.W_OK):
                raise PermissionError(13, "permission denied")
    except FastrobustError as error:
        print(f"warning: {error}; the results are not kept", file=sys.stderr)
        return None
    return path / results.FOLDER


def facts(record) -> dict:
    return {"refused": record.facts["refused"], "seconds": round(record.facts["seconds"], 3)}


def show(result: dict, dataset: str, folder: Path | None) -> None:

    n, worst = result["examples"], result["worst_case"]
    clean, robust = interval(result["clean_interval"]), interval(result["robust_interval"])
    of = f"({n} test images of {dataset}, {result['resolution']} pixels wide)"
    print(f"clean accuracy   {result['clean_accuracy']:.2%}  {of}{clean}")
    alpha = "" if result["alpha"] is None else f", alpha {result['alpha']:.4g}"
    attack = f"({result['attack']}, {ball_in_words(result['epsilon'], result['norm'])}{alpha})"
    print(f"robust accuracy  {result['robust_accuracy']:.2%}  {attack}{robust}, n = {n}")
    if len(result["attacks"]) > 1:
        left = round(result["clean_accuracy"] * n)
        for line in result["attacks"]:
            left -= line["broken"]
            print(f"  {line['attack']:<14} broke {line['broken']} of {line['attacked']}: {left / n:.2%} left")
    refused = sum(line["refused"] for line in result["attacks"])
    if refused:
        print(f"refused          {refused} successes that the fp32 check of point and threat model did not confirm")
    if set(worst["attacks"]) != {line["attack"] for line in result["attacks"]}:
        over = f"(over {', '.join(worst['attacks'])})"
        print(f"worst case       {worst['robust_accuracy']:.2%}  {over}{interval(worst['robust_interval'])}, n = {n}")
    print(f"seconds          {result['seconds']:.1f}")
    if folder:
        print(f"kept in          {folder}")


def interval(ends: list[float]) -> str:
    return f"  95% interval {ends[0]:.2%} to {ends[1]:.2%}"
