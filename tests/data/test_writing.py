"""Tests of the writers of prepared images, against Pillow, tarfile, and FFCV's own writer and reader."""

import io
import json
import os
import queue
import tarfile
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import photo
from data_files import prepare
from PIL import Image
from prepared_files import KINDS, both, files, pixels, upright, write

from fastrobust.data import sets
from fastrobust.data.prepared import beton, records, shards, writing

ROOT = Path(__file__).resolve().parents[2]


@both
def test_every_size_holds_what_pillow_makes_of_the_source(kind, photos, tmp_path):
    write(kind, photos, tmp_path, "--sizes", "48", "original", "--storage", "raw", "--cap", "90")
    expected = sorted((photos / "train").rglob("*.jpg"))
    shapes = set()
    for size, limit in ((48, 48), ("original", 90)):
        found = KINDS[kind](tmp_path, "train", size)
        assert len(found) == 37 and found.classes == ("a", "b", "c") and found.raw.all()
        for i, file in enumerate(expected):
            image = upright(file)
            short = min(image.size)
            if short > limit:
                image = image.resize([round(side * limit / short) for side in image.size], Image.Resampling.BICUBIC)
            assert found.label[i] == "abc".index(file.parent.name)
            difference = np.abs(pixels(found, i).astype(int) - np.asarray(image))  # torch resizes, and rounds a few others
            assert difference.max() <= 2 and difference.mean() < 0.03, file
            shapes.add(image.size)
    assert len(shapes) > 50 and any(w < h for w, h in shapes) and any(w > h for w, h in shapes)
    test = KINDS[kind](tmp_path, "test", "original")  # the test images are written in the largest size alone
    assert len(test) == 12 and not records.manifest_path(tmp_path, "test", 48).exists()


@both
def test_jpeg_of_the_asked_quality(kind, photos, tmp_path):
    write(kind, photos, tmp_path / "a", "--quality", "90")
    found = KINDS[kind](tmp_path / "a", "train", "original")
    assert not found.raw.any()
    for i, file in enumerate(sorted((photos / "train").rglob("*.jpg"))):
        buffer = io.BytesIO()
        upright(file).save(buffer, "JPEG", quality=90)
        assert np.array_equal(pixels(found, i), np.asarray(Image.open(buffer)))
    write(kind, photos, tmp_path / "b", "--quality", "50")
    smaller = KINDS[kind](tmp_path / "b", "train", "original")
    assert (smaller.length < found.length).all()


@both
def test_the_same_input_gives_the_same_bytes_however_many_workers(kind, photos, tmp_path):
    for name, workers in (("a", "1"), ("b", "5")):
        write(kind, photos, tmp_path / name, "--sizes", "40", "60", "--storage", "mixed", "--workers", workers)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    raw = KINDS[kind](tmp_path / "a", "train", 40).raw
    assert 5 < raw.sum() < 32
    for size in (40, 60):
        manifest = json.loads((tmp_path / "a" / f"train_{size}.json").read_text())
        assert manifest["count"] == 37 and manifest["size"] == size and manifest["storage"] == "mixed"
        for file in manifest["files"]:
            assert file["sha256"] == files(tmp_path / "a")[file["name"]]
            assert file["bytes"] == (tmp_path / "a" / file["name"]).stat().st_size
        records.verify(tmp_path / "a", manifest)


def test_shards_are_plain_tars(photos, tmp_path, monkeypatch):
    class SmallShards(shards.ShardWriter):
        def __init__(self, stem, count):
            super().__init__(stem, count, shard=20_000)

    monkeypatch.setitem(writing.KINDS, "webdataset", SmallShards)
    write("webdataset", photos, tmp_path, "--splits", "train")
    found = shards.read(tmp_path, "train", "original")
    assert len(found.files) > 3
    number = 0
    for k, file in enumerate(found.files):
        with tarfile.open(file) as tar:
            members = tar.getmembers()
            for image, label in zip(members[::2], members[1::2], strict=True):
                assert image.name == f"{number:08}.jpg" and label.name == f"{number:08}.cls"
                assert (found.file[number], found.offset[number], found.length[number]) == (k, image.offset_data, image.size)
                assert int(tar.extractfile(label).read()) == found.label[number]
                number += 1
    assert number == 37


def test_small_sets_are_stored_bare(tmp_path, monkeypatch):
    pixel = np.random.default_rng(0).integers(0, 256, (30, 28, 28), np.uint8)
    data = sets.ImageSet(torch.from_numpy(pixel)[:, None], torch.arange(30) % 10, tuple("0123456789"), "made up")
    monkeypatch.setattr(sets, "load", lambda *a, **k: data)
    for kind, read in KINDS.items():
        assert prepare(kind, ["mnist", "--output", str(tmp_path / kind)]) == 0
        found = read(tmp_path / kind, "test", "original")
        assert found.raw.all() and found.label.tolist() == (np.arange(30) % 10).tolist()
        for i in range(30):
            assert np.array_equal(pixels(found, i), np.repeat(pixel[i][..., None], 3, 2))


# ---- FFCV itself as the oracle


def test_ffcvs_writer_writes_the_same_tables(tmp_path, monkeypatch):
    """FFCV's own DatasetWriter, with one worker, on the same pixels: the same header, fields, samples and allocations."""
    pytest.importorskip("ffcv")
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType
    from ffcv.writer import DatasetWriter

    for mine, theirs in ((beton.HEADER, HeaderType), (beton.FIELD, FieldDescType), (beton.ALLOCATION, ALLOC_TABLE_TYPE)):
        assert mine.itemsize == theirs.itemsize
        assert [mine.fields[a] for a in mine.names] == [theirs.fields[b] for b in theirs.names]
    monkeypatch.setattr(ffcv.writer, "Process", threading.Thread)  # its processes wait for ever when one of them dies
    monkeypatch.setattr(ffcv.writer, "Queue", queue.Queue)
    monkeypatch.setattr(beton, "PAGE", 1 << 21)
    images = [np.asarray(photo(i, 480 + i, 400)) for i in range(11)]  # 0.6 MB each: three to a page
    pairs = [(image, i % 3) for i, image in enumerate(images)]
    theirs, mine = tmp_path / "theirs.beton", tmp_path / "mine.beton"
    writer = DatasetWriter(
        str(theirs), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, page_size=beton.PAGE, num_workers=1
    )
    writer.from_indexed_dataset(pairs)
    own = beton.BetonWriter(mine, len(pairs))
    for image, label in pairs:
        own.add(label, *image.shape[:2], True, image.tobytes())
    own.close()
    a, b = mine.read_bytes(), theirs.read_bytes()
    tables = beton.HEADER.itemsize + 2 * beton.FIELD.itemsize + 11 * beton.SAMPLE.itemsize
    header_a, header_b = (np.frombuffer(x, beton.HEADER, 1)[0] for x in (a, b))
    assert header_a.tolist()[:4] == header_b.tolist()[:4]
    assert a[beton.HEADER.itemsize : tables] == b[beton.HEADER.itemsize : tables]
    end = header_a["allocations"]
    assert a[tables:end] == b[tables:end]  # the pages; FFCV fills up the last one
    assert a[end:] == b[header_b["allocations"] :]


def test_the_index_says_what_ffcvs_tables_say(photos, tmp_path):
    write("ffcv", photos, tmp_path, "--splits", "train", "--storage", "mixed")
    found = beton.read(tmp_path, "train", "original")
    content = found.files[0].read_bytes()
    header = np.frombuffer(content, beton.HEADER, 1)[0]
    samples = np.frombuffer(content, beton.SAMPLE, 37, beton.HEADER.itemsize + 2 * beton.FIELD.itemsize)
    allocations = np.frombuffer(content, beton.ALLOCATION, 37, header["allocations"])
    image = samples["image"]
    pairs = {"offset": image["pointer"], "height": image["height"], "width": image["width"], "label": samples["label"]}
    for name, column in (pairs | {"length": allocations["size"], "raw": image["mode"] == beton.RAW}).items():
        assert getattr(found, name).tolist() == column.tolist(), name
    parts = [content[start:][:length] for start, length in zip(found.offset, found.length, strict=True)]
    assert found.crc.tolist() == [zlib.crc32(part) for part in parts]


@both
def test_real_photos(kind, tmp_path):
    """The ImageNet samples, grey ones among them, at the three sizes of the phases."""
    archive = Path(os.environ.get("FASTROBUST_DATA") or "absent", "imagenet-samples", "imagenet_samples.tar")
    if not archive.exists():
        pytest.skip("needs the real data imagenet-samples in $FASTROBUST_DATA")
    with tarfile.open(archive) as tar:
        for member in tar.getmembers()[:40]:
            for split in ("train", "val"):
                file = tmp_path / "source" / split / member.name.partition("_")[0] / member.name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(tar.extractfile(member).read())
    write(kind, tmp_path / "source", tmp_path / "out", "--sizes", "160", "352", "original", "--splits", "train")
    for size in (160, 352, "original"):
        found = KINDS[kind](tmp_path / "out", "train", size)
        assert len(found) == 40
        for i, file in enumerate(sorted((tmp_path / "source" / "train").rglob("*.JPEG"))):
            image = upright(file)
            shape = records.stored_size(*image.size, size, None)
            buffer = io.BytesIO()
            (image if shape == image.size else image.resize(shape, Image.Resampling.BICUBIC)).save(
                buffer, "JPEG", quality=90
            )
            difference = np.abs(pixels(found, i).astype(int) - np.asarray(Image.open(buffer)))
            assert difference.mean() <= (0 if shape == image.size else 0.5), difference.mean()
