"""The paper's MNIST network (section 5.1; the architecture of Tjeng et al., 2017)."""

from torch import nn


def mnist_net(channels: int = 1, classes: int = 10) -> nn.Sequential:
    """28 x 28 images -> logits. The second ReLU stands after the flattening, where it means the same and its gradient
    has the memory layout that it needs: before it, on a CPU, that took as long as the convolutions."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(32 * 7 * 7, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )
