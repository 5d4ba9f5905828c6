"""Reflected borders, cutout, alternating flips, mixup and cutmix, each against a slow version; and the methods that train on
shares of two labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_runs import STEP_METHODS, augmented, on_noise, run_steps

from fastrobust.config import reading, schema, sections
from fastrobust.data import augment as augmentation
from fastrobust.data.augment import Alternation, augment, cutout, mixed, pad_crop_flip
from fastrobust.data.order import Order, share
from fastrobust.runtime.distributed import World
from fastrobust.runtime.errors import ConfigError
from fastrobust.train import schedules, step

CPU = torch.device("cpu")


def images(n: int, channels: int = 3, height: int = 6, width: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (n, height, width, channels), dtype=torch.uint8, generator=generator)
    return pixels.permute(0, 3, 1, 2)


def channels_last(t: Tensor) -> bool:
    return t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", [1, 3])
def test_a_reflected_border_is_numpys(padding):
    given, seen = images(400), set()
    found = pad_crop_flip(given, padding, flip=True, reflect=True)
    assert channels_last(found)
    for image, crop in zip(given.numpy(), found.numpy(), strict=True):
        whole = np.pad(image, ((0, 0), (padding, padding), (padding, padding)), mode="reflect")
        places = [
            (top, left, mirrored)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            for mirrored in (False, True)
            if (whole[:, top : top + 6, left : left + 5][:, :, :: -1 if mirrored else 1] == crop).all()
        ]
        assert places  # of a symmetric border several may look alike
        seen.add(places[0])
    assert len(seen) == 2 * 3**2 or padding == 3


@pytest.mark.parametrize("side", [1, 2, 3, 9])
def test_cutout_blackens_a_square_around_a_pixel_of_the_image(side, monkeypatch):
    x = images(40).float() / 255
    torch.manual_seed(0)
    draws = [torch.randint(size, (40, 1)) for size in (6, 5)]
    torch.manual_seed(0)
    found = cutout(x, side)
    expected = x.clone()
    for k, (row, column) in enumerate(zip(*(d[:, 0].tolist() for d in draws), strict=True)):
        for i in range(row - side // 2, row - side // 2 + side):
            for j in range(column - side // 2, column - side // 2 + side):
                if 0 <= i < 6 and 0 <= j < 5:
                    expected[k, :, i, j] = 0
    assert torch.equal(found, expected) and channels_last(found)
    settings = sections.Augment(cutout=side)
    torch.manual_seed(0)
    assert torch.equal(augment(images(40), settings, 6), expected)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_with_the_one_before_as_their_labels_are(kind):
    x, y, config = images(7).float() / 255, torch.tensor([0, 1, 2, 3, 1, 2, 0]), sections.Augment(**{kind: 0.7})
    shares = set()
    for seed in range(20):
        torch.manual_seed(seed)
        found, labels = mixed(x, y, 4, config)
        assert channels_last(found)
        part = labels[1, 1].item()  # of the image itself
        shares.add(round(part, 3))
        for k in range(7):
            expected = [0.0] * 4
            expected[y[k]] += part
            expected[y[k - 1]] += 1 - part
            assert labels[k].tolist() == pytest.approx(expected, abs=1e-6)
            if kind == "mixup":
                torch.testing.assert_close(found[k], part * x[k] + (1 - part) * x[k - 1])
        if kind == "cutmix":
            own, other = (found == x).all(1), (found == before(x)).all(1)
            assert (own ^ other).all()
            assert all(torch.equal(mask, other[0]) for mask in other)
            assert 1 - part == pytest.approx(other[0].float().mean().item(), abs=1e-6)
            rows, columns = other[0].any(1).nonzero()[:, 0].tolist(), other[0].any(0).nonzero()[:, 0].tolist()
            for i, j in np.ndindex(6, 5):
                assert other[0, i, j] == (i in rows and j in columns)
            assert rows == list(range(rows[0], rows[0] + len(rows))) if rows else part == 1
    assert len(shares) > 8


def before(x: Tensor) -> Tensor:
    return torch.stack([x[k - 1] for k in range(len(x))])


def test_the_share_is_of_the_beta_distribution():
    """Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1))."""
    torch.manual_seed(0)
    x, y = torch.zeros(2, 1, 1, 1), torch.tensor([0, 1])
    shares = np.array([mixed(x, y, 2, sections.Augment(mixup=0.4))[1][0, 0].item() for _ in range(2000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * 1.8), rel=0.05)


# ---- alternating flips


def test_every_image_is_mirrored_in_every_other_pass():
    """Also where a batch holds the end of a pass and the beginning of the next, and from phase to phase."""
    n, sizes, passes = 23, (5, 8), (3, 2)
    config = on_config(phases=[{"epochs": p, "batch_size": b, "resolution": 8} for p, b in zip(passes, sizes, strict=True)])
    table = schedules.starts(config, n)
    alternation, update = Alternation(torch.tensor(table), n, 0, 0, CPU), 0
    seen: dict[int, list[bool]] = {k: [] for k in range(n)}
    for phase, (count, size) in enumerate(zip(passes, sizes, strict=True)):
        order = Order(n, 0, phase)
        for t in range(-(-count * n // size)):
            index = order.take(*share(t, size, 0, 1))
            mirrored = alternation.mirrored(alternation.starts[update], index)
            halves = []
            for rank in range(2 if size % 2 == 0 else 0):
                mine = Alternation(torch.tensor(table), n, 0, rank, CPU)
                halves.append(mine.mirrored(mine.starts[update], order.take(*share(t, size, rank, 2))))
            assert not halves or torch.equal(torch.cat(halves), mirrored)
            for place, (k, flip) in enumerate(zip(index.tolist(), mirrored.tolist(), strict=True)):
                if t * size + place < count * n:  # the last batch is filled up
                    seen[k].append(flip)
            update += 1
    assert update == len(table)
    assert all(flips == [flips[0] ^ (p % 2 == 1) for p in range(5)] for flips in seen.values())
    assert 5 < sum(flips[0] for flips in seen.values()) < 18


def on_config(**changes) -> schema.Config:
    base = {
        "name": "x",
        "precision": "fp32",
        "epsilon": 0.03,
        "data": {"dataset": "image_folder"},
        "model": {"name": "preact_resnet18_w16"},
        "method": {"name": "fgsm"},
        "optimizer": {"name": "sgd"},
        "schedule": {"name": "cyclic", "max_lr": 0.1},
        "phases": [{"epochs": 2, "batch_size": 16, "resolution": 8}],
    }
    return reading.parse(base | changes, "test")


def test_replays_of_a_batch_begin_where_it_does():
    config = on_config(method={"name": "free", "replays": 2}, phases=[{"epochs": 4, "batch_size": 4, "resolution": 8}])
    assert schedules.starts(config, 6) == [0, 0, 4, 4, 8, 8]


@pytest.mark.parametrize("crop", ["none", "pad"])
def test_steps_alternate(crop, monkeypatch):
    """The images that the method sees over four passes."""
    noise, seen = on_noise(more=augmented(flip="alternate", crop=crop)), {k: [] for k in range(50)}
    monkeypatch.setattr(torch, "randint", lambda high, shape, **options: torch.full(shape, 2 if crop == "pad" else 0))

    def watched(learner, batch, *rest):
        for x, k in zip(batch.x, batch.index.tolist(), strict=True):
            whole = noise.loader.images[k].permute(2, 0, 1) / 255
            assert torch.equal(x, whole) or torch.equal(x, whole.flip(2))
            seen[k].append(torch.equal(x, whole))
        learner.update(batch.x, batch.y)

    monkeypatch.setattr(type(noise.step.method), "step", lambda self, *given: watched(*given))
    for batch in noise.batches(13):
        noise.step(batch)
    assert all(flips[:4] == [flips[0] ^ (p % 2 == 1) for p in range(len(flips[:4]))] for flips in seen.values())
    assert sum(map(len, seen.values())) == 13 * 16


# ---- shares of labels

SOFT = ["standard", "fgsm", "fgsm-previous", "n_fgsm", "free", "fgsm_uap", "trades", "n_aaer", "gradalign", "sora"]


@pytest.mark.parametrize("method", SOFT)
def test_labels_as_shares_train_as_labels_do(method, monkeypatch):
    """One class has the share 1: the same losses, correct answers and weights, to rounding."""
    plain = run_steps(on_noise(method), 2)
    monkeypatch.setattr(step, "mixed", lambda x, y, classes, config: (x, F.one_hot(y, classes).float()))
    soft = run_steps(on_noise(method, more=augmented(mixup=1.0)), 2)
    assert soft.losses == pytest.approx(plain.losses, rel=1e-3)
    assert soft.tensors["sums.seen"] == plain.tensors["sums.seen"]
    assert abs(soft.tensors["sums.correct"] - plain.tensors["sums.correct"]) <= 1
    for name, t in plain.tensors.items():
        if name.startswith("model.") and t.is_floating_point():
            torch.testing.assert_close(soft.tensors[name], t, rtol=1e-2, atol=5e-3)


def test_attack_and_update_climb_the_loss_of_both_labels():
    """The loss is the mean of those of the two labels, weighted by their shares."""
    learner = on_noise().step.learner
    learner.label_smoothing = 0.1
    logits, y = torch.randn(6, 10), torch.tensor([1, 1, 2, 3, 4, 5])
    torch.manual_seed(5)
    _, labels = mixed(torch.rand(6, 1, 2, 2), y, 10, sections.Augment(mixup=1.0))
    share = labels[2, 2]
    expected = share * learner.loss(logits, y) + (1 - share) * learner.loss(logits, y.roll(1))
    torch.testing.assert_close(learner.loss(logits, labels), expected)


@pytest.mark.parametrize("method", sorted(STEP_METHODS.keys() - set(SOFT)))
def test_methods_that_need_one_label_refuse_two(method):
    name = STEP_METHODS[method]["name"]
    with pytest.raises(ConfigError, match=rf"data.augment.cutmix: method {name}.* needs one label for each image"):
        on_noise(method, more=augmented(cutmix=1.0))


def test_awp_takes_what_its_method_takes():
    made = on_config(method={"name": "awp", "of": {"name": "fgsm"}}, data=augmented(mixup=0.2)["data"])
    assert made.data.augment.mixes == "mixup"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"mixup": 1.0, "cutmix": 1.0}, "mixup and cutmix exclude each other"),
        ({"flip": "alternate", "crop": "random_resized"}, "flip: alternate is for crop: none or pad"),
        ({"border": "reflect", "padding": 8}, "padding: 8 pixels cannot be reflected in images of 8"),
        ({"flip": "alternating"}, "flip: 'alternating' is not one of True, False or 'alternate'; did you mean 'alternate'"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys, said):
    with pytest.raises(ConfigError, match=said):
        on_config(data=augmented(**keys)["data"])


def test_images_that_a_loader_has_cropped_are_mixed_too(monkeypatch):
    noise = on_noise()
    monkeypatch.setattr(type(noise.loader), "crops", True)
    config = on_config(data=augmented(crop="random_resized", cutmix=1.0, cutout=8, flip=True)["data"])
    made, seen = step.build(config, noise.loader, CPU), []
    monkeypatch.setattr(type(made.method), "step", lambda self, learner, batch, *rest: seen.append(batch))
    monkeypatch.setattr(augmentation, "random_resized_crop", None)
    made(next(noise.batches(1)))
    assert seen[0].y.shape == (16, 10) and (seen[0].x == 0).float().mean() > 0.2


def test_two_processes_know_their_places():
    noise = on_noise(more=augmented(flip="alternate"))
    config = on_config(data=augmented(flip="alternate")["data"])
    made = [step.build(config, noise.loader, CPU, World(rank, 2)) for rank in range(2)]
    assert [m.alternation.rank for m in made] == [0, 1] and torch.equal(made[0].alternation.first, made[1].alternation.first)
