"""The command `fastrobust NAME`, the same as `python -m fastrobust NAME`: what every command takes, and where its work is.

Only the standard library is imported here, so that `--help` answers at once; the one import that a command needs is made
when it is run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable
from textwrap import fill
from typing import Any, NoReturn

from fastrobust.config import packaged
from fastrobust.config.hints import did_you_mean, nearest
from fastrobust.config.numbers import parse_number
from fastrobust.config.places import expand
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.limits import cores

WORK = {  # command: (where its work is, what it does)
    "train": ("fastrobust.train.start", "train a robust classifier"),
    "evaluate": ("fastrobust.evaluation.command", "clean and robust accuracy of a trained model"),
    "verify": ("fastrobust.verification.command", "exact robust accuracy of a trained ReLU network, image by image"),
    "export": ("fastrobust.reporting.export", "write a trained model for use without fastrobust, with a model card"),
    "report": ("fastrobust.reporting.report", "one page about one or more runs that needs no network"),
    "sweep": ("fastrobust.tuning.sweep", "train a grid of runs"),
    "lr-range": ("fastrobust.tuning.lr_range", "find a learning rate: raise it until the loss diverges"),
    "prepare": ("fastrobust.data.prepared.writing", "write a data set as files that load fast"),
    "configs": ("fastrobust.config.packaged", "list the configs that come with fastrobust, or show one"),
}
ATTACKS = (
    "pgd-50-10 (steps, restarts), pgd-t-50-1 (targeted), apgd-ce, apgd-t, fab-t, square; autoattack (these four in "
    "turn), apgd (the first two), your own package.module:Class, or several with commas between them: each attacks "
    "what the ones before left robust"
)
EXAMPLES = {
    "train": """\
  fastrobust train quickstart
  fastrobust train mnist_fgsm epsilon=0.2 phases.0.epochs=5 seed=1 name=mine
  fastrobust train --resume runs/mine""",
    "evaluate": """\
  fastrobust evaluate runs/mine
  fastrobust evaluate runs/mine --epsilon 8/255 --attack pgd-50-10,autoattack""",
    "verify": """\
  fastrobust verify runs/mine --epsilon 0.1 --limit 500
  fastrobust verify network.onnx --vnnlib property.vnnlib --timeout 300""",
    "export": "  fastrobust export runs/mine -o mine",
    "report": "  fastrobust report runs/mine runs/other -o report.html",
    "sweep": "  fastrobust sweep configs/sweeps/figure2.yaml --dry-run",
    "lr-range": """\
  fastrobust lr-range quickstart
  fastrobust lr-range cifar10_fgsm data.limit=10000""",
    "prepare": "  fastrobust prepare ffcv imagenet --data /data/imagenet --sizes 160 352",
    "configs": """\
  fastrobust configs
  fastrobust configs mnist_fgsm""",
}
KEYS = """
keys of a config that are changed most:
  epsilon  method.name  method.alpha  model.name  model.weights  data.path
  data.limit  phases.0.epochs  phases.0.batch_size  schedule.max_lr
  evaluation.epsilon  evaluation.limit  seed  name  output  device
All of them, with their values: `fastrobust train CONFIG --dry-run` shows them
resolved, docs/configuration.md explains them.

configs that come with fastrobust (`fastrobust configs` says what they give):
"""
SWEEP = """A sweep file is YAML:

    name: figure2                     # the runs go to OUTPUT/figure2/
    config: configs/cifar10_fgsm.yaml # what they have in common
    set: {data.limit: 10000}          # what is changed for all (optional)
    grid:                             # every combination is trained
      method:                         # an axis of named bundles of keys ...
        fgsm: {schedule.max_lr: 0.21}
        free: {schedule.max_lr: 0.04, method: {name: free, replays: 8}}
      phases.0.epochs: [5, 10, 15]    # ... or the values of one key
    seeds: 3                          # or a list

Where the values of one axis depend on another's, `grids` is a list of grids
with the same axes: see configs/sweeps/figure2.yaml. Every point is an ordinary
run directory. The same command goes on with what is not finished."""


MEANT = {  # options of other programs: the keys of a config that do the same
    "epochs": "phases.0.epochs", "batch-size": "phases.0.batch_size", "lr": "schedule.max_lr", "eps": "epsilon",
    "alpha": "method.alpha", "method": "method.name", "model": "model.name", "data": "data.path", "limit": "data.limit",
    "dataset": "data.dataset", "data-dir": "data.path", "weights": "model.weights", "attack": "method.name",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Answers a mistake with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings]
        configured = any(action.dest == "overrides" for action in self._actions)
        if found := re.search(r"unrecognized arguments: --([\w.-]+)(?:[= ]([^-\s]\S*))?", message):
            word, value = found[1], found[2] or "VALUE"
            if configured and word == "config":
                message += f"\nA config is named without an option: {self.prog} CONFIG"
            elif configured and nearest(f"--{word}", options) is None:
                key = MEANT.get(word.replace("_", "-"), word.replace("-", "_"))
                message += f"\nA key of the config is written without dashes: {key}={value}"
            else:
                message += did_you_mean(f"--{word}", options)
        elif found := re.search(r"unrecognized arguments: ([\w-]+)=(\S+)", message):
            option = f"--{found[1].replace('_', '-')}"
            message += f"\nAn option is written with dashes: {option} {found[2]}" if option in options else ""
        super().error(message)


class Once(argparse.Action):
    """An option that may be given once: of two values the first would be dropped without a word."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if getattr(namespace, self.dest) is not None and getattr(namespace, self.dest) != self.default:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, values)


# ---- the values of options


def told_by(read: Callable[[str], Any], text: str) -> Any:
    """What `read` gives; an error in the words in which it refuses the text, which argparse would not repeat."""
    try:
        return read(text)
    except (ValueError, ConfigError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def pixels(text: str) -> float:
    value = float(told_by(parse_number, text))
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is outside the pixel range [0, 1]; did you mean {text}/255?")
    return value


def distance(text: str) -> float:
    """A radius or a mean of pixels, whose largest value `evaluate` knows and refuses later."""
    value = float(told_by(parse_number, text))
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0")
    return value


def radii(text: str) -> list[float]:
    return [distance(part.strip()) for part in text.split(",")]


def positive(text: str) -> float:
    value = float(told_by(parse_number, text))
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def count(text: str) -> int:
    if not text.isdecimal() or not 1 <= len(text) <= 12 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least 1")
    return int(text)


def count_or_zero(text: str) -> int:
    return 0 if text == "0" else count(text)


def path(text: str) -> str:
    """With ~ and $VARIABLES written out: not every shell does so in `--output=~/x`, and none between quotes."""
    return told_by(expand, text)


def place(text: str) -> str:
    """A path, absolute: results that name it stay true in another folder."""
    return os.path.abspath(path(text))


def seed(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**31:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from 0 to {2**31 - 1}")
    return int(text)


# ---- options that mean the same everywhere


def add_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="RUN", type=path, help="a run directory, or a model.safetensors that fastrobust wrote")


def add_config(p: argparse.ArgumentParser, **options) -> None:
    p.add_argument("config", metavar="CONFIG", help="a YAML file, or the name of a config that comes with it", **options)
    change = "change a key of the config: epsilon=4/255 phases.0.epochs=5 seed=1"
    p.add_argument("overrides", nargs="*", metavar="key=value", help=change)


def add_data(p: argparse.ArgumentParser, **options) -> None:
    told = "read the data set from this folder or file (default: as the run's config says; prepared files are left out then)"
    p.add_argument("--data", metavar="PATH", type=place, help=told + options.pop("more", ""), **options)


def add_device(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def add_limit(
    p: argparse.ArgumentParser, told: str = "so many test images, each class in proportion (default: all)"
) -> None:
    p.add_argument("--limit", type=count, metavar="N", help=told)


def add_workers(p: argparse.ArgumentParser, told: str) -> None:
    p.add_argument("--workers", type=count, metavar="N", default=cores(), help=f"{told} (default: one for each core)")


def add_json(p: argparse.ArgumentParser) -> None:
    p.add_argument("--json", action="store_true", help="end with one line of JSON")


# ---- the commands


def train(p: argparse.ArgumentParser) -> None:
    add_config(p, nargs="?")
    p.add_argument("--dry-run", action="store_true", help="show the resolved config, the plan and the time; write nothing")
    p.add_argument("--resume", metavar="RUN", type=path, help="go on with the run in this directory")


def evaluate(p: argparse.ArgumentParser) -> None:
    add_run(p)
    told = "radius in pixels of [0, 1], such as 8/255, or several with commas (default: the run's first)"
    p.add_argument("--epsilon", type=radii, action="extend", metavar="RADII", help=told)
    p.add_argument("--norm", choices=["linf", "l2"], action=Once, help="of the ball (default: the run's)")
    p.add_argument("--attack", metavar="NAMES", help=f"{ATTACKS} (default: pgd with --steps and --restarts)")
    p.add_argument("--alpha", type=positive, help="step size of pgd (default: the run's at that radius, else epsilon / 4)")
    p.add_argument("--steps", type=count, metavar="N", help="of pgd (default: the run's; the paper: 50)")
    p.add_argument("--restarts", type=count, metavar="N", help="of pgd (default: the run's; the paper: 10)")
    add_limit(p, "so many test images, each class in proportion (default: the run's)")
    p.add_argument("--batch-size", type=count, metavar="N", help="images at once (default: the run's)")
    p.add_argument("--seed", type=seed, metavar="N", help="of the random starts (default: the run's)")
    p.add_argument("--precision", choices=["auto", "fp32", "bf16"], help="of the search, on a CPU (default: the run's)")
    add_device(p)
    add_data(p, action="append", more="; several test sets: --data A --data B")
    told = "write clean and adversarial images, .npz or .safetensors; attacks anew, at one radius"
    p.add_argument("--save-images", type=place, metavar="FILE", help=told)
    told = (
        "of weights that another program trained: RUN is their file, .pth, .pt or .safetensors; needs --dataset, --epsilon"
    )
    p.add_argument("--model", metavar="NAME", action=Once, help=f"the model {told}")
    p.add_argument("--dataset", metavar="NAME", action=Once, help="the data set of --model, as data.dataset in a config")
    p.add_argument("--resolution", type=count, metavar="N", help="side of photographs for --model (default: 224)")
    told = "of --model's images, for pixels in [0, 1], such as 0.5 (default: the file's, or usual ones are tried)"
    p.add_argument("--mean", type=distance, nargs="+", metavar="X", help=f"normalisation {told}")
    p.add_argument("--std", type=positive, nargs="+", metavar="X", help="the standard deviations that belong to --mean")
    told = "instead of an attack: accuracy under common corruptions, of files as CIFAR-10-C's or folders as ImageNet-C's"
    p.add_argument("--corruptions", type=place, metavar="FOLDER", help=told)
    p.add_argument("--sanity", action="store_true", help="then check on 300 images for signs of masked gradients")
    p.add_argument(
        "--transfer", metavar="RUN2", type=path, help="whose adversarial examples --sanity tries (default: train a model)"
    )
    p.add_argument("--fresh", action="store_true", help="attack again what is in RUN/evaluations already")
    add_json(p)


def verify(p: argparse.ArgumentParser) -> None:
    p.add_argument("run", metavar="RUN", type=path, help="a run directory, its model.safetensors, or NETWORK.onnx")
    p.add_argument("--epsilon", type=pixels, action=Once, help="radius, such as 0.1 or 8/255; needed for a run")
    p.add_argument("--vnnlib", metavar="FILE", type=path, action=Once, help="the property of NETWORK.onnx to verify")
    p.add_argument("--norm", choices=["linf", "l2"], action=Once, help="of the ball: linf (default: the run's)")
    add_limit(p)
    p.add_argument("--timeout", type=positive, default=60.0, metavar="SECONDS", help="for each image (default: 60)")
    add_workers(p, "processes")
    p.add_argument("--device", default="cpu", help="of branch and bound: cpu, cuda or cuda:N (default: cpu)")
    add_data(p)
    told = "where verdicts go (default: RUN/verification/epsilon-EPSILON); with --vnnlib, the file for the answer"
    p.add_argument("-o", "--output", metavar="DIR", type=path, help=told)
    add_json(p)


def export(p: argparse.ArgumentParser) -> None:
    add_run(p)
    p.add_argument("-o", "--output", metavar="DIR", type=path, help="default: RUN/export")
    add_json(p)


def report(p: argparse.ArgumentParser) -> None:
    p.add_argument("runs", nargs="+", metavar="RUN", type=path, help="run directories, finished or not")
    p.add_argument("-o", "--output", metavar="FILE", type=path, default="report.html", help="default: report.html")
    told = "test images on which the page's own attacks are run (default 200; 0: only show what the runs hold)"
    p.add_argument("--limit", type=count_or_zero, metavar="N", default=200, help=told)
    add_device(p)
    add_data(p)


def sweep(p: argparse.ArgumentParser) -> None:
    p.add_argument("sweep", metavar="SWEEP", type=path, help="a YAML file as below")
    p.add_argument("--dry-run", action="store_true", help="list the runs and check their configs")
    p.add_argument("--cluster", choices=["slurm", "local"], help="hand the runs to a scheduler through submitit")
    told = "submitit's parameters, such as timeout_min=120 gpus_per_node=1 slurm_partition=gpu"
    p.add_argument("--with", dest="options", nargs="+", default=[], metavar="key=value", help=told)
    p.epilog = f"\n\n{SWEEP}"


def lr_range(p: argparse.ArgumentParser) -> None:
    add_config(p)
    p.add_argument("--low", type=positive, help="the first rate (default: a hundredth of the config's highest)")
    p.add_argument("--high", type=positive, help="the last rate (default: a hundred times the config's highest)")
    p.add_argument("--steps", type=count, metavar="N", default=200, help="batches from first to last rate (default 200)")
    p.add_argument(
        "-o", "--output", metavar="FILE", type=path, default="lr_range.html", help="the plot (default: lr_range.html)"
    )
    add_json(p)


def prepare(p: argparse.ArgumentParser) -> None:
    p.add_argument("kind", choices=["ffcv", "dali"], help="FFCV's format, or WebDataset shards (for DALI)")
    p.add_argument("dataset", metavar="DATASET", help="as data.dataset in a config, such as imagenet")
    p.add_argument(
        "--data", "--source", metavar="PATH", type=path, help="folder or archive to read (default: the usual places)"
    )
    p.add_argument(
        "-o", "--output", metavar="DIR", type=path, help="default: DATASET-ffcv or DATASET-dali beside the data sets"
    )
    p.add_argument("--sizes", nargs="+", help="short sides in pixels, or `original`; default: those of the configs' phases")
    p.add_argument("--cap", type=count, metavar="N", help="shrink `original` images whose short side is longer")
    told = "default: jpeg, for small images raw; mixed: half of each"
    p.add_argument("--storage", choices=["jpeg", "raw", "mixed"], help=told)
    p.add_argument("--quality", type=count, default=90, metavar="N", help="of JPEG, 1 to 95 (default 90)")
    p.add_argument("--splits", nargs="+", choices=["train", "test"], default=["train", "test"])
    add_workers(p, "threads")
    p.add_argument("--limit", type=count, metavar="N", help="so many images of each split (default: all)")
    told = "a CSV file with the columns file,label, where folders do not say classes"
    p.add_argument("--labels", metavar="FILE", type=path, help=told)
    told = "replace what is there; until the new files are whole the old ones stay"
    p.add_argument("--overwrite", action="store_true", help=told)
    p.add_argument("--skip-corrupt", action="store_true", help="leave out images that cannot be read, and list them")
    p.add_argument("--dry-run", action="store_true", help="judge sizes and time from a sample; write nothing")


def configs(p: argparse.ArgumentParser) -> None:
    p.add_argument("name", metavar="NAME", nargs="?", help="show this one, with its comments")


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": train,
    "evaluate": evaluate,
    "verify": verify,
    "export": export,
    "report": report,
    "sweep": sweep,
    "lr-range": lr_range,
    "prepare": prepare,
    "configs": configs,
}


def add_command(p: argparse.ArgumentParser, name: str) -> None:
    OPTIONS[name](p)
    p.formatter_class = argparse.RawDescriptionHelpFormatter
    p.epilog = f"examples:\n{EXAMPLES[name]}{p.epilog or ''}"
    if name in ("train", "lr-range"):
        p.epilog += f"\n{KEYS}" + fill(", ".join(packaged.names()), 78, initial_indent="  ", subsequent_indent="  ")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="fastrobust", description="Train robust image classifiers, and say how robust they are."
    )
    commands = p.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, told) in WORK.items():
        add_command(commands.add_parser(name, help=told, description=f"{told[0].upper()}{told[1:]}."), name)
    return p


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    from fastrobust.runtime.command import main_with_errors

    return main_with_errors(lambda: importlib.import_module(WORK[arguments.command][0]).command(arguments))


def parse(argv: list[str]) -> argparse.Namespace:
    """Options may stand between the key=value pairs of a config, which argparse allows in a parser without commands only."""
    if not argv or argv[0] not in OPTIONS:
        return parser().parse_args(argv)
    name, told = argv[0], WORK[argv[0]][1]
    alone = Parser(prog=f"fastrobust {name}", description=f"{told[0].upper()}{told[1:]}.")
    add_command(alone, name)
    return alone.parse_intermixed_args(argv[1:], argparse.Namespace(command=name))


if __name__ == "__main__":
    sys.exit(main())
