"""The networks that Tjeng et al. (2017) verify: the paper's for MNIST (section 5.1), and the same for CIFAR-10."""

from torch import nn


def mnist_net(channels: int = 1, classes: int = 10, side: int = 28) -> nn.Sequential:
    """Images of side x side pixels -> logits. The second ReLU stands after the flattening, where it means the same and its
    gradient has the memory layout that it needs: before it, on a CPU, that took as long as the convolutions."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(32 * (side // 4) ** 2, 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


def cifar_net(channels: int = 3, classes: int = 10) -> nn.Sequential:
    """32 x 32 images -> logits."""
    return mnist_net(channels, classes, 32)
