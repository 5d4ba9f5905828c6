"""Running any attack, round after round, on the images that are still robust."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastrobust.attack.base import Attack
from fastrobust.attack.threat import Threat
from fastrobust.attack.verdicts import breaks
from fastrobust.data.augment import to_unit
from fastrobust.runtime import half


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
                survived, points = attack.run(x, y, start)
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
