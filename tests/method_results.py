"""Results of the comparison of training methods that are made up."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import method_setting as setting


def write(folder: Path, method: str, autoattack: float, seed: int = 0, schedule: str = "equal epochs", **changes) -> None:
    job = setting.Job(method, setting.epochs("small", method, schedule), seed)
    attack = {"attack": "pgd-50-10", "robust_accuracy": autoattack + 0.02, "robust_interval": [0, 1]}
    found = {"method": method, "epochs": job.epochs, "seed": seed, "clean_accuracy": 0.5, "pgd": attack, "examples": 200,
             "autoattack": {"robust_accuracy": autoattack, "robust_interval": [autoattack - 0.05, autoattack + 0.06]},
             "images": "abc", "config": setting.config_of("small", job).to_dict(), "data": "cifar10 (x)",
             "hardware": {"device": "CPU", "threads": 1}, "warnings": []}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{job.name}.json").write_text(json.dumps(found | changes))
