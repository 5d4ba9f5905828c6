"""Tests of fastrobust.runtime.background: one piece of work at a time, and no error lost."""

import threading

import pytest

from fastrobust.runtime.background import Background


def test_work_runs_beside_and_the_next_waits_for_it():
    go, done, background = threading.Event(), [], Background()
    background.start(lambda: go.wait(10) and done.append(1))
    background.check()  # does not wait
    assert not done
    threading.Timer(0.05, go.set).start()
    background.start(lambda: done.append(2))
    assert done[0] == 1, "the second began after the first"
    background.wait()
    background.wait()
    assert done == [1, 2]


def test_an_error_is_raised_once_in_the_thread_that_asks():
    background = Background()

    def fail():
        raise ZeroDivisionError("made up")

    for ask in (background.wait, lambda: background.start(lambda: None)):
        background.start(fail)
        with pytest.raises(ZeroDivisionError, match="made up"):
            ask()
        background.check()
    background.start(fail)
    while background._thread.is_alive():
        pass
    with pytest.raises(ZeroDivisionError):
        background.check()
    background.wait()
