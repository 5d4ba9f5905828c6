"""The evaluate command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from textwrap import wrap

import torch
from rich.console import Console
from rich.table import Table

from fastrobust.attack import base
from fastrobust.attack.threat import ball
from fastrobust.config.numbers import ball_in_words, describe
from fastrobust.data import loaders
from fastrobust.data.augment import to_unit
from fastrobust.evaluation import corruptions, images_file, masking, results
from fastrobust.evaluation.accuracy import arithmetic_of, as_named, attack_names, report, run_attacks
from fastrobust.evaluation.answers import alike, answers
from fastrobust.evaluation.trained import Trained, open_trained
from fastrobust.runtime import distributed, memory
from fastrobust.runtime.errors import ConfigError, first_line
from fastrobust.runtime.files import write_json
from fastrobust.runtime.progress import Overall, Progress

SANITY_IMAGES = 300
INDENT = 17 * " "  # of what a line says of its first word


def command(arguments) -> int:
    with distributed.joined(arguments.device) as (world, device):
        return evaluate_in(world, device, arguments)


def evaluate_in(world, device, arguments) -> int:
    places = list(dict.fromkeys(arguments.data or [None]))
    trained = opened(arguments, places[0], device)
    if arguments.corruptions:
        return corrupted(world, arguments, trained)
    settings, file = trained.config.evaluation, arguments.save_images and Path(arguments.save_images)
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
    for option in ("--sanity", "--save-images"):
        if getattr(arguments, option[2:].replace("-", "_")) and world.size > 1:
            raise ConfigError(f"{option} runs in one process: leave torchrun away")
    if file and len(places) * len(radii) > 1:
        raise ConfigError("--save-images is for one radius and one test set: give one --epsilon and one --data")
    others = [replace(trained, config=loaders.from_source(trained.config, place)) for place in places[1:]]
    judged = [(one, one.images(arguments.limit or settings.limit)) for one in (trained, *others)]
    if file:
        images_file.check(file, judged[0][1].images)
    if device.type == "cpu":
        x = to_unit(judged[0][1].images[:1])
        memory.keep_freed(memory.of_a_pass(trained.model, x) * (arguments.batch_size or settings.batch_size))
    folder = world.first(lambda: results.keeping(trained.path))
    works = {name: kind.work(numbers) for name in names for kind, numbers in [base.parse(name)]}
    overall = Overall([len(data.labels) * works[name] for _, data in judged for _ in radii for name in names])
    found = []
    for place, (one, data) in zip(places, judged, strict=True):
        if folder:
            world.first(lambda data=data: results.take_over(folder, trained.digest, data))
        for epsilon in radii:
            found.append(at_radius(world, arguments, one, data, norm, epsilon, attack, names, folder, place, overall))
    if len(found) > 1:
        show_all(found)
    if arguments.json:
        print(json.dumps(found[0] if len(found) == 1 else {"evaluations": found}))
    return 0


def corrupted(world, arguments, trained: Trained) -> int:
    """--corruptions: accuracies without an attack."""
    for option in ("--attack", "--sanity", "--save-images", "--data"):
        if getattr(arguments, option[2:].replace("-", "_")):
            raise ConfigError(f"{option} and --corruptions are two evaluations: give one of them")
    if world.size > 1:
        raise ConfigError("--corruptions runs in one process: leave torchrun away")
    settings = trained.config.evaluation
    batch_size, kept = arguments.batch_size or settings.batch_size, results.keeping(trained.path)
    result = corruptions.evaluate(trained, arguments.corruptions, arguments.limit, batch_size, kept)
    if arguments.json:
        print(json.dumps(result))
    return 0


def opened(arguments, place: str | None, device) -> Trained:
    """The run, or with --model the weights of another program, and the test images of `place`."""
    if arguments.model is None:
        theirs = ("dataset", "resolution", "mean", "std")
        if given := next((f"--{name}" for name in theirs if getattr(arguments, name)), None):
            raise ConfigError(f"{given} belongs to weights of another program: give --model NAME too")
        return open_trained(arguments.run, place, device)
    if arguments.dataset is None or arguments.epsilon is None:
        raise ConfigError("--model needs --dataset NAME (such as cifar10) and --epsilon (such as 8/255)")
    from fastrobust.evaluation.foreign import open_foreign

    if (arguments.mean is None) != (arguments.std is None):
        raise ConfigError("--mean and --std belong together: give both")
    for option, values in (("--mean", arguments.mean or ()), ("--std", arguments.std or ())):
        if (largest := max(values, default=0)) > 1:
            meant = f"did you mean {largest:g}/255?"
            raise ConfigError(f"{option}: {largest:g} is larger than the pixel range [0, 1]; {meant}")
    constants = (arguments.mean, arguments.std) if arguments.mean else None
    options = {"norm": arguments.norm or "linf", "data": place, "resolution": arguments.resolution}
    options |= {"constants": constants, "device": device}
    return open_foreign(arguments.run, arguments.model, arguments.dataset, epsilon=arguments.epsilon[0], **options)


def at_radius(
    world, arguments, trained: Trained, data, norm: str, epsilon: float, attack: str, names, folder, place, overall
) -> dict:
    """Evaluate on one test set at one radius: what is printed, and what --json gives."""
    config, settings = trained.config, trained.config.evaluation
    alpha = settings.alpha_at(epsilon) if norm == config.norm else epsilon / 4
    seed = config.seed if arguments.seed is None else arguments.seed
    batch_size = arguments.batch_size or settings.batch_size
    other = other_model(arguments.transfer, trained, data, ball(norm, epsilon), seed) if arguments.sanity else None
    earlier = results.stored(folder, trained.digest, data.checksum(), epsilon, norm) if folder else []
    adversarial = to_unit(data.images).clone() if arguments.save_images else None
    records = run_attacks(
        trained.model,
        data,
        names,
        epsilon=epsilon,
        alpha=alpha if arguments.alpha is None else arguments.alpha,
        batch_size=batch_size,
        seed=seed,
        norm=norm,
        precision=arguments.precision or settings.precision,
        folder=folder,
        fresh=arguments.fresh or adversarial is not None,
        notes={"data": place, "chosen": data.chosen},
        found=adversarial,
        overall=overall,
        world=world,
    )
    result = report(attack, records) | {"weights": trained.digest, "images": data.checksum(), "chosen": data.chosen}
    result |= {"data": place, "split": loaders.test_split(config)}
    result["attacks"] = [
        {"attack": r.settings["attack"], "attacked": int(r.attacked.sum()), "broken": int(r.broken.sum()), **facts(r)}
        for r in records
    ]
    now = records[0].facts.get("answers")
    earlier = [r for r in earlier if alike(r.facts.get("answers"), now)]
    every = {r.path(Path()): r for r in (*earlier, *records)}.values()
    robust = int(results.worst_case(list(every)).sum())
    result["worst_case"] = {
        "robust_accuracy": robust / result["examples"],
        "robust_interval": list(results.wilson(robust, result["examples"])),
        "attacks": sorted({r.settings["attack"] for r in every if r.facts["finished"]}),
        "not_finished": sorted({r.settings["attack"] for r in every if not r.facts["finished"]}),
    }
    show(result, config.data.dataset, folder)
    if adversarial is not None:
        keys = ("attack", "norm", "epsilon", "alpha", "weights", "images", "chosen", "data")
        about = {key: result[key] for key in keys} | {"dataset": config.data.dataset, "seed": seed}
        left = images_file.write(Path(arguments.save_images), trained.model, data, adversarial, batch_size, about)
        print(f"images           {arguments.save_images} ({left} of {len(data.labels)} still classified correctly)")
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
            word = "skip" if masking.not_run([check]) else "ok  " if check.passed else "FAIL"
            bar.line(wrapped(f"{word} {check.name:<16} ", check.says))
            bar.advance(1, check.name if bar.due() else None)

        common = {"norm": norm, "epsilon": epsilon, "batch_size": batch_size, "seed": seed}
        checks = masking.check_all(trained.model, data, **common, surrogate=other, tell=tell)
    failed, missing = [check.name for check in checks if not check.passed], masking.not_run(checks)
    found = {
        "verdict": masking.verdict(checks),
        "failed": failed,
        "not_run": missing,
        "examples": len(data.labels),
        "norm": norm,
        "epsilon": epsilon,
        "weights": trained.digest,
        "images": data.checksum(),
        "chosen": data.chosen,
        "data": result["data"],
        "checks": [vars(check) for check in checks],
    }
    besides = f", {', '.join(missing)} not run" if missing else ""
    if failed:
        why = f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)}){besides}"
        print(wrapped("verdict          ", f"MASKED: {why}; do not trust this model's accuracy under weak attacks"))
    else:
        of = f"{len(checks) - len(missing)} of" if missing else "all"
        print(f"verdict          healthy: {of} {len(checks)} checks passed{besides} on {len(data.labels)} images")
    if folder:
        of = f"_{found['images'][:8]}" if result["data"] else ""
        kind = "" if norm == "linf" else f"{norm}-"
        told = {"answers": answers(trained.model, data.images.shape[1:]), "resolution": data.images.shape[-1]}
        write_json(folder / f"sanity_{kind}epsilon-{epsilon:.6g}{of}.json", found | told)
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


def facts(record) -> dict:
    seconds = round(record.facts["seconds"], 3)
    return {"arithmetic": arithmetic_of(record), "refused": record.facts["refused"], "seconds": seconds}


def show(result: dict, dataset: str, folder: Path | None) -> None:

    n, worst = result["examples"], result["worst_case"]
    kind = "held-out images " if result["split"] == "held_out" else "test images     "
    print(f"{kind} {n} of {dataset}, {result['resolution']} pixels wide")
    if result["data"]:
        print(f"{INDENT}{result['data']}")
    alpha = "" if result["alpha"] is None else f", alpha {result['alpha']:.4g}"
    steps = f", its steps in {result['arithmetic']}" if result["arithmetic"] in ("bf16", "tf32") else ""
    print(f"attack           {result['attack']}, {ball_in_words(result['epsilon'], result['norm'])}{alpha}{steps}")
    print(f"clean accuracy   {result['clean_accuracy']:.2%}{interval(result['clean_interval'])}, n = {n}")
    print(f"robust accuracy  {result['robust_accuracy']:.2%}{interval(result['robust_interval'])}, n = {n}")
    if len(result["attacks"]) > 1:
        left = round(result["clean_accuracy"] * n)
        for line in result["attacks"]:
            left -= line["broken"]
            print(f"  {line['attack']:<14} broke {line['broken']} of {line['attacked']}: {left / n:.2%} left")
    refused = sum(line["refused"] for line in result["attacks"])
    if refused:
        print(f"refused          {refused} successes that the fp32 check did not confirm")
    if set(worst["attacks"]) != {line["attack"] for line in result["attacks"]} or worst["not_finished"]:
        print(f"worst case       {worst['robust_accuracy']:.2%}{interval(worst['robust_interval'])}, n = {n}")
        parts = f"; not finished: {', '.join(worst['not_finished'])}" if worst["not_finished"] else ""
        print(wrapped(INDENT, f"over {', '.join(worst['attacks'])}{parts}"))
    print(f"seconds          {result['seconds']:.1f}")
    if folder:
        print(f"kept in          {folder}")


def show_all(found: list[dict]) -> None:
    """One row for each test set and radius."""
    radius = "epsilon" if found[0]["norm"] == "linf" else f"{found[0]['norm'].upper()}, epsilon"
    table = Table("test images", "n", radius, "clean", "robust", "worst case", box=None, pad_edge=False)
    for result in found:
        accuracies = (result["clean_accuracy"], result["robust_accuracy"], result["worst_case"]["robust_accuracy"])
        shares = [f"{accuracy:.2%}" for accuracy in accuracies]
        table.add_row(result["data"] or "the run's", str(result["examples"]), describe(result["epsilon"]), *shares)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    table.columns[0].overflow = "fold"
    Console(highlight=False).print(table)


def wrapped(head: str, text: str) -> str:
    return "\n".join(wrap(text, 80, initial_indent=head, subsequent_indent=len(head) * " "))


def interval(ends: list[float]) -> str:
    return f"  95% interval {ends[0]:.2%} to {ends[1]:.2%}"
