"""The learning-rate range test: python -m fastrobust.lr_range CONFIG [key=value ...]

Trains for a few hundred updates while the learning rate rises geometrically (Smith and Topin, 2018), until the training
loss diverges. The rate at which the loss was lowest is the largest that still did good: a safe peak for `schedule.max_lr`.
For single-step methods look at the guard of a short run at that rate as well: overfitting to the attack lowers this loss."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastrobust import schema
from fastrobust.cli import main_with_errors
from fastrobust.evaluate import count

SPAN = 100.0  # the default range: the config's highest rate divided and multiplied by this
GIVEN_BACK = 0.5  # of what the loss had gained since the first rates: divergence
LEAST_RISE = 0.05  # of the first loss: smaller rises are noise


@dataclass(frozen=True)
class Found:
    """`best`: the rate at which the smoothed loss was lowest. `diverged`: where it had given back half of its gain, or
    None. `smooth` belongs to the rates that were tried."""

    best: float
    diverged: float | None
    smooth: list[float]


def geometric(low: float, high: float, steps: int) -> list[float]:
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def smooth(losses: list[float], half: int) -> list[float]:
    """The mean over the `half` losses before and after each: it does not lag behind, as a running mean would."""
    return [
        sum(losses[max(0, i - half) : i + half + 1]) / len(losses[max(0, i - half) : i + half + 1])
        for i in range(len(losses))
    ]


def judge(rates: list[float], losses: list[float], half: int) -> Found:
    """What a test says that tried rates[i] and met losses[i]. Rates beyond the divergence do not count."""
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    means = smooth(losses[:finite], half)
    if not means:
        return Found(rates[0], rates[0], [])
    lowest, end = 0, None
    for i, mean in enumerate(means):
        if mean < means[lowest]:
            lowest = i
        if mean > means[lowest] + max(GIVEN_BACK * (means[0] - means[lowest]), LEAST_RISE * abs(means[0])):
            end = i
            break
    if end is None and finite < len(losses):
        end = finite
    return Found(rates[lowest], None if end is None else rates[end], means[: None if end is None else end + 1])


def losses_of(job, rates: list[float]) -> Iterator[float]:
    """The mean loss of every step of a fresh Trainer, the learning rate of step i being rates[i] (`free` replays at it)."""
    import torch

    from fastrobust import engine

    learner, phase = job.learner, job.config.phases[0]
    table = torch.tensor(rates, device=job.device)
    learner.lr_table = table.repeat_interleave(job.config.replays)
    job.scales = None  # the whole epsilon from the start
    for images, labels in job.loader.batches(job.config.seed, 0, phase.batch_size, 0, len(rates)):
        if job.step is None:
            job.step = engine.prepare(job.engine, job.train_step, images, labels, job)
        learner.reset_sums()
        job.step(images, labels)
        loss_sum, _, seen = learner.read_sums()
        yield loss_sum / seen


def run_test(job, rates: list[float]) -> tuple[list[float], Found]:
    """(losses, what they say); stops soon after the divergence."""
    from fastrobust.progress import Progress

    half, losses = max(1, len(rates) // 40), []
    found = judge(rates, [float("nan")], half)
    with Progress("range test", len(rates)) as bar:
        for loss in losses_of(job, rates):
            losses.append(loss)
            bar.advance(1, f"rate {rates[len(losses) - 1]:.3g}  loss {loss:.4f}" if bar.due() else None)
            found = judge(rates, losses, half)
            if found.diverged is not None and (
                not math.isfinite(loss) or rates.index(found.diverged) < len(losses) - half - 1
            ):
                break
    return losses, found


def highest_rate(schedule) -> float:
    if schedule.name == "points":
        return max(rate for _, rate in schedule.points)
    return schedule.max_lr if schedule.name == "cyclic" else schedule.lr


def positive(text: str) -> float:
    try:
        value = float(schema.parse_number(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m fastrobust.lr_range", description=__doc__.splitlines()[0])
    p.add_argument("config", help="a YAML file, such as configs/mnist_fgsm.yaml")
    p.add_argument("overrides", nargs="*", metavar="key=value")
    p.add_argument("--low", type=positive, help="the first rate (default: a hundredth of the config's highest)")
    p.add_argument("--high", type=positive, help="the last rate (default: a hundred times the config's highest)")
    p.add_argument("--steps", type=count, default=200, help="minibatches from the first rate to the last (default 200)")
    p.add_argument("-o", "--output", metavar="FILE", default="lr_range.html", help="the plot (default: lr_range.html)")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    return main_with_errors(lambda: start(arguments))


def start(arguments: argparse.Namespace) -> int:
    from fastrobust import config as config_module
    from fastrobust import distributed, run, trainer
    from fastrobust.errors import ConfigError

    config = config_module.load(arguments.config, arguments.overrides)
    peak = highest_rate(config.schedule)
    low, high = arguments.low or peak / SPAN, arguments.high or peak * SPAN
    if low >= high or arguments.steps < 20:
        raise ConfigError(
            f"rates from {low:g} to {high:g} in {arguments.steps} steps: --low must be less, --steps 20 or more"
        )
    job = trainer.Trainer(config, Path(config.output), distributed.pick_device(config.device))
    rates = geometric(low, high, arguments.steps)
    losses, found = run_test(job, rates)
    run.write_text(Path(arguments.output), page_of(config, rates, losses, found))
    end = (
        f"the loss diverged at {found.diverged:.3g}"
        if found.diverged
        else f"no divergence up to {high:.3g}: try --high {high * 10:g}"
    )
    print(f"recommended learning rate: {found.best:.3g}  ({end}; plot in {arguments.output})")
    if arguments.json:
        print(
            json.dumps(
                {"recommended": found.best, "diverged": found.diverged, "rates": rates[: len(losses)], "losses": losses}
            )
        )
    return 0


def page_of(config, rates: list[float], losses: list[float], found: Found) -> str:
    from fastrobust.charts import Line, chart, escape, page
    from fastrobust.report import method_text

    ceiling = 1.2 * max(found.smooth, default=1.0)
    raw = [(r, min(loss, ceiling)) for r, loss in zip(rates, losses, strict=False) if math.isfinite(loss)]
    lines = [
        Line("each minibatch", raw, 7, dots=False, faint=True),
        Line("smoothed", list(zip(rates, found.smooth, strict=False)), 0, dots=False),
    ]
    marks = [(found.best, f"recommended {found.best:.3g}")] + ([(found.diverged, "diverged")] if found.diverged else [])
    drawn = chart("Training loss", lines, x="learning rate", log_x=True, marks=marks)
    told = f"Recommended learning rate: <b>{found.best:.3g}</b>, where the smoothed loss was lowest. "
    told += f"It had given back half of its gain at {found.diverged:.3g}." if found.diverged else "It did not diverge."
    about = f"{method_text(config)}; {config.model.name} on {config.data.dataset}, batch {config.phases[0].batch_size}"
    return page(
        f"Range test of {config.name}",
        f"<h1>Learning-rate range test: {escape(config.name)}</h1><p>{told}</p>"
        f'<p class="note">{escape(about)}</p><div class="grid">{drawn}</div>',
    )


if __name__ == "__main__":
    sys.exit(main())
