"""What the terminal shows: a live bar where there is a terminal, plain lines with the time left where there is none."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

PLAIN_FIRST, PLAIN_INTERVAL = 5.0, 30.0  # seconds to the first plain line, and between them


def duration(seconds: float) -> str:
    """`4.2 s`, `3:07`, `2:03:59`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Progress:
    """`with Progress("train", total) as bar: bar.advance(n, "loss 0.31")`. `detail` is shown beside the time left, which
    is judged from the pace since the start of this bar. `bar.line(text)` prints a lasting line."""

    def __init__(self, label: str, total: int, done: int = 0):
        self.label, self.total, self.done, self.first = label, total, done, done
        self.console = Console(highlight=False)
        self.began = self.shown = time.monotonic()
        self.bar = None
        if self.console.is_terminal and sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]} left"),
                TextColumn("{task.fields[detail]}"),
            )
            self.bar = RichProgress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self.task = self.bar.add_task(label, total=total, completed=done, left="?", detail="")

    def __enter__(self) -> Progress:
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar:
            self.bar.stop()

    def due(self) -> bool:
        """Whether enough time has passed that a new detail is worth the work of making it."""
        first = self.shown == self.began
        return time.monotonic() - self.shown > (0.5 if self.bar else PLAIN_FIRST if first else PLAIN_INTERVAL)

    def time_left(self) -> str:
        pace = (time.monotonic() - self.began) / max(1, self.done - self.first)
        return duration(pace * max(0, self.total - self.done)) if self.done > self.first else "?"

    def advance(self, n: int = 1, detail: str | None = None) -> None:
        self.done += n
        if detail is None:
            return
        self.shown = time.monotonic()
        if self.bar:
            self.bar.update(self.task, completed=self.done, left=self.time_left(), detail=detail)
        else:
            self.line(f"{self.label} {self.done}/{self.total}  {detail}  {self.time_left()} left")

    def line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        if not self.bar:
            sys.stdout.flush()
