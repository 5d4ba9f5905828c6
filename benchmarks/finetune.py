"""Fine-tuning clean weights against training from scratch: python -m benchmarks.finetune FOLDER

FOLDER holds Imagenette as files, `train/<class>/*.JPEG` and `val/<class>/*.JPEG`. torchvision's resnet18 is trained without
an attack on every other training image. Then it is trained with FGSM on the other half of them for 296 steps, once from
these weights and once from scratch. The two halves share no image, and no image of either is a test image. Runs that are
there go on, or are left as they are.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from fastrobust.config import reading
from fastrobust.runtime.distributed import ALONE, pick_device
from fastrobust.train import start

CLEAN = {"method": {"name": "standard"}, "phases": [{"epochs": 6, "batch_size": 32, "resolution": 48}]}
CLEAN["evaluation"] = {"steps": 10, "restarts": 1, "limit": 500}


def config_of(folder: Path, output: Path, name: str, half: str, seed: int = 0, weights: Path | None = None, **changes):
    """A run's config. half: `clean` or `robust`, the training images that it sees."""
    settings = {
        "name": name,
        "output": str(output),
        "seed": seed,
        "epsilon": "4/255",
        "data": {
            "dataset": "image_folder",
            "path": str(folder.absolute()),
            "labels": str(folder.absolute() / f"{half}.csv"),
            "augment": {"crop": "pad", "padding": 4, "flip": True},
        },
        "model": {"name": "resnet18"} | ({"weights": str(weights)} if weights else {}),
        "method": {"name": "fgsm", "alpha": "5/255"},
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "cyclic", "max_lr": 0.05},
        "phases": [{"epochs": 2, "batch_size": 32, "resolution": 48}],
        "evaluation": {"steps": 50, "restarts": 2, "limit": 500},
    }
    return reading.parse(settings | changes, "benchmarks.finetune")


def write_halves(folder: Path) -> None:
    """`clean.csv` and `robust.csv`: every other training image each, and all test images."""
    files = {split: sorted(p.relative_to(folder) for p in (folder / split).rglob("*.JPEG")) for split in ("train", "val")}
    for first, name in enumerate(("clean.csv", "robust.csv")):
        with open(folder / name, "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("file", "label", "split"))
            for split, part in (("train", files["train"][first::2]), ("val", files["val"])):
                rows.writerows((path, path.parent.name, split) for path in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, default=Path("runs"), help="where the runs go (default: runs)")
    parser.add_argument("--seed", type=int, default=0, help="of the two trainings with FGSM (default: 0)")
    arguments = parser.parse_args()
    write_halves(arguments.folder)
    clean = arguments.output / "imagenette_clean"
    runs = [config_of(arguments.folder, arguments.output, clean.name, "clean", **CLEAN)]
    for kind, weights in (("scratch", None), ("finetuned", clean)):
        name = f"imagenette_{kind}_{arguments.seed}"
        runs.append(config_of(arguments.folder, arguments.output, name, "robust", arguments.seed, weights))
    for config in runs:
        directory = arguments.output / config.name
        summary = start.run(config, directory, pick_device("auto"), ALONE, again=True)
        start.show_summary(summary, directory)


if __name__ == "__main__":
    main()
