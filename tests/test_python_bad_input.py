"""Images, labels, models and files from a program that cannot be meant: one line says what is wrong, and nothing is left."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from python_runs import TRAIN, Net, fit

import fastrobust
from fastrobust.data import given, sets
from fastrobust.runtime.errors import DataError, FastrobustError


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, train_images=np.zeros((2, 5, 5), np.uint8), train_labels=np.arange(2), classes=["a", "b"])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda f: f.write_bytes(b"PK\3\4"), "is a zip archive, not a whole .npz file"),
        (lambda f: f.write_bytes(bytes(600)), "is not a whole .npz file"),
        (lambda f: f.write_text("images"), 'is a text file that begins "images", not a whole .npz file'),
        (lambda f: f.write_text("<html>"), "is a web page"),
        (lambda f: np.savez(f, x=np.zeros(3)), "holds neither train_images nor test_images: x"),
        (lambda f: np.savez(f, train_images=np.zeros((2, 5, 5), np.float32)), "must be uint8"),
        (lambda f: np.savez(f, train_images=np.zeros((2, 5, 6), np.uint8)), "square"),
        (lambda f: np.savez(f, train_images=np.zeros((2, 5, 5), np.uint8)), "cannot be read: .*train_labels is not a file"),
        (lambda f: f.write_bytes(npz().replace(bytes(50), b"\1" * 50, 1)), "cannot be read: Bad CRC-32"),
    ],
)
def test_files_that_are_no_arrays_are_named(tmp_path, write, says):
    file = tmp_path / "a.npz"
    write(file)
    with pytest.raises(DataError, match=says):
        sets.load("arrays", "train", file)


class Two(Net):
    def forward(self, x):
        return super().forward(x), x


class Probabilities(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Rounded(Net):
    def forward(self, x):
        return super().forward(x).round().detach()


class Refuses:
    def __len__(self):
        return 30

    def __getitem__(self, k):
        if k == 7:
            raise KeyError("gone")
        return TRAIN[0][k], int(TRAIN[1][k])


def changed(value):
    images = TRAIN[0].float() / 255
    images[3, 0, 5, 5] = value
    return images


BAD = {
    "labels from 1": (lambda: (Net(), (TRAIN[0], TRAIN[1] + 1)), "no label is 0: .* subtract 1"),
    "floats to 255": (lambda: (Net(), (TRAIN[0].float(), TRAIN[1])), r"\[0, 1\]; they reach from 0 to .*: divide by 255"),
    "NaN": (lambda: (Net(), (changed(torch.nan), TRAIN[1])), "1 images have pixels that are no finite .* is image 3"),
    "infinite": (lambda: (Net(), (changed(torch.inf), TRAIN[1])), "1 images have pixels that are no finite"),
    "one class": (lambda: (Net(), (TRAIN[0], 0 * TRAIN[1])), "all 600 images are of one class"),
    "a data set that raises": (lambda: (Net(), Refuses()), "item 7 of the data set cannot be read: KeyError"),
    "a model of tuples": (lambda: (Two(), TRAIN), "must give logits, N x 10 for 10 classes; for one image it gives a tuple"),
    "zeros and ones": (lambda: (Net(), (TRAIN[0] // 128, TRAIN[1])), "these are 0 and 1 alone: multiply by 255"),
    "probabilities": (lambda: (Probabilities(), TRAIN), "gives probabilities, and needs to give logits"),
    "a class": (lambda: (Net, TRAIN), r"must be an nn.Module, .* it is the class Net: give Net\("),
    "a function": (lambda: (len, TRAIN), "must be an nn.Module, or the name of a model"),
    "a frozen model": (lambda: (Net().requires_grad_(False), TRAIN), "no parameter of the model requires a gradient"),
    "a function that raises": (
        lambda: ("test_python_bad_input:raises", TRAIN),
        "'test_python_bad_input:raises' raised OSError: no room$",
    ),
}


def raises(channels, classes):
    raise OSError("no room\nat all")


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, case):
    make, says = BAD[case]
    model, data = make()
    with pytest.raises(FastrobustError, match=says) as caught:
        fit(model, tmp_path / "runs", data)
    assert len(str(caught.value).splitlines()) == 1 and list(tmp_path.rglob("*.safetensors")) == []


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_evaluate_names_images_that_are_not_finite(value):
    with pytest.raises(DataError, match="1 images have pixels that are no finite numbers, the first is image 3"):
        fastrobust.evaluate(Net(), changed(value), TRAIN[1], epsilon=0.1)


@pytest.mark.parametrize(
    ("model", "images", "says"),
    [
        (Probabilities(), TRAIN[0], "gives probabilities, and needs to give logits"),
        (Net(), TRAIN[0] // 128, "these are 0 and 1 alone"),
        (Rounded(), TRAIN[0], "no gradient with respect to its images: attack it by square"),
    ],
)
def test_evaluate_refuses_what_would_give_wrong_accuracies(model, images, says):
    with pytest.raises(FastrobustError, match=says):
        fastrobust.evaluate(model, images, TRAIN[1], epsilon=0.1, attack="pgd-1-1")


def test_an_output_that_cannot_be_made_and_a_config_that_is_no_dict_are_told(tmp_path):
    (tmp_path / "file").touch()
    for options, says in (({"output": tmp_path / "file"}, "cannot be made"), ({"config": ["seed=1"]}, "must be a dict")):
        with pytest.raises(FastrobustError, match=says):
            fastrobust.fit(Net(), TRAIN, test=TRAIN, epsilon=0.1, **{"output": tmp_path} | options)
    with pytest.raises(FastrobustError, match="epsilon is an argument of fit"):
        fastrobust.fit(Net(), TRAIN, test=TRAIN, epsilon=0.1, output=tmp_path, config={"epsilon": 0.3})


def test_arrays_with_channels_last_are_the_same_images():
    options = {"epsilon": 0.1, "attack": "pgd-1-1"}
    net, last = Net(), TRAIN[0].permute(0, 2, 3, 1).numpy()
    expected = fastrobust.evaluate(net, *TRAIN, **options)
    assert torch.equal(fastrobust.evaluate(net, last, TRAIN[1], **options).robust, expected.robust)


@pytest.mark.parametrize(("first", "says"), [(0, "all 20 training images are of class 0"), (1, "no label is 0")])
def test_files_of_one_class_or_with_labels_from_1_are_refused(tmp_path, first, says):
    images, labels = np.zeros((20, 8, 8), np.uint8), first * (1 + np.arange(20) % 3)
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels)
    with pytest.raises(DataError, match=says):
        sets.load("arrays", "train", tmp_path / "a.npz")


@pytest.mark.parametrize("mode", ["P", "YCbCr", "RGBA", "CMYK", "LA", "1"])
def test_pictures_of_other_modes_are_read_as_those_of_files_are(mode):
    """A Dataset of Pillow's images: a palette's numbers are no colours."""
    rng = np.random.default_rng(0)
    made = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(4)]
    pictures = [image.convert(mode) for image in made]
    expected = np.stack([np.asarray(picture.convert("L" if mode == "1" else "RGB")) for picture in pictures])
    for data in ([(picture, k % 2) for k, picture in enumerate(pictures)], (pictures, [0, 1, 0, 1])):
        assert np.array_equal(given.read(data).images.squeeze(), expected)


def test_pictures_of_more_than_8_bits_are_not_clipped():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert given.read([(Image.fromarray(values), k) for k in (0, 1)]).images.max() == 255
    with pytest.raises(DataError, match=r"images must be uint8, .* they are uint16"):
        given.read([(Image.fromarray((values * 65535).astype(np.uint16)), k) for k in (0, 1)])
