"""The learning-rate range test: fastrobust lr-range CONFIG [key=value ...]

Trains for a few hundred updates while the learning rate rises geometrically (Smith and Topin, 2018), until the training
loss diverges. The rate at which the loss was lowest is the largest that still did good: a safe peak for `schedule.max_lr`.
For single-step methods look at the guard of a short run at that rate as well: overfitting to the attack lowers this loss."""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.data import loaders
from fastrobust.reporting.charts import Line, chart, escape, page
from fastrobust.runtime import distributed
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.files import check_writable, write_text
from fastrobust.runtime.progress import Progress
from fastrobust.train.start import load_weights, resolve
from fastrobust.train.step import Step, build

SPAN = 100.0  # the default range: the config's highest rate divided and multiplied by this
GIVEN_BACK = 0.5  # of what the loss had gained since the first rates: divergence
LEAST_RISE = 0.05  # of the first loss: smaller rises are noise
LEAST_FALL = 0.02  # of the first loss: the rate at the bottom of a smaller fall is chance


@dataclass(frozen=True)
class Found:
    """`best`: the rate at which the smoothed loss was lowest, None where it hardly fell. `diverged`: where it had given
    back half of its gain, or None. `smooth` belongs to the rates that were tried."""

    best: float | None
    diverged: float | None
    smooth: list[float]


def geometric(low: float, high: float, steps: int) -> list[float]:
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def smooth(losses: list[float], half: int) -> list[float]:
    """The mean over the `half` losses before and after each: it does not lag behind, as a running mean would."""
    return [statistics.fmean(losses[max(0, i - half) : i + half + 1]) for i in range(len(losses))]


def judge(rates: list[float], losses: list[float], half: int) -> Found:
    """What a test says that tried rates[i] and met losses[i]. Rates beyond the divergence do not count."""
    finite = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    means = smooth(losses[:finite], half)
    if not means:
        return Found(None, rates[0], [])
    lowest, end = 0, None
    for i, mean in enumerate(means):
        if mean < means[lowest]:
            lowest = i
        if mean > means[lowest] + max(GIVEN_BACK * (means[0] - means[lowest]), LEAST_RISE * abs(means[0])):
            end = i
            break
    if end is None and finite < len(losses):
        end = finite
    best = rates[lowest] if means[0] - means[lowest] >= LEAST_FALL * abs(means[0]) else None
    return Found(best, None if end is None else rates[end], means[: None if end is None else end + 1])


def losses_of(training_step: Step, loader, config: Config, rates: list[float]) -> Iterator[float]:
    """The mean loss of every batch on a fresh Step, the learning rate for batch i being rates[i] (`free` replays at it)."""
    learner = training_step.learner
    learner.lr_table = torch.tensor(rates, device=learner.device).repeat_interleave(config.replays)
    training_step.scales = None  # the whole epsilon from the start
    for batch in loader.batches(config.seed, 0, config.phases[0].batch_size, 0, len(rates)):
        learner.reset_sums()
        training_step(batch)
        loss_sum, _, seen = training_step.sums()
        yield loss_sum / seen


def run_test(losses_met: Iterator[float], rates: list[float]) -> tuple[list[float], Found]:
    """(losses, what they say) of a test whose losses come one after the other; stops soon after the divergence."""
    half, losses = max(1, len(rates) // 40), []
    with Progress("range test", len(rates)) as bar:
        for rate, loss in zip(rates, losses_met, strict=False):
            losses.append(loss)
            bar.advance(1, f"rate {rate:.3g}  loss {loss:.4f}" if bar.due() else None)
            found = judge(rates, losses, half)
            sure = not math.isfinite(loss) or (found.diverged and rates.index(found.diverged) < len(losses) - half - 1)
            if found.diverged is not None and sure:
                break
    return losses, found


def command(arguments) -> int:
    """The lr-range command."""
    config = reading.load(arguments.config, arguments.overrides)
    peak = config.schedule.highest()
    low, high = arguments.low or peak / SPAN, arguments.high or peak * SPAN
    if low >= high or arguments.steps < 20:
        raise ConfigError(
            f"rates from {low:g} to {high:g} in {arguments.steps} steps: --low must be less, --steps 20 or more"
        )
    check_writable(Path(arguments.output))
    device = distributed.pick_device(config.device)
    config = resolve(config, device, distributed.ALONE)
    loader = loaders.Phases(config, device).enter(0)
    rates = geometric(low, high, arguments.steps)
    step = build(config, loader, device)
    load_weights(step.learner.model, config, loader.classes)
    losses, found = run_test(losses_of(step, loader, config, rates), rates)
    write_text(Path(arguments.output), page_of(config, rates, losses, found))
    end = f"no divergence up to {high:.3g}: try --high {high * 10:g}"
    if found.diverged:
        end = f"the loss diverged at {found.diverged:.3g}"
    if found.best is None:
        print(f"no learning rate is recommended: the loss did not fall ({end}; plot in {arguments.output}).")
        print(f"Take more --steps (now {arguments.steps}), and see whether the config trains at all")
    else:
        print(f"recommended learning rate: {found.best:.3g}  ({end}; plot in {arguments.output})")
    if arguments.json:
        result = {"recommended": found.best, "diverged": found.diverged, "rates": rates[: len(losses)], "losses": losses}
        print(json.dumps(result))
    return 0


def page_of(config, rates: list[float], losses: list[float], found: Found) -> str:
    ceiling = 1.2 * max(found.smooth, default=1.0)
    raw = [(r, min(loss, ceiling)) for r, loss in zip(rates, losses, strict=False)]
    smoothed = list(zip(rates, found.smooth, strict=False))
    lines = [Line("each minibatch", raw, 1, faint=True), Line("smoothed", smoothed)]
    marks = [(found.diverged, "diverged")] if found.diverged else []
    told = "No learning rate is recommended: the loss did not fall. "
    if found.best is not None:
        marks.insert(0, (found.best, f"recommended {found.best:.3g}"))
        told = f"Recommended learning rate: <b>{found.best:.3g}</b>, where the smoothed loss was lowest. "
    told += f"It had given back half of its gain at {found.diverged:.3g}." if found.diverged else "It did not diverge."
    about = f"{config.in_words()}; {config.model.name} on {config.data.dataset}, batch {config.phases[0].batch_size}"
    drawn = chart("Training loss", lines, x="learning rate", log_x=True, marks=marks)
    body = f'<p>{told}</p><p class="note">{escape(about)}</p><div class="grid">{drawn}</div>'
    return page(f"Range test of {config.name}", f"<h1>Learning-rate range test: {escape(config.name)}</h1>{body}")
