"""What the terminal shows: a live bar where there is a terminal, plain lines with the time left where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

PLAIN_FIRST, PLAIN_INTERVAL = 5.0, 30.0  # seconds to the first plain line, and between them


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `2:03:59`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class _Bar(RichProgress):
    """With a line of text below the bar."""

    below: str | None = None

    def get_renderables(self):
        yield from super().get_renderables()
        if self.below:
            yield self.below


class Overall:
    """One estimate for a command of several parts, each of which has a bar: `works` is how much there is to do in each.
    `with Progress(..., overall=overall)` shows it; `next()` says that a part is over, `skipped` that it was done before."""

    def __init__(self, works: Sequence[float]):
        self.works, self.part, self.skipped, self.began = list(works), 0, 0.0, time.monotonic()

    def next(self, skipped: bool = False) -> None:
        self.skipped += self.works[self.part] if skipped else 0
        self.part += 1

    def share(self, of_part: float) -> float:
        """How much of all is done, 0 to 1, when so much of this part is."""
        return (sum(self.works[: self.part]) + of_part * self.works[self.part]) / sum(self.works)

    def told(self, of_part: float) -> str:
        """`attack 2 of 8; all: 1:20 so far, about 5:10 left`."""
        all_, elapsed = sum(self.works), time.monotonic() - self.began
        done = self.share(of_part) * all_
        left = duration(elapsed / (done - self.skipped) * (all_ - done)) if done > self.skipped else "?"
        return f"{self.part + 1} of {len(self.works)}; all: {duration(elapsed)} so far, about {left} left"


class Progress:
    """`with Progress("train", total) as bar: bar.advance(n, "loss 0.31")`. `detail` is shown beside the time left, which
    is judged from the pace since the first piece of this bar: a first step on a GPU can take a thousand times as long as
    the others. `bar.line(text)` prints a lasting line."""

    def __init__(self, label: str, total: int, done: int = 0, overall: Overall | None = None):
        self.label, self.total, self.done, self.first = label, total, done, done
        self.overall = overall if overall is not None and len(overall.works) > 1 else None
        self.console = Console(highlight=False)
        self.began = self.shown = time.monotonic()
        self.first_piece: tuple[float, int] | None = None  # when it was done, and what was done then
        self.bar = None
        if self.console.is_terminal and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=max(6, min(24, self.console.width - 72))),  # what the words leave
                MofNCompleteColumn(table_column=Column(min_width=2 * len(str(total)) + 1)),
                TextColumn("{task.fields[left]} left"),
                TextColumn("{task.fields[detail]}"),
            )
            self.bar = _Bar(*columns, console=self.console, transient=True, refresh_per_second=4)
            self.task = self.bar.add_task(label, total=total, completed=done, left="?", detail="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def due(self) -> bool:
        """Whether enough time has passed that a new detail is worth the work of making it. The first piece alone says
        little about the time left: a plain line waits for the second, but not for long."""
        first = self.shown == self.began and self.first_piece is not None
        return time.monotonic() - self.shown > (0.5 if self.bar else PLAIN_FIRST if first else PLAIN_INTERVAL)

    def time_left(self) -> str:
        since, before = self.first_piece or (self.began, self.first)
        if self.done == before:
            since, before = self.began, self.first
        pace = (time.monotonic() - since) / max(1, self.done - before)
        return duration(pace * max(0, self.total - self.done)) if self.done > before else "?"

    def advance(self, n: int = 1, detail: str | None = None) -> None:
        self.done += n
        if self.first_piece is None:
            self.first_piece = time.monotonic(), self.done
        if detail is None:
            return
        self.shown = time.monotonic()
        whole = self.overall and self.overall.told(min(1.0, self.done / max(1, self.total)))
        if self.bar:
            self.bar.below = whole
            self.bar.update(self.task, completed=self.done, left=self.time_left(), detail=detail)
        else:
            self.line(f"{self.label} {self.done}/{self.total}  {detail}  {self.time_left()} left")
            if whole:
                self.line(f"  {whole}")

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        if not self.bar:
            sys.stdout.flush()
