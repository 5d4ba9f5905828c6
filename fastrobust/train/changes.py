"""What `--resume RUN key=value` may change of a run that has begun, and what to do instead where it may not."""

from __future__ import annotations

import shlex
from pathlib import Path

from fastrobust.config import reading
from fastrobust.config.numbers import describe
from fastrobust.config.schema import Config
from fastrobust.config.sections import Evaluation
from fastrobust.runtime.command import to_paste
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.run_directory import SUMMARY


def asked_for(directory: Path, config: Config, file: str | None, overrides: list[str]) -> tuple[Config, list[str]]:
    """The run's config with what is named beside --resume, and a line for each key that differs. Raises RunError where that
    would be another training, or the run is finished already; ConfigError for what is no config."""
    given = reading.load(file, overrides) if file else reading.change(config, overrides, str(directory))
    lines = reading.differences(config, given, ("before", "now"))
    if refused := [line for line in lines if not reading.may_change(line)]:
        raise RunError(refusal(directory, config, given, file, overrides, refused))
    evaluation = given.evaluation
    if evaluation.precision == "auto":  # the run's choice
        evaluation = evaluation.model_copy(update={"precision": config.evaluation.precision})
    if (directory / SUMMARY).exists() and evaluation != config.evaluation:
        raise RunError(
            f"{directory} is finished, and keeps its evaluation. For another one:\n"
            + "\n".join(f"  {command}" for command in evaluations(directory, config.evaluation, evaluation))
        )
    chosen = {key: getattr(given.data, key) or getattr(config.data, key) for key in ("prepared", "channels")}
    data = given.data.model_copy(update=chosen)
    engine = config.engine if given.engine == "auto" else given.engine  # auto: the run's choice
    update = {"evaluation": evaluation, "device": given.device, "data": data, "engine": engine}
    return config.model_copy(update=update), lines


def refusal(directory: Path, config: Config, given: Config, file: str | None, overrides: list[str], lines: list[str]) -> str:
    """Why these keys cannot be changed, and a command that does what was probably meant."""
    shown = "".join(f"\n  {line}" for line in lines[:8])
    anew, name = [file or directory / "config.yaml"], f"{config.name}_2"
    if all(line.startswith(("name:", "output:")) for line in lines):
        return f"{directory} is where this run lies:{shown}\nTo move it, move the folder, and resume it there"
    if longer := [line for line in lines if line.startswith("phases.") and ".epochs: " in line]:
        why = f"{directory}: its learning rate ({config.schedule.name}) was planned for {config.epochs} epochs:{shown}\n"
        command = to_paste("train", *anew, f"name={name}", f"model.weights={directory}")
        if len(config.phases) == 1 and len(longer) == len(lines) and given.epochs > config.epochs:
            command += f" phases.0.epochs={given.epochs - config.epochs}"
        finished = (directory / SUMMARY).exists()
        first = "" if finished else f"\n  {to_paste('train', '--resume', directory)}"
        return f"{why}To train longer, begin a run that starts with its weights at their end:{first}\n  {command}"
    changes = " ".join(map(shlex.quote, overrides))
    command = f"{to_paste('train', *anew, f'name={name}')} {changes}".strip()
    return (
        f"{directory} was begun with another config:{shown}\n"
        f"These keys decide what is trained, and cannot change. What can:\n  {', '.join(reading.MAY_CHANGE)}\n"
        f"Resume without them, or start a new run:\n  {command}"
    )


def evaluations(directory: Path, before: Evaluation, now: Evaluation) -> list[str]:
    """The evaluate commands that attack with the settings `now`."""
    common = [
        word
        for key in ("steps", "restarts", "batch_size", "precision", "limit")
        if (value := getattr(now, key)) != getattr(before, key) and value is not None
        for word in (f"--{key.replace('_', '-')}", value)
    ]
    own = {e for e, alpha in zip(now.epsilon, now.alpha, strict=True) if alpha != before.alpha_at(e)}
    groups = [[e] for e in now.epsilon if e in own] + [[e for e in now.epsilon if e not in own]]
    step = lambda e: ["--alpha", describe(dict(zip(now.epsilon, now.alpha, strict=True))[e])]
    return [
        to_paste(
            "evaluate", directory, "--epsilon", ",".join(map(describe, g)), *(step(g[0]) if g[0] in own else []), *common
        )
        for g in groups
        if g
    ]
