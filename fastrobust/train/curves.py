"""What a training shows of itself: TensorBoard's curves and a line for each epoch."""

from __future__ import annotations

from pathlib import Path

from fastrobust.config.schema import Config
from fastrobust.runtime.distributed import World
from fastrobust.runtime.files import explained
from fastrobust.runtime.progress import Progress


class Curves:
    """TensorBoard's events in a run directory, written anew from the history: it orders files by the clock, which may have
    been changed. Process 0 alone writes them. Raises RunError."""

    def __init__(self, directory: Path, history: list[dict], world: World):
        self.writer = None
        if world.rank:
            return
        from torch.utils.tensorboard import SummaryWriter  # its import takes longer than a short run's first epoch

        with explained(f"TensorBoard events cannot be written to {directory}"):
            for old in directory.glob("events.out.tfevents.*"):
                old.unlink()
            self.writer = SummaryWriter(str(directory))
        for record in history:
            self.draw(record)

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *exception) -> None:
        if self.writer is not None:
            self.writer.close()

    def draw(self, record: dict) -> None:
        if self.writer is None:
            return
        for name in record.keys() - {"epoch", "phase", "updates", "warning", "guard_images", "went_back_to", "method"}:
            self.writer.add_scalar(name, record[name], record["updates"])
        self.writer.flush()


def epoch_line(record: dict, config: Config, bar: Progress) -> str:
    """What the terminal keeps of an epoch, in 80 columns: the loss and the accuracy on what was trained on (under the
    training attack), and the guard's accuracies. The rest is in metrics.jsonl."""
    text = f"epoch {record['epoch']:>3}/{config.epochs}  loss {record['loss']:.3f}  train {record['train_accuracy']:.1%}  "
    if "guard_accuracy" in record:
        text += f"guard clean {record['guard_clean_accuracy']:.1%} PGD {record['guard_accuracy']:.1%}  "
    return f"{text}{bar.time_left()} left"
