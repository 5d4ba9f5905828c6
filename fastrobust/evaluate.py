"""Clean and robust accuracy of a trained model: python -m fastrobust.evaluate RUN_OR_WEIGHTS [--attack autoattack]"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from fastrobust import schema
from fastrobust.cli import main_with_errors
from fastrobust.errors import ConfigError, FastrobustError, first_line

SANITY_IMAGES = 300


def pixels(text: str) -> float:
    try:
        value = float(schema.parse_number(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside the pixel range [0, 1]; did you mean {text}/255?")
    return value


def count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {2**31 - 1}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m fastrobust.evaluate", description=__doc__.splitlines()[0])
    p.add_argument("run", help="a run directory, or a model.safetensors that fastrobust wrote")
    p.add_argument("--epsilon", type=pixels, help="radius in pixels of [0, 1], such as 8/255 (default: the run's first)")
    p.add_argument(
        "--attack",
        metavar="NAMES",
        help="pgd-50-10 (steps, restarts), apgd-ce, apgd-t, fab-t, square, autoattack (these four in turn), or several with "
        "commas between them: each attacks what the ones before left robust (default: pgd with --steps and --restarts)",
    )
    p.add_argument("--alpha", type=pixels, help="step size of pgd (default: the run's, or epsilon / 4)")
    p.add_argument("--steps", type=count, help="default: the run's (the paper: 50)")
    p.add_argument("--restarts", type=count, help="default: the run's (the paper: 10)")
    p.add_argument("--limit", type=count, help="evaluate so many test images, evenly spaced, instead of all")
    p.add_argument("--batch-size", type=count)
    p.add_argument("--seed", type=seed, metavar="N", help="of the random starts (default: the run's)")
    p.add_argument("--device", default="auto")
    p.add_argument("--data", help="where the data set lies (default: as the run's config says)")
    p.add_argument(
        "--sanity",
        action="store_true",
        help=f"then check on {SANITY_IMAGES} of the images (fewer with --limit) for signs of masked gradients",
    )
    p.add_argument(
        "--transfer", metavar="RUN2", help="the model whose adversarial examples --sanity tries (default: train one)"
    )
    p.add_argument("--fresh", action="store_true", help="attack again what is in RUN/evaluations already")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return main_with_errors(lambda: evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> int:
    from fastrobust import distributed

    with distributed.joined(arguments.device) as (world, device):
        return evaluate_in(world, device, arguments)


def evaluate_in(world, device, arguments: argparse.Namespace) -> int:
    from fastrobust import evaluation, results, run
    from fastrobust.data import loaders

    path = Path(arguments.run)
    model, config, _ = run.read_weights(path)
    if arguments.data:
        config.data.path, config.data.prepared = arguments.data, None
    settings = config.evaluation
    epsilon = settings.epsilon[0] if arguments.epsilon is None else arguments.epsilon
    alpha = settings.alpha if arguments.alpha is None else arguments.alpha
    attack = arguments.attack or f"pgd-{arguments.steps or settings.steps}-{arguments.restarts or settings.restarts}"
    attack = attack.lower().replace(" ", "")
    names = evaluation.attack_names(attack)
    if arguments.transfer and not arguments.sanity:
        raise ConfigError("--transfer is one of the checks of --sanity: give both")
    if arguments.sanity and epsilon == 0:
        raise ConfigError("--sanity needs a radius above 0: --epsilon 8/255")
    if arguments.attack and (arguments.steps or arguments.restarts):
        raise ConfigError("--steps and --restarts stand in the name of the attack: --attack pgd-50-10")
    if arguments.sanity and world.size > 1:
        raise ConfigError("--sanity runs in one process: leave torchrun away")
    model = model.to(device)
    data = loaders.test_set(config, arguments.limit or settings.limit)
    folder = world.first(lambda: keeping(path))
    about = (results.fingerprint(model), results.fingerprint_of_data(data), epsilon)
    earlier = results.stored(folder, *about) if folder else []
    records = evaluation.run_attacks(
        model,
        data,
        names,
        epsilon=epsilon,
        alpha=epsilon / 4 if alpha is None else alpha,
        batch_size=arguments.batch_size or settings.batch_size,
        seed=config.seed if arguments.seed is None else arguments.seed,
        folder=folder,
        fresh=arguments.fresh,
        world=world,
    )
    result = evaluation.report(attack, records)
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
    if arguments.sanity:
        result["sanity"] = check_sanity(arguments, model, config, result, folder)
    if arguments.json:
        print(json.dumps(result))
    return 0


def check_sanity(arguments: argparse.Namespace, model, config, result: dict, folder: Path | None) -> dict:
    """Prints the checks as they are done, then the verdict, and writes them beside the records."""
    from fastrobust import results, run, sanity
    from fastrobust.data import loaders
    from fastrobust.progress import Progress

    epsilon, seed = result["epsilon"], config.seed if arguments.seed is None else arguments.seed
    data = loaders.test_set(config, min(result["examples"], SANITY_IMAGES))
    with Progress("masking checks", sanity.CHECKS + 1) as bar:
        other = other_model(arguments, config, data, epsilon, seed, next(model.parameters()).device)
        bar.advance(1, "another model for the transfer attack")

        def tell(check) -> None:
            bar.line(f"{'ok  ' if check.passed else 'FAIL'} {check.name:<16} {check.says}")
            bar.advance(1, check.name if bar.due() else None)

        batch_size = arguments.batch_size or config.evaluation.batch_size
        common = {"epsilon": epsilon, "batch_size": batch_size, "seed": seed}
        checks = sanity.check_all(model, data, **common, surrogate=other, tell=tell)
    failed = [check.name for check in checks if not check.passed]
    found = {
        "verdict": sanity.verdict(checks),
        "failed": failed,
        "examples": len(data.labels),
        "epsilon": epsilon,
        "weights": results.fingerprint(model),
        "checks": [vars(check) for check in checks],
    }
    if failed:
        why = f"{len(failed)} of {len(checks)} checks failed ({', '.join(failed)})"
        print(f"verdict          MASKED: {why}; do not trust this model's accuracy under weak attacks")
    else:
        print(f"verdict          healthy: all {len(checks)} checks passed on {len(data.labels)} images")
    if folder:
        run.write_json(folder / f"sanity_epsilon-{epsilon:.6g}.json", found)
    return found


def other_model(arguments: argparse.Namespace, config, data, epsilon: float, seed: int, device):
    """The model of --transfer, or a small one trained on 3,000 training images."""
    import torch

    from fastrobust import run, sanity
    from fastrobust.data import sources

    if not arguments.transfer:
        resolution = data.images.shape[-1] if config.data.dataset == "image_folder" else None
        train = sources.load(config.data.dataset, "train", config.data.path, resolution=resolution, limit=3000)
        return sanity.train_surrogate(train, epsilon, len(train.classes), device, seed)
    other, _, classes = run.read_weights(arguments.transfer)
    other = other.to(device)
    if len(classes) != len(data.classes):
        raise ConfigError(f"--transfer {arguments.transfer}: it has {len(classes)} classes, the data {len(data.classes)}")
    try:
        with torch.no_grad():
            other(data.images[:1].to(device).float() / 255)
    except RuntimeError as error:
        raise ConfigError(f"--transfer {arguments.transfer}: it does not take these images: {first_line(error)}") from None
    return other


def keeping(path: Path) -> Path | None:
    """The folder where results are kept, made if need be; None (said once) where there can be none."""
    from fastrobust import results, run

    if not path.is_dir():
        return None
    try:
        with run.explained(f"{path} cannot be written to"):
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
    from fastrobust.evaluation import describe

    n, worst = result["examples"], result["worst_case"]
    clean, robust = interval(result["clean_interval"]), interval(result["robust_interval"])
    of = f"({n} test images of {dataset}, {result['resolution']} pixels wide)"
    print(f"clean accuracy   {result['clean_accuracy']:.2%}  {of}{clean}")
    alpha = "" if result["alpha"] is None else f", alpha {result['alpha']:.4g}"
    attack = f"({result['attack']}, epsilon {describe(result['epsilon'])}{alpha})"
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


if __name__ == "__main__":
    sys.exit(main())
