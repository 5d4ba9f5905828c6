"""Tests of fastrobust.runtime.interrupt: who is told of a signal, and what the exit status says."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from fastrobust.runtime import interrupt, run_directory
from fastrobust.runtime.command import main_with_errors, to_paste
from fastrobust.runtime.errors import ConfigError

RUN = Path("runs/a")


@pytest.mark.parametrize(
    "signum, status", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_command_with_a_status_that_says_resume_me(capsys, signum, status):
    def command():
        with interrupt.resumable(RUN):
            os.kill(os.getpid(), signum)
            return 0

    assert main_with_errors(command) == status
    command = to_paste("train", "--resume", RUN)
    assert command.endswith("train --resume runs/a")
    assert capsys.readouterr().err == f"stopped by {signum.name}; go on with: {command}\n"


def test_what_ctrl_c_became_in_a_library_is_ctrl_c_again(capsys):
    """NumPy and matplotlib, interrupted in the middle of their import, raise an ImportError of it."""

    def importing(cause):
        try:
            raise cause
        except type(cause) as error:
            raise ImportError("initialization failed") from error

    def explaining():
        try:
            importing(KeyboardInterrupt())
        except ImportError:
            raise ConfigError("matplotlib is not installed") from None

    for command in (lambda: importing(KeyboardInterrupt()), explaining):
        assert main_with_errors(command) == 130
        assert capsys.readouterr().err == "stopped by the keyboard\n"
    with pytest.raises(ImportError):
        main_with_errors(lambda: importing(ValueError()))


def test_ignored_signals_stay_ignored_and_the_others_are_given_back():
    """`nohup` starts a command with SIGHUP ignored."""
    seen = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    others = {s: signal.getsignal(s) for s in interrupt.STOPPING if s != signal.SIGHUP}
    try:
        with interrupt.handled(lambda signum, frame: seen.append(signum)):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            for signum in interrupt.STOPPING:
                os.kill(os.getpid(), signum)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert seen == [s for s in interrupt.STOPPING if s != signal.SIGHUP]
    assert {s: signal.getsignal(s) for s in others} == others


def test_the_inner_handler_has_the_signal_and_the_outer_one_has_it_back():
    seen = []
    with pytest.raises(interrupt.Interrupted), interrupt.resumable(RUN):
        with interrupt.handled(lambda signum, frame: seen.append(signum)):
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_a_checkpoint_is_read_is_no_damage_to_it(tmp_path, monkeypatch):
    """Readers take whatever a damaged file raises for damage: a signal must pass through them."""
    run_directory.save_checkpoint(tmp_path, {"a": torch.ones(1)}, {})
    run_directory.save_checkpoint(tmp_path, {"a": torch.zeros(1)}, {})
    load, before = torch.load, sorted(tmp_path.iterdir())
    monkeypatch.setattr(torch, "load", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM) or load(*a, **k))
    with pytest.raises(interrupt.Interrupted, match="stopped by SIGTERM"), interrupt.resumable(tmp_path):
        run_directory.load_checkpoint(tmp_path)
    assert sorted(tmp_path.iterdir()) == before, "nothing was set aside"
