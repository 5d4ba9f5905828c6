"""Tests of the look at image files before a run: bad ones, and grey ones."""

import io
import os

import numpy as np
import pytest
import torch
from conftest import photo, write_photos
from data_files import image_set, noise_png, png, prepare, tar_bytes, write_files
from loader_batches import CPU, config_for
from PIL import Image
from prepared_files import write

from fastrobust.config import reading
from fastrobust.data import checking, formats, loaders, sets
from fastrobust.data.held_out import Choice
from fastrobust.data.loaders.base import luma
from fastrobust.runtime.errors import DataError


def encoded(form: str, width: int = 90, **options) -> bytes:
    buffer = io.BytesIO()
    photo(1, width, 70).save(buffer, form, **options)
    return buffer.getvalue()


def member(content: bytes, where: str = "x") -> formats.Member:
    return formats.Member(where, where, lambda: content)


def test_the_ends_of_a_file_are_read_wherever_it_lies(tmp_path):
    content = {"train/a/long": bytes(range(256)) * 40, "train/a/short": b"tiny"}
    write_files(tmp_path / "folder", content)
    (tmp_path / "a.tar").write_bytes(tar_bytes(content))
    for members in (formats.folder_members(tmp_path / "folder"), formats.archive_members(tmp_path / "a.tar")):
        for found in members:
            whole = content[found.name]
            assert found.read() == whole and found.ends() == (whole[:4096], whole[-64:])


def test_pixels_of_more_than_8_bits_are_found_by_a_quick_look():
    with pytest.raises(DataError, match="more than 8 bits"):
        checking.quick(member(png(np.zeros((70, 70), np.uint16))))


def test_quick_and_thorough_looks(monkeypatch):
    exif = Image.Exif()
    exif[0x010E] = "x" * 9000  # the header is longer than what is read of it
    jpeg = encoded("JPEG", quality=95)
    good = [
        jpeg,
        jpeg + bytes(200),
        encoded("JPEG", exif=exif),
        noise_png(),
        encoded("WEBP"),
        encoded("BMP"),
        encoded("GIF"),
    ]
    cut = [jpeg[:-300], noise_png()[:-60], encoded("WEBP")[:-50], b"no image", b"", encoded("BMP")[:-900]]
    spoilt = noise_png(80)
    spoilt = spoilt[:9000] + bytes([spoilt[9000] ^ 255]) + spoilt[9001:]
    members = [member(content) for content in (*good, *cut, spoilt)]
    bad = list(range(len(good), len(members)))
    assert list(checking.unusable(members, thorough=False)) == bad  # few images: all are decoded
    monkeypatch.setattr(checking, "WHOLE", 0)
    assert list(checking.unusable(members, thorough=False)) == bad[:-1]  # damage in the middle is not looked for
    assert list(checking.unusable(members, thorough=True)) == bad
    with pytest.raises(formats.Unusable, match="not a usable image"):
        checking.left_out(members, skip=False)
    assert list(checking.left_out(members, skip=True)) == bad
    with pytest.raises(formats.Unusable):
        checking.left_out([member(b"x")], skip=True)


def test_a_quick_look_reads_little(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "WHOLE", 0)
    (tmp_path / "a.jpg").write_bytes(encoded("JPEG", quality=95))
    (found,) = formats.folder_members(tmp_path)
    monkeypatch.setattr(formats, "open_upright", lambda member: pytest.fail("it was decoded"))
    assert checking.unusable([found], thorough=False) == {}


@pytest.fixture
def spoilt(tmp_path):
    """24 training and 6 test photos; of two training images and a test image a part is left."""
    write_photos(tmp_path, 24, 6)
    files = [tmp_path / name for name in ("train/a/003.jpg", "train/c/011.jpg", "val/b/001.jpg")]
    for file in files:
        os.truncate(file, 300)
    return tmp_path, files


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_bad_images_are_left_out_where_that_is_asked_for(spoilt, loader, capsys):
    folder, files = spoilt
    phases = [{"epochs": 1, "batch_size": 6, "resolution": 32, "resize": size} for size in (32, 64)]
    options = {"loader": loader, "phases": phases, "data": {"skip_corrupt": True, "workers": 1}}
    config = loaders.resolve(config_for(folder, **options), CPU)
    opened = loaders.Phases(config, CPU)
    for index in range(2):
        found = opened.enter(index)
        assert len(found) == 22 and len(found.names) == 22 and not {"train/a/003.jpg", "train/c/011.jpg"} & set(found.names)
        assert [name.split("/")[1] for name in found.names] == [found.classes[label] for label in found.labels]
        assert len(found.skipped) == 2 and all(str(file) in line for file, line in zip(files, found.skipped, strict=False))
        assert sorted(i for batch in found.batches(0, 0, 11, 0, 2) for i in batch.index.tolist()) == list(range(22))
    assert len(loaders.test_set(config, None).labels) == 5
    out = capsys.readouterr().out
    assert "2 train images are left out" in out and "1 test images are left out" in out and str(files[2]) in out
    opened.close()


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_else_all_of_them_are_named_before_the_training(spoilt, loader):
    folder, files = spoilt
    options = {"loader": loader, "data": {"workers": 1}}
    config = loaders.resolve(config_for(folder, **options), CPU)
    with pytest.raises(formats.Unusable) as caught:
        loaders.Phases(config, CPU).enter(0)
    assert all(str(file) in str(caught.value) for file in files[:2]) and len(caught.value.errors) == 2


# ---- grey


def grey_folder(root, modes):
    files = {}
    for i, mode in enumerate(modes):
        buffer = io.BytesIO()
        photo(i, 40, 40).convert(mode).save(buffer, "PNG")
        files |= {f"{split}/{name}/{i}.png": buffer.getvalue() for split in ("train", "test") for name in "ab"}
    return write_files(root, files)


def resolved(folder, **changes):
    return loaders.resolve(config_for(folder, **({"loader": "resident"} | changes)), CPU)


def test_a_grey_folder_has_one_channel(tmp_path, capsys):
    config = resolved(grey_folder(tmp_path, ["L", "LA", "1", "L"]))
    assert "grey, 1 channel (all 16 files looked at" in capsys.readouterr().out
    assert config.facts.channels == config.data.channels == 1
    assert config.model.mean == (0.449,) and config.model.std == (0.226,)
    loader, test = loaders.Phases(config, CPU).enter(0), loaders.test_set(config, None)
    assert loader.channels == 1 and test.images.shape == (8, 1, 32, 32)
    colours = sets.load("image_folder", "test", tmp_path, resolution=32)
    assert torch.equal(colours.images[:, :1], test.images) and torch.equal(colours.images[:, 1:2], test.images)
    torch_loader = loaders.Phases(resolved(tmp_path, loader="torch", data={"workers": 1}), CPU).enter(0)
    assert next(iter(torch_loader.batches(0, 0, 4, 0, 1))).images.shape == (4, 1, 32, 32)
    assert loaders.resolve(reading.parse(config.to_dict(), "stored"), CPU) == config
    fresh = config_for(tmp_path, loader="resident")
    assert reading.differences(config, fresh) == []


def test_what_asks_for_three_channels_gets_them(tmp_path, capsys):
    folder = grey_folder(tmp_path, ["L"] * 4)
    asked = [
        {"data": {"channels": 3}},
        {"model": {"name": "preact_resnet18_w16", "mean": [0.5] * 3, "std": [0.5] * 3}},
        {"model": {"name": "resnet18"}},
    ]
    for changes in asked:
        config = resolved(folder, **changes)
        assert config.facts.channels == 3 and len(config.model.mean) == 3
        assert loaders.Phases(config, CPU).enter(0).channels == 3
    assert "grey" not in capsys.readouterr().out


def test_a_mixed_folder_has_three_channels_and_a_line_says_so(tmp_path, photos, capsys):
    assert resolved(grey_folder(tmp_path, ["L", "RGB", "L"])).facts.channels == 3
    assert "3 channels (8 of 12 files looked at are grey, the others have colours)" in capsys.readouterr().out


def test_grey_is_judged_by_a_sample_of_headers(monkeypatch):
    members = [member(png(np.zeros((8, 8), np.uint8))) for _ in range(50)]
    members[7] = member(noise_png(8))
    assert checking.grey_files(members) == (49, 50)
    monkeypatch.setattr(checking, "SAMPLE", 10)
    assert checking.grey_files(members) == (10, 10)  # number 7 is not among 0, 5, 10, …
    exif = Image.Exif()
    exif[0x010E] = "x" * 9000
    assert checking.grey_files([member(encoded("JPEG", exif=exif)), member(b"no image")]) == (0, 1)


def test_prepared_files_hold_colours(tmp_path):
    folder = grey_folder(tmp_path / "source", ["L"] * 4)
    write("dali", folder, tmp_path / "dali", "--sizes", "64")
    data = {"prepared": str(tmp_path / "dali"), "workers": 1}
    assert resolved(folder, loader="torch", data=data).facts.channels == 3
    one = resolved(folder, loader="torch", data=data | {"channels": 1})
    assert one.facts.channels == 1 and loaders.Phases(one, CPU).enter(0).channels == 1


def test_grey_of_colours_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = luma(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert np.array_equal(found[0, 0].numpy(), np.asarray(Image.fromarray(pixels).convert("L")))
    grey = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    assert torch.equal(luma(grey.expand(1, 3, 16, 16)), grey)


def test_colours_become_grey_where_that_is_asked_for(tmp_path):
    folder = write_files(tmp_path, image_set())
    colours, grey = (sets.load("image_folder", "train", folder, resolution=32, choice=Choice(channels=n)) for n in (3, 1))
    assert torch.equal(luma(colours.images), grey.images)


def test_a_typo_in_a_path_makes_no_folder(tmp_path):
    for dataset in ("image_folder", "mnist", "cifar10"):
        with pytest.raises(DataError, match="does not exist"):
            sets.load(dataset, "train", tmp_path / "daat", resolution=8 if dataset == "image_folder" else None)
        with pytest.raises(DataError, match="does not exist"):
            prepare("dali", [dataset, "--data", tmp_path / "daat", "--output", tmp_path / "out"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["JPEG", "GIF"])
def test_a_damaged_picture_is_refused_where_pillow_refuses_it(kind):
    """Its EXIF data must not be a way around: Pillow decodes a picture when it turns it, and only complains once."""
    rng, buffer, refused = np.random.default_rng(0), io.BytesIO(), 0
    Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((72, 72)).save(buffer, kind)
    for _ in range(150):
        content = bytearray(buffer.getvalue())
        content[rng.integers(len(content) // 8, len(content))] ^= int(rng.integers(1, 256))
        try:
            Image.open(io.BytesIO(content)).convert("RGB")
        except (OSError, SyntaxError, ValueError):  # Pillow's own refusals
            refused += 1
            with pytest.raises(DataError, match="is not a usable image"):
                formats.open_upright(member(bytes(content)))
        else:
            formats.open_upright(member(bytes(content)))
    assert refused > 3
