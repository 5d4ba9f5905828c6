"""A training method of your own: FGSM that starts where it ended for the same image in the epoch before."""

import torch

from fastrobust.config.fields import Pixels
from fastrobust.train.methods.base import Attacked


class Remembered(Attacked):
    alpha: Pixels | None = None  # default 1.25 epsilon

    def resolve(self, epsilon):
        self.alpha = 1.25 * epsilon if self.alpha is None else self.alpha

    def state(self, shapes):
        """A perturbation for every training image. It does not move with a crop or a flip: train without them."""
        return {"delta": torch.zeros(shapes.examples, *shapes.batch[1:], device=shapes.device)}

    def step(self, learner, batch, threat, scale, state):
        threat, alpha = threat.scaled(scale), self.alpha * scale
        delta = threat.project(state["delta"][batch.index], batch.x)
        gradient, _ = learner.input_gradient(batch.x + delta, batch.y)
        delta = threat.project(threat.step(delta, gradient, alpha), batch.x)
        learner.update(batch.x + delta, batch.y)
        state["delta"][batch.index] = delta
