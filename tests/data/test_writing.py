"""Tests of the writers of prepared images, against Pillow, tarfile, and FFCV's own writer and reader."""

import hashlib
import io
import json
import os
import queue
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from data_files import prepare
from PIL import Image, ImageOps

from fastrobust.data import sets
from fastrobust.data.prepared import beton, records, shards, writing
from fastrobust.runtime.errors import ConfigError, DataError
from tests.stress.limits import small_disk

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"ffcv": beton.read, "webdataset": shards.read}
KINDS_FILES = {"ffcv": "train_original.beton", "webdataset": "train_original-000.tar"}
both = pytest.mark.parametrize("kind", KINDS)


def write(kind: str, source: Path, output: Path, *arguments: str) -> Path:
    assert prepare(kind, ["image_folder", "--source", str(source), "--output", str(output), *arguments]) == 0
    return output


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def upright(file: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


def pixels(found: records.Records, i: int) -> np.ndarray:
    """Image i as H x W x 3, its size checked."""
    descriptors = found.open()
    try:
        data = found.read(descriptors, i)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    shape = (found.height[i], found.width[i], 3)
    if found.raw[i] and found.manifest["kind"] == "ffcv":
        return np.frombuffer(data, np.uint8).reshape(shape)
    image = np.asarray(Image.open(io.BytesIO(data)))
    assert image.shape == shape
    return image


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
            assert np.array_equal(pixels(found, i), np.asarray(image)), file
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
    import torch

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


# ---- what goes wrong


@pytest.fixture
def spoilt(photos, tmp_path):
    """The photos, with one of them cut short."""
    import shutil

    folder = tmp_path / "spoilt"
    shutil.copytree(photos, folder)
    file = sorted((folder / "train").rglob("*.jpg"))[20]
    file.write_bytes(file.read_bytes()[:600])
    return folder, file


@both
def test_a_corrupt_image_stops_the_job_or_is_left_out(kind, spoilt, tmp_path, capsys):
    folder, file = spoilt
    output = tmp_path / "out"
    with pytest.raises(DataError, match=rf"{file.name} is not a usable image"):
        write(kind, folder, output)
    assert list(output.iterdir()) == []
    write(kind, folder, output, "--skip-corrupt")
    found = KINDS[kind](output, "train", "original")
    assert len(found) == 36 and f"skipped: {file}" in capsys.readouterr().out
    assert len(found.manifest["skipped"]) == 1 and str(file) in found.manifest["skipped"][0]
    assert found.label.tolist() == [0] * 13 + [1] * 11 + [2] * 12
    assert pixels(found, 20).shape[:2] == upright(sorted((folder / "train").rglob("*.jpg"))[21]).size[::-1]


def test_an_image_larger_than_a_page_is_named(tmp_path, photos, monkeypatch):
    monkeypatch.setattr(beton, "PAGE", 30_000)
    with pytest.raises(DataError, match=r"\.jpg: it takes \d+ bytes, more than FFCV's page of 30000: set --cap"):
        write("ffcv", photos, tmp_path / "out", "--storage", "raw")
    assert list((tmp_path / "out").iterdir()) == []


@both
def test_an_interrupted_write_looks_like_one_and_starts_over(kind, photos, tmp_path, monkeypatch, capsys):
    encode, calls = writing.encode, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 25:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(kind, photos, tmp_path / "out", "--sizes", "48", "original")
    assert list((tmp_path / "out").iterdir()) == []
    write(kind, photos, tmp_path / "out", "--sizes", "48", "original")
    write(kind, photos, tmp_path / "whole", "--sizes", "48", "original")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    capsys.readouterr()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    write(kind, photos, tmp_path / "out", "--sizes", "48", "original")
    assert capsys.readouterr().out.count("is there already") == 3
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(ConfigError, match=r"train_48.json was written with quality 90 instead of 80"):
        write(kind, photos, tmp_path / "out", "--sizes", "48", "original", "--quality", "80")


def test_a_killed_write_leaves_nothing_that_looks_whole(tmp_path):
    for split in ("train", "val"):
        for i in range(12):
            file = tmp_path / "source" / split / "a" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo(i, 400, 300).save(file)
    output = tmp_path / "out"
    command = [sys.executable, str(ROOT / "data_prep/write_ffcv.py"), "image_folder", "--source", str(tmp_path / "source")]
    command += ["--output", str(output), "--sizes", "300", "original", "--splits", "train"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    job = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(output.glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.001)
    job.send_signal(signal.SIGKILL)
    assert job.wait() == -signal.SIGKILL
    assert {file.name for file in output.iterdir()} <= {"train_300.beton.partial", "train_original.beton.partial"}
    with pytest.raises(DataError, match="holds no prepared images"):
        beton.read(output, "train", 300)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "train_300.beton.partial was left by an interrupted write: starting over" in done.stdout
    assert len(beton.read(output, "train", 300)) == 12
    assert not list(output.glob("*.partial"))


@both
def test_a_damaged_file_is_written_again(kind, photos, tmp_path, capsys):
    write(kind, photos, tmp_path, "--splits", "train")
    whole = files(tmp_path)
    file = KINDS[kind](tmp_path, "train", "original").files[0]
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"x")
    write(kind, photos, tmp_path, "--splits", "train")
    assert f"{file} is damaged (its checksum differs from the manifest)" in capsys.readouterr().out
    assert files(tmp_path) == whole


class Malice:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def with_index(folder: Path, content: bytes) -> None:
    """Put another index into prepared files, with all the checksums that belong to it."""
    index, manifest = folder / "train_original.index.npy", folder / "train_original.json"
    index.write_bytes(content)
    facts = json.loads(manifest.read_text())
    facts["files"][-1] = records.file_facts(index)
    manifest.write_text(json.dumps(records.seal(facts)))


@both
def test_an_index_that_means_harm_is_refused(kind, photos, tmp_path):
    """Pickled code is not run, and no native code is led out of the file or of a picture."""
    write(kind, photos, tmp_path, "--splits", "train", "--storage", "raw")
    rows = np.load(tmp_path / "train_original.index.npy")

    def content(array, **options):
        buffer = io.BytesIO()
        np.save(buffer, array, **options)
        return buffer.getvalue()

    with_index(tmp_path, content(rows))
    assert len(KINDS[kind](tmp_path, "train", "original")) == 37
    marker = tmp_path / "marker"
    harmful = content(np.array([Malice(marker)] * 37, object), allow_pickle=True)
    np.load(io.BytesIO(harmful), allow_pickle=True)
    assert marker.exists()  # it would do harm
    marker.unlink()
    with_index(tmp_path, harmful)
    with pytest.raises(DataError, match=r"index\.npy is damaged"):
        KINDS[kind](tmp_path, "train", "original")
    assert not marker.exists()
    size = (tmp_path / KINDS_FILES[kind]).stat().st_size
    for name, value in (
        ("offset", size), ("offset", -1), ("offset", 2**63 - 1), ("length", 2**62), ("length", 10), ("file", 1),
        ("file", -1), ("height", 0), ("height", 2**31), ("width", 1000), ("label", 3), ("label", -1),
    ):  # fmt: skip
        changed = rows.copy()
        changed[name][7] = value
        with_index(tmp_path, content(changed))
        with pytest.raises(DataError, match=r"index\.npy is damaged"):
            KINDS[kind](tmp_path, "train", "original")


@both
def test_a_full_disk_is_named_and_nothing_is_left(kind, photos, tmp_path):
    with small_disk(tmp_path / "disk", "200k") as disk:
        if disk is None:
            pytest.skip("no file system may be mounted here")
        with pytest.raises(DataError, match=r"disk/out cannot be written to: No space left on device"):
            write(kind, photos, disk / "out", "--storage", "raw")
        assert list((disk / "out").iterdir()) == []


@both
def test_a_dry_run_writes_nothing(kind, photos, tmp_path, capsys):
    write(kind, photos, tmp_path / "out", "--sizes", "48", "original", "--dry-run")
    shown = capsys.readouterr().out
    assert "train: 37 images of 3 classes" in shown and "train_48: about" in shown and "test_original: about" in shown
    assert not (tmp_path / "out").exists()


@both
def test_damaged_files_are_refused(kind, photos, tmp_path):
    write(kind, photos, tmp_path, "--splits", "train", "--limit", "10")
    manifest = tmp_path / "train_original.json"
    data = tmp_path / json.loads(manifest.read_text())["files"][0]["name"]
    whole = data.read_bytes()
    data.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=rf"{data.name} has {len(whole) - 1} bytes instead of {len(whole)}: write it again"):
        KINDS[kind](tmp_path, "train", "original")
    data.unlink()
    with pytest.raises(DataError, match=f"{data.name} is missing"):
        KINDS[kind](tmp_path, "train", "original")
    data.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(DataError, match="is damaged"):
        records.verify(tmp_path, records.read_manifest(tmp_path, "train", "original"))
    data.write_bytes(whole)
    with pytest.raises(DataError, match=r"train_99.json does not exist \(there are train_original.json\)"):
        KINDS[kind](tmp_path, "train", 99)
    other = next(read for name, read in KINDS.items() if name != kind)
    with pytest.raises(DataError, match=r"write them with data_prep/write_"):
        other(tmp_path, "train", "original")
    text = manifest.read_text()
    for spoilt in ("", "{}", "[]", text[:40], text.replace('"format": 2', '"format": 9'), text.replace('"a"', '"z"')):
        manifest.write_text(spoilt)
        with pytest.raises(DataError, match=r"train_original.json is damaged"):
            KINDS[kind](tmp_path, "train", "original")


def test_settings_that_cannot_be_meant(photos, tmp_path):
    for arguments, message in (
        (["--sizes", "0"], "--sizes must be a whole number of at least 1, not 0"),
        (["--sizes", "large"], "--sizes must be a whole number of at least 1, not large"),
        (["--sizes", "64", "64"], "--sizes names a size twice"),
        (["--quality", "96"], "--quality must lie between 1 and 95"),
        (["--limit", "0"], "--limit must be a whole number of at least 1, not 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            write("ffcv", photos, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


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
            image = image.resize(records.stored_size(*image.size, size, None), Image.Resampling.BICUBIC)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=90)
            assert np.array_equal(pixels(found, i), np.asarray(Image.open(buffer)))
