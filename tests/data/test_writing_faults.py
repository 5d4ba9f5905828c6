"""Tests of the writers of prepared images where images, files or the disk are bad, and where a write is interrupted."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from PIL import Image
from prepared_files import KINDS, KINDS_FILES, both, files, pixels, upright, write

from fastrobust.data.prepared import beton, records, writing
from fastrobust.runtime.errors import ConfigError, DataError
from tests.stress.limits import small_disk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def spoilt(photos, tmp_path):
    """The photos, with one of them cut short."""
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


@both
def test_an_image_too_wide_for_a_jpeg_is_named(kind, tmp_path, photos):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    file = sorted((folder / "train").rglob("*.jpg"))[3]
    Image.new("RGB", (66_000, 8)).save(file.with_suffix(".png"))
    wide = "wide.*png would be stored as 66000 x 8 pixels, a side may have 65500"
    file.with_suffix(".png").rename(file.with_name("wide.png"))
    with pytest.raises(DataError, match=wide):
        write(kind, folder, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    write(kind, folder, tmp_path / "out", "--skip-corrupt")
    assert len(KINDS[kind](tmp_path / "out", "train", "original")) == 37


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
            file = tmp_path / "source" / split / "ab"[i % 2] / f"{i}.png"
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
def test_who_reads_what_is_printed_may_leave(kind, photos, tmp_path, monkeypatch):
    """`fastrobust prepare … | head`: no error about the folder, and no file without its manifest."""

    def left(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(writing, "print", left, raising=False)
    with pytest.raises(BrokenPipeError):
        write(kind, photos, tmp_path / "out", "--sizes", "48", "original")
    assert {file.name.partition(".")[0].partition("-")[0] for file in (tmp_path / "out").iterdir()} == {"train_48"}
    assert (tmp_path / "out" / "train_48.json").exists()


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
    absent = (
        r"train_99.json does not exist \(there are train_original.json\): write the images with `fastrobust prepare ffcv` or"
    )
    with pytest.raises(DataError, match=absent):
        KINDS[kind](tmp_path, "train", 99)
    other = next(read for name, read in KINDS.items() if name != kind)
    with pytest.raises(DataError, match="write them with `fastrobust prepare "):
        other(tmp_path, "train", "original")
    text = manifest.read_text()
    for spoilt in ("", "{}", "[]", text[:40], text.replace('"format": 3', '"format": 9'), text.replace('"a"', '"z"')):
        manifest.write_text(spoilt)
        with pytest.raises(DataError, match=r"train_original.json is damaged"):
            KINDS[kind](tmp_path, "train", "original")


def test_settings_that_cannot_be_meant(photos, tmp_path, capsys):
    for arguments, message in (
        (["--sizes", "0"], "--sizes must be a whole number of at least 1, not 0"),
        (["--sizes", "large"], "--sizes must be a whole number of at least 1, not large"),
        (["--sizes", "64", "64"], "--sizes names a size twice"),
        (["--quality", "96"], "--quality must lie between 1 and 95"),
    ):
        with pytest.raises(ConfigError, match=message):
            write("ffcv", photos, tmp_path / "out", *arguments)
    for option in ("--limit", "--cap", "--workers"):
        for value in ("0", "-1", "1.5", "many"):
            with pytest.raises(SystemExit, match="2"):
                write("ffcv", photos, tmp_path / "out", option, value)
            told = f"argument {option}: '{value}' is not a whole number of at least 1"
            assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
