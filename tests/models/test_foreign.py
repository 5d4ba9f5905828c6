"""Tests of fastrobust.models.foreign: weights that other programs wrote, in all the wrappings that are in use."""

import argparse
import gzip
import io
import json
import lzma
import pickle
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastrobust import models
from fastrobust.models import foreign, weights
from fastrobust.runtime import files
from fastrobust.runtime.errors import ConfigError, RunError


def network(classes: int = 10, seed: int = 0):
    torch.manual_seed(seed)
    return models.create("mnist_net", channels=1, classes=classes, mean=(0.2,), std=(0.5,))


TEN = tuple("0123456789")
THEIRS = network(seed=1).network.state_dict()
CONSTANTS = {"mu": torch.full((1, 1, 1, 1), 0.2), "sigma": torch.full((1, 1, 1, 1), 0.5)}
WRAPPINGS = {
    "plain": THEIRS,
    "state_dict": {"epoch": 3, "optimizer": {"state": {}}, "state_dict": THEIRS},
    "data parallel": {"state_dict": {f"module.{k}": v for k, v in THEIRS.items()}},
    "compiled": {"model": {f"_orig_mod.{k}": v for k, v in THEIRS.items()}},
    "all at once": {"net": {f"module._orig_mod.model.{k}": v for k, v in THEIRS.items()}},
    "with a normalisation": {f"module.model.{k}": v for k, v in THEIRS.items()}
    | {f"module.normalize.{k}": v for k, v in CONSTANTS.items()},
    "a sequence": {f"1.{k}": v for k, v in THEIRS.items()} | {"0.mean": CONSTANTS["mu"], "0.std": CONSTANTS["sigma"]},
    "options of a command line": {"args": argparse.Namespace(lr=0.1), "state_dict": THEIRS},
    "NumPy's numbers": {"best_acc1": np.float64(3.2), "epoch": np.int64(3), "last": np.bool_(True), "state_dict": THEIRS},
    "averaged weights beside live ones": {"state_dict": network(seed=7).network.state_dict(), "ema": THEIRS},
    "half precision": {k: v.half() for k, v in THEIRS.items()},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_weights_are_found_in_every_wrapping(tmp_path, wrapping):
    file, model = tmp_path / "theirs.pt", network()
    torch.save(WRAPPINGS[wrapping], file)
    foreign.load_into(model, file, TEN)
    for name, tensor in model.network.state_dict().items():
        torch.testing.assert_close(tensor, THEIRS[name], rtol=1e-3, atol=1e-3 if wrapping == "half precision" else 0)


def test_a_safetensors_file_and_a_run_are_read(tmp_path):
    save_file(THEIRS, tmp_path / "model.safetensors")
    for place in (tmp_path, tmp_path / "model.safetensors"):
        model = network()
        assert "8 tensors" in foreign.load_into(model, place, TEN)
        assert torch.equal(model.network.state_dict()["0.weight"], THEIRS["0.weight"])


def test_the_files_normalisation_must_be_the_models(tmp_path):
    torch.save(THEIRS | {"mean": torch.tensor([0.1307]), "std": torch.tensor([0.3081])}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"set model.mean to \[0.1307\]"):
        foreign.load_into(network(), tmp_path / "a.pt", TEN)


def test_a_head_for_other_classes_is_replaced_only_where_asked(tmp_path):
    torch.save(THEIRS, tmp_path / "a.pt")
    model = network(classes=3)
    before = {name: t.clone() for name, t in model.network.state_dict().items()}
    assert "a new head, 7.weight, 7.bias" in foreign.load_into(model, tmp_path / "a.pt", tuple("abc"))
    after = model.network.state_dict()
    assert torch.equal(after["7.weight"], before["7.weight"]) and torch.equal(after["0.weight"], THEIRS["0.weight"])
    with pytest.raises(ConfigError, match=r"7.weight: the file has 10 x 100, the model 3 x 100"):
        foreign.fit(model, THEIRS, "they")


def test_classes_of_a_run_are_matched_by_name(tmp_path):
    """As many classes need not be the same ones: the rows of the head would stand for others without a word."""
    names = tuple("abcdefghij")
    metadata = {"classes": json.dumps(names)}
    save_file(THEIRS, tmp_path / "model.safetensors", metadata)
    model, x = network(), torch.rand(5, 1, 28, 28)
    assert "head" not in foreign.load_into(model, tmp_path, names)
    logits = model(x)
    other = network(seed=3)
    assert "; the rows of the head in the order of the classes here" in foreign.load_into(other, tmp_path, names[::-1])
    torch.testing.assert_close(other(x), logits.flip(1))
    renamed = network(seed=4)
    before = renamed.network.state_dict()["7.weight"].clone()
    assert "; a new head, 7.bias, 7.weight" in foreign.load_into(renamed, tmp_path, ("z", *names[1:]))
    after = renamed.network.state_dict()
    assert torch.equal(after["7.weight"], before) and torch.equal(after["5.weight"], THEIRS["5.weight"])


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_numbers_of_numpy_1_and_2_are_read(tmp_path, module):
    torch.save({"best": np.float32(3.2), "state_dict": THEIRS}, tmp_path / "a.pt")
    other = tmp_path / "other.pt"
    with zipfile.ZipFile(tmp_path / "a.pt") as theirs, zipfile.ZipFile(other, "w") as file:
        for name in theirs.namelist():
            file.writestr(name, re.sub(rb"numpy\._?core(?=\.multiarray\nscalar)", module, theirs.read(name)))
    with zipfile.ZipFile(other) as file:
        assert module + b".multiarray\nscalar" in file.read("a/data.pkl")
    assert foreign.read(other)[0].keys() == THEIRS.keys()


class Harmful:
    def __init__(self, call, *of):
        self.call, self.of = call, of

    def __reduce__(self):
        return self.call, self.of


@pytest.mark.parametrize("call", [np.load, np.fromfile, np.array, np.ndarray.tofile, np.lib.format.open_memmap])
def test_nothing_else_of_numpy_is_called(tmp_path, call):
    torch.save({"best": Harmful(call, str(tmp_path / "file")), "state_dict": THEIRS}, tmp_path / "a.pt")
    with pytest.raises(RunError, match="holds Python objects, which could run code when read"):
        foreign.read(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({k: v for k, v in THEIRS.items() if k != "7.bias"}, "7.bias 10: not in the file"),
        (THEIRS | {"extra.weight": torch.zeros(3, 3)}, "extra.weight 3 x 3: not in the model"),
        (
            {k: v[:1] if k == "2.weight" else v for k, v in THEIRS.items()},
            "2.weight: the file has 1 x 16 x 4 x 4, the model",
        ),
        (THEIRS | {"7.bias": torch.full((10,), float("nan"))}, "7.bias holds infinite numbers or NaN"),
        (THEIRS | {f"module.{k}": v for k, v in THEIRS.items()}, "module.0.weight .* not in the model"),
    ],
)
def test_what_does_not_fit_is_listed(tmp_path, content, says):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=says):
        foreign.load_into(network(), tmp_path / "a.pt", TEN)


def test_of_much_that_does_not_fit_each_kind_is_listed(tmp_path):
    """A file of another network: the names on both sides, or the reader cannot tell what is to be renamed."""
    torch.save({f"their_{k}": v for k, v in THEIRS.items()}, tmp_path / "a.pt")
    with pytest.raises(ConfigError) as error:
        foreign.load_into(network(), tmp_path / "a.pt", TEN)
    _, *lines = str(error.value).split("\n  ")
    count = len(THEIRS) - 3
    assert [line.rpartition(": ")[2] for line in lines] == [
        *["not in the file"] * 3, f"and {count} more", *["not in the model"] * 3, f"and {count} more",
    ]  # fmt: skip
    assert lines[0].startswith("0.weight 16 x 1 x 4 x 4: ") and lines[4].startswith("their_0.weight 16 x 1 x 4 x 4: ")


class Whole(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (lambda f: torch.save(Whole(2, 2), f), r"holds Python objects.*torch.save\(model.state_dict\(\), FILE\)"),
        (lambda f: f.write_text("<!DOCTYPE html><html>"), "is a web page"),
        (lambda f: f.write_bytes(b""), "is empty"),
        (lambda f: torch.save([1, 2], f), "holds no state dict.* but a list"),
        (lambda f: torch.save({"epoch": 3, "optimizer": {}}, f), "holds no state dict.*it holds epoch, optimizer"),
        (lambda f: f.write_bytes(b"PK\x03\x04 not a zip"), "or damaged: perhaps it was cut short$"),
        (lambda f: None, "there is no weights file"),
    ],
)
def test_what_is_no_file_of_weights_is_named(tmp_path, write, says):
    write(tmp_path / "a.pt")
    with pytest.raises(RunError, match=says):
        foreign.read(tmp_path / "a.pt")


def test_a_file_cannot_run_code(tmp_path):
    class Harm:
        def __reduce__(self):
            return (open, (str(tmp_path / "harm"), "w"))

    torch.save({"state_dict": Harm()}, tmp_path / "a.pt")
    with pytest.raises(RunError, match="could run code"):
        foreign.read(tmp_path / "a.pt")
    assert not (tmp_path / "harm").exists()


def saved(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"1")
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("GIF8.txt"))
    return buffer.getvalue()


PICTURE = Image.new("RGB", (8, 8))
NO_WEIGHTS = {  # whole files that are no weights
    "a PNG picture": saved(lambda f: PICTURE.save(f, "PNG")),
    "a JPEG picture": saved(lambda f: PICTURE.save(f, "JPEG")),
    "a TIFF picture": saved(lambda f: PICTURE.save(f, "TIFF")),
    "a WEBP picture": saved(lambda f: PICTURE.save(f, "WEBP")),
    "a JPEG 2000 picture": saved(lambda f: PICTURE.save(f, "JPEG2000")),
    "an EPS picture": saved(lambda f: PICTURE.save(f, "EPS")),
    "an AVIF picture": b"\0\0\0\x1cftypavif" + bytes(20),
    "a HEIC picture": b"\0\0\0\x18ftypheic" + bytes(20),
    "an array of NumPy": saved(lambda f: np.save(f, np.zeros(3))),
    "a file of NumPy's arrays": saved(lambda f: np.savez(f, a=np.zeros(3))),
    "a tar archive": tar(),
    "a 7z archive": b"7z\xbc\xaf\x27\x1c\0\4" + bytes(30),
    "a file compressed by gzip": gzip.compress(b"1"),
    "a file compressed by xz": lzma.compress(b"1"),
    "a file compressed by zstd": b"\x28\xb5\x2f\xfd\x04\x00\x09\x00\x00a",
    "an ONNX network": b"\x08\x0a\x12\x07pytorch\x1a\x05" + bytes(30),
    'a text file that begins "Entry not found"': b"Entry not found",
    'a text file that begins "{"error": "Repository not found"}"': b'{"error": "Repository not found"}\n',
    'a text file that begins "name: größe"': "name: größe\nepsilon: 0.1\n".encode() * 40,
    "a TorchScript program": zipped("a/data.pkl", "a/code/a.py", "a/constants.pkl"),
    "a zip archive": zipped("train/cat/1.png"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weights_is_called_what_it_is(tmp_path, kind):
    """By `evaluate FILE` and, with --model, as weights of another program: neither damaged nor a danger."""
    file = tmp_path / "weights.pt"
    file.write_bytes(NO_WEIGHTS[kind])
    for read, wanted in (
        (weights.read_weights, "weights that fastrobust wrote"),
        (foreign.read, "weights: a file of torch"),
    ):
        with pytest.raises(RunError) as caught:
            read(file)
        assert f"{file} is {kind}, not {wanted}" in str(caught.value)


@pytest.mark.filterwarnings("ignore:TypedStorage")
def test_a_file_of_weights_is_never_taken_for_something_else(tmp_path):
    """safetensors begins with the length of its header, any bytes: those of other files among them."""
    for length in (*range(2, 1 << 16, 7), int.from_bytes(b"\xff\x0a", "little"), int.from_bytes(b"\x08\x0a\x12", "little")):
        assert files.kind_of(length.to_bytes(8, "little") + b'{"__metadata__":' + b" " * 500) == files.SAFETENSORS
    for old in (True, False):
        torch.save(THEIRS, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        assert (
            files.kind_of_file(tmp_path / "a.pt") == files.TORCH
            and foreign.read(tmp_path / "a.pt")[0].keys() == THEIRS.keys()
        )
        (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-40])
        with pytest.raises(RunError, match=r"a\.pt is not a file of weights, or damaged: "):
            foreign.read(tmp_path / "a.pt")
    for protocol in range(1, 6):
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(THEIRS, protocol))
        with pytest.raises(RunError, match="a.pkl holds Python objects" if protocol > 1 else "a.pkl"):
            foreign.read(tmp_path / "a.pkl")
