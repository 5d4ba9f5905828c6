"""Running any attack, round after round, on the images that are still robust."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrobust.attack.base import Attack
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import breaks
from fastrobust.data.augment import to_unit
from fastrobust.runtime import half
from fastrobust.runtime.errors import ConfigError


@dataclass(frozen=True)
class Place:
    """How far an attack has come: `batches` of a round are done; `alive` (bool N) were robust when the round began."""

    round: int
    batches: int
    alive: Tensor


def run_rounds(
    attack: Attack,
    images: Tensor,
    labels: Tensor,
    robust: Tensor,
    *,
    threat: Threat | None = None,
    place: Place | None = None,
    found: Tensor | None = None,
    after: Callable[[Place, int, int], None] = lambda place, examples, refused: None,
) -> None:
    """Run all rounds of an attack, each on the examples that are still robust when it begins; `robust` (bool N) is cleared
    in place. With a threat, a success counts only if it also `breaks` the model; without, the attack is believed. `found`
    (float N x C x H x W, on the CPU) takes the points that count, exactly in the ball and the box.

    `place` continues where an earlier call was; `after(place, examples, refused)` is called after each batch.
    """
    for number in range(place.round if place else 0, attack.rounds):
        resumed = place is not None and number == place.round
        alive = place.alive if resumed else robust.clone()
        for batch, (index, start) in enumerate(attack.batches(number, alive)):
            if resumed and batch < place.batches:
                continue
            x, y, refused = to_unit(images[index]), labels[index], 0
            with half.passes(attack.bf16):
                survived, points = checked(attack, x, attack.run(x, y, start))
            broken = (~survived).nonzero()[:, 0]
            if threat is not None and len(broken):
                full = attack.batch_size if attack.fixed else 0
                held = breaks(attack.model, x[broken], y[broken], points[broken], threat, full)
                survived[broken[~held]] = True
                refused = int((~held).sum())
                if found is not None:
                    won = broken[held]
                    found[index[won].cpu()] = threat.nearest(points[won].float(), x[won]).cpu()
            robust[index] = survived
            after(Place(number, batch + 1, alive), len(index), refused)


def checked(attack: Attack, x: Tensor, found: Any) -> tuple[Tensor, Tensor]:
    """What `run` returned for x. Raises ConfigError for what it may not return."""
    parts = tuple(found) if isinstance(found, tuple | list) else (found,)
    wanted = [(torch.Size([len(x)]), True), (x.shape, False)]
    kinds = [(part.shape, part.dtype == torch.bool) for part in parts if isinstance(part, Tensor)]
    if len(parts) == 2 and kinds == wanted:
        return parts
    survived, points = f"bool {len(x)}", f"float {in_words(x.shape)}"
    raise ConfigError(
        f"attack: run of {type(attack).__qualname__} must return (survived, points), {survived} and {points} here; it "
        f"returned {' and '.join(map(form, parts)) or 'an empty tuple'}"
    )


def form(part: Any) -> str:
    """What a value is, in words: `float32 5 x 3 x 32 x 32` or `a list`."""
    if isinstance(part, Tensor):
        return f"{str(part.dtype).removeprefix('torch.')} {in_words(part.shape)}"
    return "None" if part is None else f"a {type(part).__name__}"


def in_words(shape: torch.Size) -> str:
    return " x ".join(map(str, shape)) or "of no dimension"
