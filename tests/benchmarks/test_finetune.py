"""The images and the configs of the fine-tuning benchmark; it trains for an hour, which no test does."""

from __future__ import annotations

import csv
import shutil

from benchmarks import finetune
from fastrobust.config import reading


def test_both_trainings_are_alike_but_for_their_weights(few_bars, tmp_path, monkeypatch):
    for file in few_bars.rglob("*.png"):
        there = tmp_path / "data" / file.relative_to(few_bars).with_suffix(".JPEG")
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, there)
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "val")
    runs = []
    monkeypatch.setattr(finetune.start, "run", lambda config, *rest, **options: runs.append(config))
    monkeypatch.setattr(finetune.start, "show_summary", lambda *given: None)
    monkeypatch.setattr("sys.argv", ["finetune", str(tmp_path / "data"), "--output", str(tmp_path / "runs"), "--seed", "3"])
    finetune.main()
    clean, scratch, tuned = runs
    differ = reading.differences(scratch, tuned)
    assert [line.split(":")[0] for line in differ] == ["model.weights", "name"] and tuned.seed == 3
    assert tuned.model.weights == str(tmp_path / "runs" / clean.name) and clean.method.name == "standard"
    halves = {}
    for config in (clean, tuned):
        with open(config.data.labels, newline="") as file:
            rows = list(csv.DictReader(file))
        assert all(row["label"] == row["file"].split("/")[1] for row in rows)
        assert len([row for row in rows if row["split"] == "val"]) == 20
        halves[config.name] = {row["file"] for row in rows if row["split"] == "train"}
    assert len(halves) == 2 and not set.intersection(*halves.values()) and len(set.union(*halves.values())) == 70
