"""Tests of benchmarks.alignment: made-up runs, and a small real one."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import alignment


def made_up(robust, alignments, every=16):
    return {"robust": robust, "alignments": alignments, "every": every, "alignments_every": 8}


@pytest.mark.parametrize(
    ("robust", "expected"),
    [
        ([0.1, 0.2, 0.4, 0.4, 0.1, 0.0], 5 * 16),
        ([0.1, 0.4, 0.1, 0.3, 0.4, 0.4], None),  # it came back
        ([0.1, 0.4, 0.1, 0.3, 0.1, 0.1], 5 * 16),
        ([0.0, 0.1, 0.2, 0.3], None),
    ],
)
def test_where_a_run_collapsed(robust, expected):
    assert alignment.collapse(made_up(robust, [])) == expected


def test_when_the_alarm_is_given():
    """By the mean of the last 64 updates, of which 8 are known. Those from 64 to 232 are aligned, the later ones are not."""
    run = made_up([], [0.05] * 8 + [0.8] * 22 + [0.0] * 10)
    assert alignment.alarm(run, 0.25) == 8 * (30 + 5) + 1  # 2 of 8 are left
    assert alignment.alarm(run, 0.1) == 8 * (30 + 7) + 1
    assert alignment.alarm(made_up([], [0.2] * 40), 0.25) is None  # it never was high
    assert alignment.alarm(made_up([], [0.8] * 40), 0.25) is None


def test_a_small_run(quick, tmp_path, monkeypatch, capsys):
    argv = [str(quick(guard={"steps": 1})), "device=cpu", "--every", "2"]
    monkeypatch.setattr(sys, "argv", ["alignment", *argv, "--json", str(tmp_path / "a.json")])
    alignment.main()
    run = json.loads((tmp_path / "a.json").read_text())
    assert len(run["robust"]) == len(run["trained"]) == 2 and len(run["alignments"]) == 1
    assert run["command"].endswith("bars.yaml device=cpu --every 2") and run["hardware"]["cores"]
    monkeypatch.setattr(sys, "argv", ["alignment", "--show", str(tmp_path / "a.json")])
    alignment.main()
    assert "alarm below 0.1" in capsys.readouterr().out
