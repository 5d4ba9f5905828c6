"""Fast adversarial training on CIFAR-10 (Wong, Rice and Kolter, 2020), whole, in plain PyTorch. Read it from top to bottom.

    python examples/fgsm_cifar10.py PATH                              # the paper's 15 epochs: a task for a GPU
    python examples/fgsm_cifar10.py PATH --epochs 3 --limit 100       # two minutes on a CPU: it runs, and learns nothing

PATH is the folder or tar of CIFAR-10's python batches, or of images in train/<class>/ and test/<class>/. `fastrobust` trains
the same weights from the same random numbers (tests/test_examples.py), and adds half precision, CUDA graphs and checkpoints.
"""

import argparse
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

EPSILON = 8 / 255  # the adversary may change every pixel, in [0, 1], by at most this
ALPHA = 10 / 255  # its step in training: 1.25 epsilon
BATCH, MAX_RATE = 128, 0.21
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STEPS, RESTARTS = 50, 10  # of PGD, which judges the result


class Block(nn.Module):
    """Twice BatchNorm, ReLU, convolution; the input is added to the result."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + self.shortcut(x)


class PreActResNet18(nn.Module):
    """Images in [0, 1], N x 3 x 32 x 32, to logits. The normalisation is inside, so that no attack has to know of it."""

    def __init__(self, classes=10):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None])
        self.register_buffer("std", torch.tensor([0.2471, 0.2435, 0.2616])[:, None, None])
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        sizes = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        self.blocks = nn.Sequential(*(Block(*size) for size in sizes), Block(512, 512, 1))
        self.bn, self.linear = nn.BatchNorm2d(512), nn.Linear(512, classes)

    def forward(self, x):
        out = self.blocks(self.conv1((x - self.mean) / self.std))
        return self.linear(F.relu(self.bn(out)).mean((2, 3)))


def into_box(delta, x):
    """The nearest perturbation with x + delta in [0, 1]."""
    return torch.minimum(torch.maximum(delta, -x), 1 - x)


def random_start(x):
    return into_box((torch.rand_like(x) * 2 - 1) * EPSILON, x)


def ascend(model, x, y, delta, alpha):
    """(the logits at x + delta, the next delta): a step up the loss, then back into the ball and the box. The clamps stand
    outside of what is differentiated: a pixel at the edge of the box has a gradient too."""
    point = (x + delta).detach().requires_grad_()
    logits = model(point)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), point)  # of the weights none: a sixth less work
    return logits.detach(), into_box((delta + alpha * gradient.sign()).clamp(-EPSILON, EPSILON), x)


def update(model, optimizer, x, y, rate):
    """The paper's Algorithm 3: one FGSM step from a random start, then one update of the weights on what it found."""
    _, delta = ascend(model, x, y, random_start(x), ALPHA)
    loss = F.cross_entropy(model(x + delta), y)
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def cyclic(progress):
    """The learning rate: from 0 up to MAX_RATE at 2/5 of training, and down to 0."""
    return MAX_RATE * min(progress / 0.4, (1 - progress) / 0.6)


def augment(images):
    """uint8 to [0, 1]; every image is shifted by up to 4 pixels, zeros coming in, and mirrored with probability 1/2."""
    n, device = len(images), images.device
    top, left = torch.randint(9, (2, n, 1), device=device)
    side = torch.arange(32, device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, 31 - side, side)
    padded = F.pad(images, (4, 4, 4, 4)).permute(0, 2, 3, 1)
    which = torch.arange(n, device=device)[:, None, None]
    return padded[which, (top + side)[:, :, None], (left + columns)[:, None]].permute(0, 3, 1, 2).float() / 255


def train(model, images, labels, epochs):
    """All epochs are one stream of images, cut into batches: those left over at the end of an epoch open the next."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)
    order = torch.cat([torch.randperm(len(labels), device=labels.device) for _ in range(epochs)]).split(BATCH)
    for step, index in enumerate(order):
        rate = cyclic((step + 0.5) / len(order))  # in the middle of the step: neither the first nor the last is 0
        loss = update(model, optimizer, augment(images[index]), labels[index], rate)
        if step % 50 == 0:
            print(f"step {step} of {len(order)}  rate {rate:.3f}  loss on adversarial images {loss:.3f}", flush=True)


def survives(model, x, y, delta):
    """PGD, one run: which images are classified correctly at every point of it (bool, N)."""
    good = torch.ones_like(y, dtype=torch.bool)
    for _ in range(STEPS):
        logits, delta = ascend(model, x, y, delta, EPSILON / 4)
        good &= logits.argmax(1) == y
    with torch.no_grad():
        return good & (model(x + delta).argmax(1) == y)


def evaluate(model, images, labels):
    """(clean, robust) accuracy. Each restart attacks only what is still robust."""
    model.eval()
    clean = robust = 0
    for x, y in zip(images.split(250), labels.split(250), strict=True):
        x = x.float() / 255
        with torch.no_grad():
            right = model(x).argmax(1) == y
        clean, x, y = clean + int(right.sum()), x[right], y[right]
        for _ in range(RESTARTS):
            if len(y):
                good = survives(model, x, y, random_start(x))
                x, y = x[good], y[good]
        robust += len(y)
    return clean / len(labels), robust / len(labels)


def files(path):
    """(name, content) of every file of a folder or tar, by name."""
    if path.is_dir():
        return [(str(file), file.read_bytes()) for file in sorted(path.rglob("*")) if file.is_file()]
    with tarfile.open(path) as tar:
        return sorted((member.name, tar.extractfile(member).read()) for member in tar if member.isfile())


def read(path):
    """{"train": (images, labels), "test": …}: uint8 N x 3 x 32 x 32, int64 N."""
    images, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for name, content in files(path):
        *_, split, folder, file = ("", "", *name.split("/"))
        if file.startswith(("data_batch", "test_batch")):  # a pickle can run code: read only files that you trust
            batch = pickle.loads(content, encoding="latin1")
            split = "test" if file == "test_batch" else "train"
            images[split] += list(batch["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels[split] += batch["labels"]
        elif split in images:
            images[split].append(np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))
            labels[split].append(CLASSES.index(folder))
    tensors = {split: torch.from_numpy(np.stack(images[split])).permute(0, 3, 1, 2) for split in images}
    return {split: (tensors[split], torch.tensor(labels[split])) for split in images}


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("path", type=Path, metavar="PATH")
    p.add_argument("--epochs", type=int, default=15)
    p.add_argument("--limit", type=int, help="so many training and so many test images (default: all)")
    arguments = p.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = read(arguments.path)
    for split, (images, labels) in data.items():
        keep = torch.randperm(len(labels))[: arguments.limit]
        data[split] = images[keep].to(device), labels[keep].to(device)
    model = PreActResNet18().to(device, memory_format=torch.channels_last)
    train(model, *data["train"], arguments.epochs)
    clean, robust = evaluate(model, *data["test"])
    print(f"clean {clean:.2%}, robust under PGD-{STEPS}-{RESTARTS} {robust:.2%}")


if __name__ == "__main__":
    main()
