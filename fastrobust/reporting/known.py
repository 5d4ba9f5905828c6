"""What a run directory tells about its model: every accuracy that was measured or proved, and the checks for masked
gradients. The model card and the report page show the same facts."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from fastrobust.attack import autoattack
from fastrobust.evaluation import results
from fastrobust.evaluation.answers import alike, answers
from fastrobust.evaluation.results import wilson
from fastrobust.models import Normalized
from fastrobust.reporting import stored
from fastrobust.reporting.stored import Images, InBall, Share, Stored, Summary
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.run_directory import SUMMARY, WEIGHTS
from fastrobust.verification.store import FOLDER as VERIFICATION

OTHER_WEIGHTS = "The run's summary is about other weights than those that lie beside it: its accuracies are left out."
OTHER_CODE = "The run's summary is about other code of the model with these weights: its accuracies are left out."
OTHER_IMAGES = "Not the summary's: these are not the test images that the run was tested on at the end of its training."
NONE, EXACT = "none", "exact verification"  # in the place of an attack's name
EXACT_NOTE = (
    "Exact verification: a verified image is proved to be classified correctly at every point within epsilon. The interval "
    "counts undecided images as broken for its lower end, and as robust for its upper end."
)


@dataclass(frozen=True)
class Accuracy:
    """So many of `examples` test images are robust: classified correctly at all points that an attack tried, or, for an
    exact verification, proved to be so at every point of the ball. `undecided`: images that ran out of time there.
    `data`: the --data that the images were read from, if any. `norm`: of the ball, `linf` or `l2`. `search`: `bf16` where an
    attack's steps were computed in that. `alpha`: the size of its steps, where it has one. `images`: the digest of the test
    images, where it is known. `other`: these are known to be others than the summary's (`Known.others`)."""

    attack: str
    epsilon: float
    robust: int
    examples: int
    undecided: int | None = None
    data: str | None = None
    norm: str = "linf"
    search: str | None = None
    alpha: float | None = None
    images: str | None = None
    other: bool = False

    def __post_init__(self):
        if not 0 <= self.robust <= self.robust + (self.undecided or 0) <= self.examples or not self.examples:
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
        counts = f" verified ({self.robust} of {self.examples}; {self.undecided} undecided)"
        return f"{self.accuracy:.2%}" + ("" if self.undecided is None else counts)

    @property
    def unusual(self) -> str:
        """What an attack's name does not tell: `, alpha 1e-06, steps in bf16`. Steps of epsilon / 4 are usual."""
        usual = self.alpha is None or math.isclose(self.alpha, self.epsilon / 4)
        return ("" if usual else f", alpha {self.alpha:.4g}") + (f", steps in {self.search}" if self.search else "")

    def to_dict(self) -> dict[str, Any]:
        row = {"attack": self.attack, "norm": self.norm, "epsilon": self.epsilon, "accuracy": self.accuracy}
        row |= {"interval": list(self.interval), "examples": self.examples}
        keys = ("undecided", "data", "search", "alpha", "images")
        return row | {key: value for key in keys if (value := getattr(self, key)) is not None}


class Masking(InBall):
    """The verdict of the checks for masked gradients (`evaluate --sanity`), with the names of those that failed or were not
    run."""

    weights: str
    answers: list[float] | None = None
    resolution: int | None = None
    verdict: str
    failed: list[str]
    not_run: tuple[str, ...] = ()
    checks: tuple[dict[str, Any], ...] = ()
    examples: int
    data: str | None = None
    images: str | None = None
    chosen: str | None = None
    other: bool = False

    def in_words(self) -> str:
        """`masked: single step failed`, or `healthy: 7 of 8 checks passed, black box not run`."""
        besides = f", {', '.join(self.not_run)} not run" if self.not_run else ""
        if self.failed:
            return f"{self.verdict}: {', '.join(self.failed)} failed{besides}"
        n = len(self.checks)
        return self.verdict + (f": {n - len(self.not_run)} of {n} checks passed{besides}" if besides else ", all passed")


class Settings(Stored):
    """What an exact verification is about; version 0.1 named the weights by the SHA-256 of their file."""

    weights: str | None = None
    weights_sha256: str | None = None
    answers: list[float] | None = None
    images: str | None = None


class Verification(Settings):
    verified: int
    timeout: int
    examples: Images
    epsilon: Share
    data: str | None = None


@dataclass
class Known:
    """`autoattack`: the row of AutoAttack to quote, where all four parts were run on the run's own test images, and
    `autoattack_clean` the clean accuracy on these. `left_out`: why there is a summary and it does not count."""

    summary: Summary | None = None
    accuracies: list[Accuracy] = field(default_factory=list)
    masking: list[Masking] = field(default_factory=list)
    autoattack: Accuracy | None = None
    autoattack_clean: float | None = None
    left_out: str = ""

    def add(self, row: Accuracy) -> Accuracy:
        """A row of the accuracies, once: of two about the same one may tell an alpha or images that the other does not."""
        for i, one in enumerate(self.accuracies):
            untold = {key: None for key in ("alpha", "images") if None in (getattr(one, key), getattr(row, key))}
            if replace(one, **untold) == replace(row, **untold):
                told = {key: getattr(one, key) or getattr(row, key) for key in untold}
                self.accuracies[i] = replace(one, **told)
                return self.accuracies[i]
        self.accuracies.append(row)
        return row

    def others(self, n: int, data: str | None, images: str | None, whole: str | None) -> bool:
        """Whether n test images are known to be others than the summary's. As many must have the same digest (`images`), and
        so must whole test sets (`whole`). Of other subsets it is not known. Those of a --data are told by its name."""
        s = self.summary
        if s is None or data is not None:
            return False
        own = s.test_images if s.chosen == "all" else None
        return differ(whole, own) or (n == s.evaluations[0].examples and differ(images, s.test_images))

    def which(self, found: Accuracy | Masking) -> str:
        """Which images these are, where their number does not tell: ` of PATH`, `, not the summary's, SHA-256 1f0c2a9b…`."""
        own = self.summary and self.summary.test_images
        told = (found.examples, found.data)
        among = {one.images for one in (*self.accuracies, *self.masking) if (one.examples, one.data) == told}
        unclear = found.images != own and len(among - {None, own}) > 1
        words = f" of {found.data}" if found.data else ", not the summary's" if found.other else ""
        return words + (f", SHA-256 {found.images[:8]}…" if found.images and (found.other or unclear) else "")


def read(run: Path, weights: str | None, model: Normalized | None = None) -> Known:
    """The facts in a run directory about the weights with this digest. Without one (there are no weights yet), or for a
    path that is no directory, there are fewer. Results of other code than the model's are left out. Raises RunError for
    files that are damaged."""
    summary, its_code = stored.read(run / SUMMARY, Summary), code_of(model)
    known = Known(summary)
    if summary and weights and summary.weights_sha256 not in (None, weights):
        known = Known(left_out=OTHER_WEIGHTS)
    elif summary and not its_code(summary.answers, summary.resolution):
        known = Known(left_out=OTHER_CODE)
    for e in known.summary.evaluations if known.summary else []:
        images = known.summary.test_images
        known.add(Accuracy(NONE, 0.0, round(e.clean_accuracy * e.examples), e.examples, images=images))
        found = {"norm": e.norm, "search": "bf16" if e.arithmetic == "bf16" else None, "alpha": e.alpha, "images": images}
        known.add(Accuracy(e.attack, e.epsilon, round(e.robust_accuracy * e.examples), e.examples, **found))
    if weights is not None:
        read_evaluations(known, run / results.FOLDER, weights, its_code)
        read_verification(known, run, weights, lambda told: its_code(told, summary and summary.resolution))
    return known


def differ(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and one != other


def code_of(model: Normalized | None) -> Callable[[Sequence[float] | None, int | None], bool]:
    """Whether what a result tells (the answers of its model, on images this wide) is of this model's code. What does not
    tell is believed."""
    ours = cache(lambda side: answers(model, (len(model.mean), side, side)))
    return lambda told, side: None in (model, told, side) or alike(told, ours(side))


def read_evaluations(known: Known, folder: Path, weights: str, its_code: Callable[..., bool]) -> None:
    """The records of attacks, those of one radius and one set of images together, and the checks for masked gradients."""
    groups: dict[tuple, list[results.Record]] = {}
    for record in results.read_all(folder):
        s, told = record.settings, record.facts.get("answers")
        if s["weights"] == weights and record.facts["finished"] and its_code(told, s.get("resolution")):
            groups.setdefault((results.norm_of(s), s["epsilon"], s["examples"], s["data"]), []).append(record)
    first = known.summary and known.summary.evaluations[0]
    trained_in, wanted = (first.norm, first.epsilon) if first else ("linf", None)
    for (norm, epsilon, n, digest), records in sorted(groups.items()):
        clean, data, chosen = int(records[0].clean.sum()), records[0].facts.get("data"), records[0].facts.get("chosen")
        images = digest if chosen else None  # version 0.1 had another digest, and other rules by which images are chosen
        of = {"data": data, "images": images}
        of["other"] = known.others(n, whole=images if chosen == "all" else None, **of)
        known.add(Accuracy(NONE, 0.0, clean, n, **of))
        for record in records:
            if bool((record.attacked == record.clean).all()):
                robust = int((record.clean & ~record.broken).sum())
                s = record.settings
                about = {"norm": norm, "search": s.get("arithmetic"), "alpha": s.get("alpha")}
                known.add(Accuracy(s["attack"], epsilon, robust, n, **about, **of))
        if len(records) > 1:
            name = f"worst case over {', '.join(sorted({r.settings['attack'] for r in records}))}"
            known.add(Accuracy(name, epsilon, int(results.worst_case(records).sum()), n, norm=norm, **of))
        whole = autoattack_of(records)
        if whole is not None:
            row = known.add(Accuracy("autoattack", epsilon, whole, n, norm=norm, **of))
            better = known.autoattack is None or rank(row, wanted) > rank(known.autoattack, wanted)
            if norm == trained_in and data is None and better:
                known.autoattack, known.autoattack_clean = row, clean / n
    found = [stored.read(file, Masking) for file in sorted(folder.glob("sanity_*.json"))]
    for m in found:
        if m.weights == weights and its_code(m.answers, m.resolution):
            m.other = known.others(m.examples, m.data, m.images, m.images if m.chosen == "all" else None)
            known.masking.append(m)


def rank(row: Accuracy, epsilon: float | None) -> tuple:
    """Of several results of AutoAttack on the run's own test images the one to quote: not on others than its summary's, at
    the radius of that, on the most images, at the largest radius."""
    return not row.other, row.epsilon == epsilon, row.examples, row.epsilon


def autoattack_of(records: list[results.Record]) -> int | None:
    """How many examples all four parts of AutoAttack leave robust, if each was either broken by one or tried by all."""
    parts = [r for r in records if r.settings["attack"] in autoattack.PARTS]
    robust = results.worst_case(parts) if parts else None
    for name in autoattack.PARTS:
        tried = [r.attacked for r in parts if r.settings["attack"] == name]
        if not any(bool((robust <= t).all()) for t in tried):
            return None
    return int(robust.sum())


def read_verification(known: Known, run: Path, weights: str, its_code: Callable[..., bool]) -> None:
    """The summaries of exact verifications. settings.json beside them tells the code, and for version 0.1 the weights."""
    found = []
    for file in run.glob(f"{VERIFICATION}/*/{SUMMARY}"):
        summary = stored.read(file, Verification)
        try:
            counts = (summary.verified, summary.examples, summary.timeout)
            row = Accuracy(EXACT, summary.epsilon, *counts, data=summary.data, images=summary.images)
        except ValueError as error:
            raise RunError(f"{file} is damaged: {error}") from None
        settings = stored.read(file.with_name("settings.json"), Settings) or Settings()
        about = summary if summary.weights else settings
        of_file = about.weights_sha256 and about.weights_sha256 == hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest()
        if (about.weights == weights or of_file) and its_code(settings.answers):
            found.append(replace(row, other=known.others(row.examples, row.data, row.images, settings.images)))
    for row in sorted(found, key=lambda row: (row.epsilon, row.examples)):
        known.add(row)
