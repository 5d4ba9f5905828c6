"""Your own network and images from Python: train, evaluate, load again.

    python examples/from_python.py

Seconds on one CPU core. The images are drawn here: squares of two sizes, an easy task."""

import torch
from torch import nn

import fastrobust


def squares(count, seed):
    """uint8 images N x 3 x 16 x 16 with a square of 4 or 8 pixels, and which of the two it is."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % 2
    for image, label in zip(images, labels, strict=True):
        side = 4 * (int(label) + 1)
        top, left = torch.randint(0, 16 - side, (2,), generator=generator).tolist()
        image[:, top : top + side, left : left + side] += 120
    return images, labels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = nn.Conv2d(3, 16, 5, 2, 2), nn.Conv2d(16, 32, 5, 2, 2)
        self.body = nn.Sequential(first, nn.BatchNorm2d(16), nn.ReLU(), second, nn.ReLU())
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.body(x).amax((2, 3)))


if __name__ == "__main__":
    torch.manual_seed(0)
    test = squares(100, seed=1)
    run = fastrobust.fit(
        Net(),
        squares(1000, seed=0),
        test=test,
        classes=["small", "large"],
        epsilon=8 / 255,
        lr=0.02,
        epochs=6,
        name="squares",
        resume=True,  # a second call goes on with what is there, or returns it
    )
    print(run)
    print(fastrobust.evaluate(run.model, *test, epsilon=8 / 255, attack="pgd-20-2"))
    again = fastrobust.load(run.directory, model=Net())
    print("the loaded model is the same:", torch.equal(again(test[0] / 255), run.model(test[0] / 255)))
