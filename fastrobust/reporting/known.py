"""What a run directory tells about its model: every accuracy that was measured or proved, and the checks for masked
gradients. The model card and the report page show the same facts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastrobust.attack import autoattack
from fastrobust.attack.threat import NORMS
from fastrobust.config.numbers import ball_in_words, describe
from fastrobust.evaluation import results
from fastrobust.evaluation.results import wilson
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.files import explained
from fastrobust.runtime.run_directory import SUMMARY, WEIGHTS
from fastrobust.verification.store import FOLDER as VERIFICATION

NONE, EXACT = "none", "exact verification"  # in the place of an attack's name
EXACT_NOTE = (
    "Exact verification: a verified image is proved to be classified correctly at every point within epsilon. The interval "
    "counts undecided images as broken for its lower end, and as robust for its upper end."
)


@dataclass(frozen=True)
class Accuracy:
    """So many of `examples` test images are robust: classified correctly at all points that an attack tried, or, for an
    exact verification, proved to be so at every point of the ball. `undecided`: images that ran out of time there.
    `data`: the --data that the images were read from, if any. `norm`: of the ball, `linf` or `l2`."""

    attack: str
    epsilon: float
    robust: int
    examples: int
    undecided: int | None = None
    data: str | None = None
    norm: str = "linf"

    def __post_init__(self):
        counts_fit = 0 <= self.robust <= self.robust + (self.undecided or 0) <= self.examples and self.examples > 0
        radius_fits = self.norm in NORMS and 0 <= self.epsilon <= (1 if self.norm == "linf" else math.inf)
        if not (isinstance(self.attack, str) and radius_fits and counts_fit):
            raise ValueError(f"there is no such result: {self}")

    @property
    def accuracy(self) -> float:
        return self.robust / self.examples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % (Wilson). Undecided images count as broken for its lower end, and as robust for its upper end."""
        low, _ = wilson(self.robust, self.examples)
        _, high = wilson(self.robust + (self.undecided or 0), self.examples)
        return low, high

    def in_words(self) -> str:
        """`43.10%`, or `97.30% verified (973 of 1000; 2 undecided)`."""
        share = f"{self.accuracy:.2%}"
        if self.undecided is None:
            return share
        return f"{share} verified ({self.robust} of {self.examples}; {self.undecided} undecided)"

    def to_dict(self) -> dict[str, Any]:
        row = {"attack": self.attack, "norm": self.norm, "epsilon": self.epsilon, "accuracy": self.accuracy}
        row |= {"interval": list(self.interval), "examples": self.examples}
        return row | {key: value for key in ("undecided", "data") if (value := getattr(self, key)) is not None}


@dataclass(frozen=True)
class Masking:
    """The verdict of the checks for masked gradients (`evaluate --sanity`), and the names of the checks that failed."""

    epsilon: float
    verdict: str
    failed: tuple[str, ...]
    examples: int
    norm: str = "linf"

    def in_words(self) -> str:
        failed = f": {', '.join(self.failed)} failed" if self.failed else ", all passed"
        return f"{self.verdict}{failed}"


@dataclass
class Known:
    """`summary`: what summary.json holds, or {}. `autoattack`: the row of AutoAttack, where all four parts were run, and
    `autoattack_clean` the clean accuracy on its images."""

    summary: dict[str, Any] = field(default_factory=dict)
    accuracies: list[Accuracy] = field(default_factory=list)
    masking: list[Masking] = field(default_factory=list)
    autoattack: Accuracy | None = None
    autoattack_clean: float | None = None

    def add(self, row: Accuracy) -> Accuracy:
        """A row of the accuracies, once."""
        if row not in self.accuracies:
            self.accuracies.append(row)
        return row


def read(run: Path, weights: str | None) -> Known:
    """The facts in a run directory about the weights with this digest. Without one (there are no weights yet), or for a
    path that is no directory, there are fewer. Raises RunError for files that are damaged."""
    known = Known()
    if not run.is_dir():
        return known
    read_summary(known, run / SUMMARY)
    if weights is not None:
        read_evaluations(known, run / results.FOLDER, weights)
        read_verification(known, run, weights)
    return known


def read_summary(known: Known, file: Path) -> None:
    if not file.exists():
        return
    known.summary = read_json(file)
    with damaged(file):
        for e in known.summary.get("evaluations", []):
            n = e["examples"]
            known.add(Accuracy(NONE, 0.0, round(e["clean_accuracy"] * n), n))
            known.add(Accuracy(e["attack"], e["epsilon"], round(e["robust_accuracy"] * n), n, norm=results.norm_of(e)))


def read_evaluations(known: Known, folder: Path, weights: str) -> None:
    """The records of attacks, those of one radius and one set of images together, and the checks for masked gradients."""
    groups: dict[tuple, list[results.Record]] = {}
    for record in results.read_all(folder):
        s = record.settings
        if s["weights"] == weights and record.facts["finished"]:
            groups.setdefault((results.norm_of(s), s["epsilon"], s["examples"], s["data"]), []).append(record)
    trained_in, wanted = results.norm_of(known.summary), known.summary.get("epsilon")
    for (norm, epsilon, n, _), records in sorted(groups.items()):
        clean, data = int(records[0].clean.sum()), records[0].facts.get("data")
        known.add(Accuracy(NONE, 0.0, clean, n, data=data))
        for record in records:
            if bool((record.attacked == record.clean).all()):
                robust = int((record.clean & ~record.broken).sum())
                known.add(Accuracy(record.settings["attack"], epsilon, robust, n, data=data, norm=norm))
        if len(records) > 1:
            name = f"worst case over {', '.join(sorted({r.settings['attack'] for r in records}))}"
            known.add(Accuracy(name, epsilon, int(results.worst_case(records).sum()), n, data=data, norm=norm))
        whole = autoattack_of(records)
        if whole is not None:
            row = known.add(Accuracy("autoattack", epsilon, whole, n, data=data, norm=norm))
            if norm == trained_in and (known.autoattack is None or rank(row, wanted) > rank(known.autoattack, wanted)):
                known.autoattack, known.autoattack_clean = row, clean / n
    for file in sorted(folder.glob("sanity_*.json")):
        found = read_json(file)
        with damaged(file):
            if found["weights"] == weights:
                failed = tuple(map(str, found["failed"]))
                told = float(found["epsilon"]), str(found["verdict"]), failed, int(found["examples"]), results.norm_of(found)
                known.masking.append(Masking(*told))


def rank(row: Accuracy, epsilon: float | None) -> tuple:
    """Of several results of AutoAttack the one to quote: on the run's own test images, at the radius of its summary, on
    the most images, at the largest radius."""
    return row.data is None, row.epsilon == epsilon, row.examples, row.epsilon


def autoattack_of(records: list[results.Record]) -> int | None:
    """How many examples all four parts of AutoAttack leave robust, if each was either broken by one or tried by all."""
    parts = [r for r in records if r.settings["attack"] in autoattack.PARTS]
    robust = results.worst_case(parts) if parts else None
    for name in autoattack.PARTS:
        tried = [r.attacked for r in parts if r.settings["attack"] == name]
        if not any(bool((robust <= t).all()) for t in tried):
            return None
    return int(robust.sum())


def read_verification(known: Known, run: Path, weights: str) -> None:
    """The summaries of exact verifications. Those of version 0.1 have settings.json beside them, which names the weights by
    the SHA-256 of their file."""
    found = []
    for file in run.glob(f"{VERIFICATION}/*/{SUMMARY}"):
        content = read_json(file)
        with damaged(file):
            about = content if "weights" in content else read_json(file.with_name("settings.json"))
            if about.get("weights") == weights or about.get("weights_sha256") == digest_of(run):
                counts = {"robust": content["verified"], "examples": content["examples"], "undecided": content["timeout"]}
                found.append(Accuracy(EXACT, content["epsilon"], **counts, data=content.get("data")))
    for row in sorted(found, key=lambda row: (row.epsilon, row.examples)):
        known.add(row)


def digest_of(run: Path) -> str:
    return hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises RunError."""
    with explained(f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
        raise ValueError("it does not hold an object")
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from None


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """Turns what a file of other content leads to into a RunError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise RunError(f"{path} is damaged: {error!r}") from None


def radius(row: Accuracy) -> str:
    words = describe(row.epsilon) if row.norm == "linf" else ball_in_words(row.epsilon, row.norm)
    return "0" if row.attack == NONE else words
