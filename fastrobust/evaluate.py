"""Clean and robust accuracy of a trained model: python -m fastrobust.evaluate RUN_OR_WEIGHTS [--attack autoattack]"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from fastrobust import schema
from fastrobust.cli import main_with_errors
from fastrobust.errors import ConfigError, FastrobustError


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
    p.add_argument("--fresh", action="store_true", help="attack again what is in RUN/evaluations already")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return main_with_errors(lambda: evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> int:
    from fastrobust import evaluation, results, run, trainer

    path = Path(arguments.run)
    model, config, _ = run.read_weights(path)
    if arguments.data:
        config.data.path = arguments.data
    settings = config.evaluation
    epsilon = settings.epsilon[0] if arguments.epsilon is None else arguments.epsilon
    alpha = settings.alpha if arguments.alpha is None else arguments.alpha
    attack = arguments.attack or f"pgd-{arguments.steps or settings.steps}-{arguments.restarts or settings.restarts}"
    attack = attack.lower().replace(" ", "")
    names = evaluation.attack_names(attack)
    if arguments.attack and (arguments.steps or arguments.restarts):
        raise ConfigError("--steps and --restarts stand in the name of the attack: --attack pgd-50-10")
    model = model.to(trainer.pick_device(arguments.device))
    data = evaluation.test_set(config, arguments.limit or settings.limit)
    folder = keeping(path)
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
    if arguments.json:
        print(json.dumps(result))
    return 0


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
    print(f"clean accuracy   {result['clean_accuracy']:.2%}  ({n} test images of {dataset}){clean}")
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
