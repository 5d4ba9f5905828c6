"""ImageNet's official archives, in small: read as they lie, the same as the image folder that they unpack to."""

import gzip
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import photo
from data_files import prepare, tar_bytes, write_files

from fastrobust.data import ilsvrc, sets
from fastrobust.runtime.errors import DataError

IDS = {2: "n01440764", 3: "n02111889", 1: "n07697313"}  # not in the order of the names, as in the real kit
TRUTH = [3, 1, 1, 2, 3]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    photo(seed, 60 + seed % 7, 50).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def devkit(truth: list[int] = TRUTH) -> bytes:
    savemat = pytest.importorskip("scipy.io").savemat
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O"), ("children", "O")]
    rows = [(float(k), IDS[k], f"word {k}, other", "gloss", 0.0, np.zeros(0)) for k in (1, 2, 3)]
    rows.append((4.0, "n00001740", "entity", "a group, not a class", 2.0, np.array([1.0, 3.0])))
    meta = io.BytesIO()
    savemat(meta, {"synsets": np.array(rows, dtype=kinds)[:, None]})
    files = {"readme.txt": b"", "data/meta.mat": meta.getvalue()}
    files["data/ILSVRC2012_validation_ground_truth.txt"] = "".join(f"{k}\n" for k in truth).encode()
    return gzip.compress(tar_bytes({f"ILSVRC2012_devkit_t12/{name}": data for name, data in files.items()}), mtime=0)


def images() -> dict[str, bytes]:
    """What the archives unpack to, sorted into classes."""
    files = {f"train/{wnid}/{wnid}_{k}.JPEG": jpeg(10 * i + k) for i, wnid in IDS.items() for k in range(2 + i)}
    return files | {f"val/{IDS[i]}/ILSVRC2012_val_{k + 1:08}.JPEG": jpeg(100 + k) for k, i in enumerate(TRUTH)}


def archives(**changes: bytes) -> dict[str, bytes]:
    """The three files; `changes` replaces class tars by name."""
    files = images()
    classes = {}
    for wnid in IDS.values():
        inside = {n.rpartition("/")[2]: data for n, data in files.items() if n.startswith(f"train/{wnid}/")}
        classes[f"{wnid}.tar"] = changes.get(wnid) or tar_bytes(inside)
    val = {n.rpartition("/")[2]: data for n, data in files.items() if n.startswith("val/")}
    val = dict(sorted(val.items(), reverse=True))  # the order of names counts, not that in the archive
    return {ilsvrc.TRAIN: tar_bytes(classes), ilsvrc.VAL: tar_bytes(val), ilsvrc.DEVKIT: devkit()}


@pytest.fixture
def official(tmp_path) -> Path:
    return write_files(tmp_path / "imagenet", archives())


def test_the_same_as_the_folder_that_they_unpack_to(official, tmp_path):
    plain = write_files(tmp_path / "plain", images())
    before = sorted(official.rglob("*"))
    for split in ("train", "test"):
        ours, theirs = (sets.list_images("imagenet", split, place) for place in (official, plain))
        assert ours.classes == theirs.classes == tuple(sorted(IDS.values()))
        assert [m.name for m in ours.members] == [m.name for m in theirs.members]
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [m.read() for m in ours.members] == [m.read() for m in theirs.members]
        checksums = {
            sets.pictures("imagenet", split, place).checksum() for place in (official, plain, official / ilsvrc.VAL)
        }
        assert len(checksums) == 1
    for place, output in ((official, "a"), (plain, "b")):
        arguments = ["imagenet", "--data", str(place), "--output", str(tmp_path / output), "--sizes", "32", "original"]
        assert prepare("ffcv", arguments) == 0
    for name in ("train_32.beton", "train_original.beton", "test_original.beton"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(official.rglob("*")) == before, "nothing is unpacked beside them"


def test_they_are_found_where_data_sets_are_looked_for(official, monkeypatch):
    monkeypatch.setenv("FASTROBUST_DATA", str(official.parent))
    assert sets.load("imagenet", "test", resolution=16).labels.tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("name, holds", [
    (ilsvrc.TRAIN, "training images"), (ilsvrc.VAL, "validation images"), (ilsvrc.DEVKIT, "validation images' labels"),
])  # fmt: skip
def test_an_archive_that_is_missing_is_named(official, name, holds):
    (official / name).unlink()
    with pytest.raises(DataError, match=rf"imagenet lacks {name}, which holds the {holds}: fetch it"):
        sets.list_images("imagenet", "train", official)


def test_kits_that_do_not_belong_to_the_images(official, monkeypatch):
    for kit, message in (
        (devkit(TRUTH[:-1]), "ILSVRC2012_img_val.tar holds 5 files, but .* labels 4"),
        (devkit([*TRUTH[:-1], 4]), "damaged or another"),  # a group
        (devkit([*TRUTH[:-1], 9]), "damaged or another"),
        (gzip.compress(tar_bytes({"data/meta.mat": b"x"}), mtime=0), "lacks data/ILSVRC2012_validation_ground_truth.txt"),
        (gzip.compress(tar_bytes({"data/meta.mat": b"x", ilsvrc._TRUTH: b"1"}), mtime=0), "damaged or another"),
        (devkit()[:-100], "is truncated"),
    ):
        (official / ilsvrc.DEVKIT).write_bytes(kit)
        with pytest.raises(DataError, match=message):
            sets.list_images("imagenet", "train", official)
    (official / ilsvrc.DEVKIT).write_bytes(devkit())
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(DataError, match=r"needs scipy: pip install 'scipy>="):
        sets.list_images("imagenet", "train", official)


def test_damaged_class_archives_are_named(official):
    wnid = IDS[1]
    whole = tar_bytes({f"{wnid}_{k}.JPEG": jpeg(k) for k in range(3)})
    second = whole.index(f"{wnid}_1.JPEG".encode())
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as archive:
        info = tarfile.TarInfo("a.JPEG")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    for inner, message in (
        (whole[: second + 512], f"{wnid}_1.JPEG in {wnid}.tar in .* goes on after the end"),
        (whole[:second], f"{wnid}.tar in .*: no end-of-archive mark"),
        (whole[: second + 1] + b"YYYY" + whole[second + 5 :], f"{wnid}.tar in .*: no end-of-archive mark"),
        (b"no tar" * 1000, "is truncated or corrupt"),
        (link.getvalue(), f"a.JPEG in {wnid}.tar in .* is a link"),
    ):
        write_files(official, archives(**{wnid: inner}))
        with pytest.raises(DataError, match=message) as caught:
            sets.list_images("imagenet", "train", official)
        assert ilsvrc.TRAIN in str(caught.value)
