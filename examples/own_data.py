"""A data set of your own: grey squares, to be classified by the corner that they are in. Yours reads files at `path`."""

import numpy as np

from fastrobust.config.datasets import Dataset

CORNERS = ("top left", "top right", "bottom left", "bottom right")


def read(split, path):
    """Images, uint8 N x 16 x 16 x 1, and labels, integers N. path: the config's `data.path`, or None."""
    rng = np.random.default_rng({"train": 0, "test": 1}[split])
    labels = np.arange(200 if split == "train" else 80) % 4
    images = rng.integers(0, 100, (len(labels), 16, 16, 1), np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = rng.integers(0, 4, 2) + 8 * np.array(divmod(label, 2))
        image[row : row + 5, column : column + 5] += 120
    return images, labels


SQUARES = Dataset(channels=1, size=16, classes=CORNERS, mean=(0.25,), std=(0.2,), read=read)
