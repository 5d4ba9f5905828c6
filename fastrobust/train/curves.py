"""What a training shows of itself: its loggers' curves and a line for each epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastrobust.config import parts
from fastrobust.config.schema import Config
from fastrobust.runtime.distributed import World
from fastrobust.runtime.errors import ConfigError, first_line
from fastrobust.runtime.progress import Progress
from fastrobust.train.loggers import Logger, figures


def check(config: Config) -> None:
    """Raise ConfigError for a logger of the config that is not installed."""
    for name in config.logging:
        parts.find_class("logging", parts.LOGGERS, name).check()


class Curves:
    """The loggers of a config, in process 0 alone. One that fails is left out from then on, which is said in one line of
    `say`. Raises ConfigError for one that is not installed."""

    def __init__(self, directory: Path, config: Config, history: list[dict], world: World):
        self.loggers: dict[str, Logger] = {}
        self.say: Callable[[str], None] = print
        for name in config.logging if world.rank == 0 else ():
            kind = parts.find_class("logging", parts.LOGGERS, name)
            self._try(name, lambda kind=kind, name=name: self.loggers.update({name: kind(directory, config, history)}))

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *exception) -> None:
        for name, logger in list(self.loggers.items()):
            self._try(name, logger.close)

    def draw(self, record: dict) -> None:
        for name, logger in list(self.loggers.items()):
            self._try(name, lambda logger=logger: logger.log(figures(record), record["updates"]))

    def _try(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except ConfigError:
            raise
        except Exception as error:  # a server that is away, a full disk, a package of another version
            self.loggers.pop(name, None)
            self.say(f"warning: logging to {name} has ended: {type(error).__name__}: {first_line(error)}")


def epoch_line(record: dict, config: Config, bar: Progress) -> str:
    """What the terminal keeps of an epoch, in 80 columns: the loss and the accuracy on what was trained on (under the
    training attack), and the guard's accuracies. The rest is in metrics.jsonl."""
    text = f"epoch {record['epoch']:>3}/{config.epochs}  loss {record['loss']:.3f}  train {record['train_accuracy']:.1%}  "
    if "guard_accuracy" in record:
        text += f"guard clean {record['guard_clean_accuracy']:.1%} PGD {record['guard_accuracy']:.1%}  "
    return f"{text}{bar.time_left()} left"
