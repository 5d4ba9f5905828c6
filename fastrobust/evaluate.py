"""Clean and PGD accuracy of a trained model: python -m fastrobust.evaluate RUN_OR_WEIGHTS"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from fastrobust import schema
from fastrobust.cli import main_with_errors


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
    p.add_argument("--alpha", type=pixels, help="step size (default: the run's, or epsilon / 4)")
    p.add_argument("--steps", type=count, help="default: the run's (the paper: 50)")
    p.add_argument("--restarts", type=count, help="default: the run's (the paper: 10)")
    p.add_argument("--limit", type=count, help="evaluate so many test images, evenly spaced, instead of all")
    p.add_argument("--batch-size", type=count)
    p.add_argument("--seed", type=seed, metavar="N", help="of the random starts (default: the run's)")
    p.add_argument("--device", default="auto")
    p.add_argument("--data", help="where the data set lies (default: as the run's config says)")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return main_with_errors(lambda: evaluate(arguments))


def evaluate(arguments: argparse.Namespace) -> int:
    from fastrobust import evaluation, run, trainer
    from fastrobust.data import loaders

    model, config, _ = run.read_weights(Path(arguments.run))
    if arguments.data:
        config.data.path, config.data.prepared = arguments.data, None
    settings = config.evaluation
    epsilon = settings.epsilon[0] if arguments.epsilon is None else arguments.epsilon
    alpha = settings.alpha if arguments.alpha is None else arguments.alpha
    result = evaluation.evaluate(
        model.to(trainer.pick_device(arguments.device)),
        loaders.test_set(config, arguments.limit or settings.limit),
        epsilon=epsilon,
        alpha=epsilon / 4 if alpha is None else alpha,
        steps=arguments.steps or settings.steps,
        restarts=arguments.restarts or settings.restarts,
        batch_size=arguments.batch_size or settings.batch_size,
        seed=config.seed if arguments.seed is None else arguments.seed,
    )
    described = evaluation.describe(epsilon)
    print(
        f"clean accuracy   {result['clean_accuracy']:.2%}  ({result['examples']} test images of {config.data.dataset}, "
        f"{result['resolution']} pixels wide)"
    )
    print(
        f"robust accuracy  {result['robust_accuracy']:.2%}  "
        f"({result['attack']}, epsilon {described}, alpha {result['alpha']:.4g})"
    )
    print(f"seconds          {result['seconds']:.1f}")
    if arguments.json:
        print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
