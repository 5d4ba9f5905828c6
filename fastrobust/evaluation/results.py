"""What attacks did to each image of a test set: kept beside the run, merged over attacks, and given with an interval.

    RUN/evaluations/pgd-50-10_epsilon-0.3_1f0c2a9b7d3e.safetensors

holds bool tensors of one element per test image (`clean`: classified correctly; `attacked`: handed to this attack;
`broken`: shown not to be robust by it) and, in the header's `facts`, what was run on what, as JSON.
"""

import hashlib
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastrobust.attack.rounds import Place
from fastrobust.data.sets import ImageSet
from fastrobust.runtime.errors import FastrobustError, RunError, first_line
from fastrobust.runtime.files import explained, write_atomically

FOLDER = "evaluations"
Z = 1.959963984540054  # the standard normal's 97.5 % quantile


def wilson(successes: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of a share (Wilson, 1927): what accuracies of the whole population this sample of n
    images does not speak against. It knows nothing of seeds or of attacks that were not run."""
    share, z2 = successes / n, Z * Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return (0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half)


@dataclass
class Record:
    """One attack on one model, data set and radius. `facts["settings"]` says all that its verdicts depend on;
    `place` is where an unfinished attack goes on."""

    facts: dict[str, Any]
    clean: Tensor
    attacked: Tensor
    broken: Tensor
    place: Place | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return self.facts["settings"]

    def path(self, folder: Path) -> Path:
        s = self.settings
        key = hashlib.sha256(json.dumps(s, sort_keys=True).encode() + self.attacked.numpy().tobytes()).hexdigest()
        norm = "" if norm_of(s) == "linf" else f"{norm_of(s)}-"
        return folder / f"{s['attack']}_{norm}epsilon-{s['epsilon']:.6g}_{key[:12]}.safetensors"

    def save(self, folder: Path) -> None:
        tensors = {"clean": self.clean, "attacked": self.attacked, "broken": self.broken}
        facts = dict(self.facts)
        if self.place is not None:
            tensors["alive"] = self.place.alive
            facts["place"] = [self.place.round, self.place.batches]
        content = save({name: t.contiguous() for name, t in tensors.items()}, {"facts": json.dumps(facts)})
        write_atomically(self.path(folder), lambda file: file.write(content))


def keeping(path: Path) -> Path | None:
    """The folder where results are kept, made if need be; None (said once) where there can be none."""
    if not path.is_dir():
        return None
    try:
        with explained(f"{path} cannot be written to"):
            (path / FOLDER).mkdir(exist_ok=True)
            if not os.access(path / FOLDER, os.W_OK):
                raise PermissionError(13, "permission denied")
    except FastrobustError as error:
        print(f"warning: {error}; the results are not kept", file=sys.stderr)
        return None
    return path / FOLDER


def read(path: Path) -> Record:
    """Raises RunError for a file that is damaged or was not written by `Record.save`."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        place = Place(*facts.pop("place"), tensors.pop("alive")) if "alive" in tensors else None
        record = Record(facts, **tensors, place=place)
        sizes = {len(t) for t in tensors.values()}
        if sizes != {record.settings["examples"]} or any(t.dtype != torch.bool for t in tensors.values()):
            raise ValueError("its tensors are not of one bool per example")
        return record
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{path} is damaged: delete it, and the attack is run again ({first_line(error)})") from None


def read_all(folder: Path) -> list[Record]:
    """All records in a folder, by name; none if it is not there. RunError."""
    return [read(path) for path in sorted(folder.glob("*.safetensors"))]


def norm_of(settings: dict[str, Any]) -> str:
    """The norm of a record's ball: L-infinity unless it says another."""
    return settings.get("norm", "linf")


def stored(folder: Path, weights: str, data: str, epsilon: float, norm: str = "linf") -> list[Record]:
    """The records in a folder that are about these weights, this data, this radius and norm. RunError."""
    wanted = {"weights": weights, "data": data, "epsilon": epsilon}
    return [r for r in read_all(folder) if wanted.items() <= r.settings.items() and norm_of(r.settings) == norm]


def take_over(folder: Path, weights: str, data: ImageSet) -> None:
    """Give the records of version 0.1 about these weights and images the digest that the images have now: finished attacks
    are not run again, unfinished ones go on, and the worst case counts them. RunError."""
    now = data.checksum()
    paths = {path: read(path) for path in sorted(folder.glob("*.safetensors"))}
    others = {path: r for path, r in paths.items() if r.settings["weights"] == weights and r.settings["data"] != now}
    then = digest_of_version_0_1(data) if others else None
    for path, record in others.items():
        if record.settings["data"] == then:
            record.settings["data"] = now
            record.save(folder)
            path.unlink()


def digest_of_version_0_1(data: ImageSet) -> str:
    """What told the images of a record before they had one digest, `ImageSet.checksum`."""
    digest = hashlib.sha256(str(tuple(data.images.shape)).encode())
    for image in data.images:
        digest.update(image.contiguous().numpy())
    digest.update(data.labels.numpy())
    return digest.hexdigest()


def worst_case(records: list[Record]) -> Tensor:
    """Which examples (bool, N) every record leaves robust: classified correctly, and broken by no attack. The records are
    of one model, data set, radius and norm. ValueError if they are not."""
    about = {(*(r.settings[key] for key in ("weights", "data", "epsilon")), norm_of(r.settings)) for r in records}
    if len(about) != 1:
        raise ValueError(f"records of {len(about)} different models, data sets, radii or norms cannot be merged")
    robust = records[0].clean.clone()
    for record in records:
        robust &= record.clean & ~record.broken
    return robust
