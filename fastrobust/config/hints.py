"""What a mistyped word was meant to be. Only the standard library is imported here."""

import difflib
import re
from collections.abc import Iterable

ALIKE = 0.65  # the least likeness of a word and what it is taken for; `sdg` and `sgd` have 0.67


def nearest(word: str, known: Iterable[str], alike: float = ALIKE) -> str | None:
    """The known word that `word` most likely stands for, in any capitals, or None. Words that differ in a number are
    different words: cifar100 is not meant to be cifar10."""
    small = {other.lower(): other for other in known if not digits(word) or digits(word) == digits(other)}
    return next((small[near] for near in difflib.get_close_matches(word.lower(), small, n=1, cutoff=alike)), None)


def did_you_mean(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """`; did you mean 'fgsm'?`, or what else is to be said."""
    near = nearest(word, known)
    return f"; did you mean '{near}'?" if near else otherwise


def digits(word: str) -> list[str]:
    """The digits of a word, sorted: 61 may be meant to be 16, 100 is not meant to be 10."""
    return sorted(re.findall(r"\d", word))
