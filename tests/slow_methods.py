"""The newer methods beside the same written out from their papers: a small network, its batches, and plain SGD."""

import torch
from method_steps import section
from small_learner import make_batches, make_model, sgd
from torch import Tensor

from fastrobust.attack.threat import Threat
from fastrobust.train.learner import Learner
from fastrobust.train.methods.base import Inputs, Shapes

EPSILON, LR, N, CLASSES, EXAMPLES = 0.1, 0.1, 8, 4, 20
EPOCHS = [0.1, 0.6, 1.1, 1.6, 2.1, 2.6, 3.1, 3.6]  # when the updates take place: a run of 4 epochs


def batches(count: int) -> list[Inputs]:
    """The images' numbers go round: those of a batch come back in the third after it; one is twice in its batch."""
    made = []
    for k, (x, y) in enumerate(make_batches(count, N)):
        index = torch.arange(k * N, (k + 1) * N) % EXAMPLES
        index[5] = index[2]
        made.append(Inputs((x * 1.4 - 0.2).clamp(0, 1), y, index))
    return made


class Run:
    """A method that trains the small network."""

    def __init__(self, name: str, epsilon: float = EPSILON, **keys):
        self.model, self.method, self.threat = make_model(), section(name, epsilon, **keys), Threat(epsilon)
        rates = {"epoch_table": torch.tensor(EPOCHS), "batchnorm_in_attack": self.method.batchnorm_in_attack}
        self.learner = Learner(self.model, sgd(), torch.full((len(EPOCHS),), LR), **rates)
        self.state = self.method.state(Shapes((N, 1, 6, 6), CLASSES, EXAMPLES, torch.device("cpu")))
        self.first = {name: t.clone() for name, t in self.state.items()}

    def steps(self, count: int, scale: float = 1.0):
        torch.manual_seed(5)
        for batch in batches(count):
            self.method.step(self.learner, batch, self.threat, scale, self.state)
        return self


class Slow:
    """The same network, and plain SGD."""

    def __init__(self):
        self.model = make_model()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)
        torch.manual_seed(5)

    def update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def gradient(self, x: Tensor, loss_of, **options) -> tuple[Tensor, Tensor]:
        """(of the loss at x, the logits there)"""
        x = x.clone().requires_grad_()
        logits = self.model(x)
        loss_of(logits).backward(retain_graph=True, **options)
        gradient = x.grad.clone()
        self.optimizer.zero_grad()
        return gradient, logits


def agree(run: Run, slow: Slow) -> None:
    assert not torch.equal(run.model[4].weight, make_model()[4].weight)
    for (name, a), b in zip(run.model.state_dict().items(), slow.model.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with probabilities, the mean over the examples."""
    return -sum((t * z.log_softmax(0)).sum() for z, t in zip(logits, targets, strict=True)) / len(logits)


def targets(y: Tensor, label: float) -> Tensor:
    """`label` for the label, and the others have the rest."""
    rows = torch.full((len(y), CLASSES), (1 - label) / (CLASSES - 1))
    for row, k in zip(rows, y.tolist(), strict=True):
        row[k] = label
    return rows


def smooth(logits: Tensor, y: Tensor, amount: float = 0.4) -> Tensor:
    return entropy(logits, targets(y, 1 - amount + amount / CLASSES))


def ball(d: Tensor, epsilon: float = EPSILON) -> Tensor:
    return torch.clamp(d, -epsilon, epsilon)


def uniform(x: Tensor, radius: float) -> Tensor:
    return (2 * torch.rand_like(x) - 1) * radius
