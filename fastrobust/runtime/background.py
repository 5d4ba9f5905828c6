"""Work in a thread beside the main one: one piece at a time, and its error where the main thread next asks."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Background:
    """`start(work)` waits for the work before, then returns at once."""

    def __init__(self):
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Raises what the work before raised."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:  # it is raised in the main thread
                self._error = error

        self._thread = threading.Thread(target=run, name="background")
        self._thread.start()

    def check(self) -> None:
        """Raises what work that has ended raised. Does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Raises what the work raised, once."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error
