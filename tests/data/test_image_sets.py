"""Folders and tar files of images, against what the test wrote or what Pillow makes of the same bytes."""

import gzip
import io
import itertools
import lzma
import re
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from data_files import CIFAR, RNG, check_form, image_set, noise_png, pixels_of, png, png16, real, tar_bytes, write_files
from PIL import Image, ImageOps

from fastrobust.data import formats
from fastrobust.data.held_out import Choice
from fastrobust.data.sets import load
from fastrobust.runtime import limits
from fastrobust.runtime.errors import DataError
from tests.stress.fuzz import encoded

pytestmark = pytest.mark.filterwarnings("error")  # a warning from numpy, torch or Pillow is a defect here


def expected_set(files: dict[str, bytes], folder: str) -> tuple[np.ndarray, list[int], list[str]]:
    classes = sorted({name.split("/")[1] for name in files})
    names = sorted((n for n in files if n.startswith(f"{folder}/")), key=lambda name: name.split("/", 2))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(files[name]))) for name in names])
    return pixels, [classes.index(name.split("/")[1]) for name in names], classes


FORMS = ["folder", "tar", "tar with ./", "tar.gz", "tar.xz", "folder of tars", "folder with tar.xz"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dataset", ["image_folder", "cifar10"])
def test_image_sets(tmp_path, form, dataset):
    if dataset == "cifar10" and form == "folder of tars":
        pytest.skip("an image folder's form only")
    classes = CIFAR if dataset == "cifar10" else ("b", "a-b", "B", "a")
    files = image_set(classes, 3, folders=("train", "test"))
    files[f"train/{classes[0]}/nested/deep.PNG"] = noise_png()
    skipped = {"train/README.txt": b"text", "train/1.png": b"x", f"train/{classes[1]}/._1.png": b"x"}
    everything = {**files, **skipped}
    path = tmp_path / "set"
    if form == "folder":
        write_files(path, everything)
    elif form == "folder of tars":
        parts = [dict(list(everything.items())[start::3]) for start in range(3)]
        write_files(path, {f"part-{i}.tar": tar_bytes(part) for i, part in enumerate(parts)})
    elif form == "folder with tar.xz":
        write_files(path, {"images.tar.xz": lzma.compress(tar_bytes(everything)), "notes.txt": b""})
    else:
        if "./" in form:
            everything = {f"./{name}": data for name, data in everything.items()}
        pack = {"tar.gz": gzip.compress, "tar.xz": lzma.compress}.get(form, bytes)
        path.write_bytes(pack(tar_bytes(everything)))
    options = {"resolution": 32} if dataset == "image_folder" else {}
    for split in ("train", "test"):
        result = load(dataset, split, path, **options)
        pixels, labels, names = expected_set(files, split)
        check_form(result, len(labels), 3, 32, names)
        np.testing.assert_array_equal(pixels_of(result), pixels)
        assert result.labels.tolist() == labels
        assert result.source.startswith(str(path))
        assert ("part-0.tar" in result.source) == (form == "folder of tars")


def test_linked_class_folder(tmp_path):
    write_files(tmp_path / "set", image_set(("cat",)))
    write_files(tmp_path / "elsewhere", {"1.png": noise_png()})
    for split in ("train", "val"):
        (tmp_path / "set" / split / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    result = load("image_folder", "test", tmp_path / "set", resolution=32)
    assert result.classes == ("cat", "dog")
    assert result.labels.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("folder", ["val", "test", "validation"])
def test_limit_keeps_all_classes_and_is_deterministic(tmp_path, folder):
    files = image_set(("a", "b", "c"), 8, 8, ("train", folder))
    write_files(tmp_path / "one", files)
    write_files(tmp_path / "two", dict(reversed(files.items())))
    for split, name in (("train", "train"), ("test", folder)):
        pixels, labels, _ = expected_set(files, name)
        first = load("image_folder", split, tmp_path / "one", resolution=8, limit=6)
        second = load("image_folder", split, tmp_path / "two", resolution=8, limit=6)
        np.testing.assert_array_equal(pixels_of(first), pixels[::4])
        assert first.labels.tolist() == labels[::4] == [0, 0, 1, 1, 2, 2]
        assert torch.equal(first.images, second.images) and torch.equal(first.labels, second.labels)


def save(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_modes_rotation_and_resizing_match_pillow(tmp_path):
    smooth = np.add.outer(np.arange(50), 2 * np.arange(93))[..., None] + np.array([0, 30, 60])
    rgb = Image.fromarray((smooth + RNG.integers(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8))
    alpha = Image.fromarray(RNG.integers(0, 256, (50, 93), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    rgba = rgb.copy()
    rgba.putalpha(alpha)
    cases = {
        "alpha.png": (save(rgba, "PNG"), rgb),
        "bilevel.png": (save(rgb.convert("1"), "PNG"), rgb.convert("1").convert("RGB")),
        "cmyk.jpg": (data := save(rgb.convert("CMYK"), "JPEG"), Image.open(io.BytesIO(data)).convert("RGB")),
        "grey.jpg": (data := save(rgb.convert("L"), "JPEG"), Image.open(io.BytesIO(data)).convert("RGB")),
        "greyalpha.png": (save(rgba.convert("LA"), "PNG"), rgba.convert("L").convert("RGB")),
        "palette.png": (save(rgb.quantize(64), "PNG"), rgb.quantize(64).convert("RGB")),
        "palettealpha.png": (
            save(rgb.quantize(64), "PNG", transparency=bytes(range(64))),
            rgb.quantize(64).convert("RGB"),
        ),
        "rotated.png": (save(rgb, "PNG", exif=exif), rgb.transpose(Image.Transpose.ROTATE_270)),
        "rotated.jpg": (
            data := save(rgb, "JPEG", exif=exif),
            Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270),
        ),
        "tall.webp": (save(rgb.rotate(90, expand=True), "WEBP", lossless=True), rgb.rotate(90, expand=True)),
    }
    write_files(tmp_path, {f"train/a/{name}": data for name, (data, _) in cases.items()})
    write_files(tmp_path, {"val/a/1.png": noise_png(40), "train/b/1.png": noise_png(40)})
    found = load("image_folder", "train", tmp_path, resolution=32)
    result = found.take(range(len(cases)))
    for name, pixels in zip(sorted(cases), pixels_of(result), strict=True):
        upright = cases[name][1]
        assert upright.mode == "RGB"
        wide = upright.width > upright.height
        size = (59, 32) if wide else (32, 59)  # 59 = floor(32 * 93 / 50)
        small = upright.resize(size, Image.Resampling.BICUBIC)
        crop = small.crop((14, 0, 46, 32) if wide else (0, 14, 32, 46))  # 14 = round((59 - 32) / 2)
        np.testing.assert_array_equal(pixels, np.asarray(crop), err_msg=name)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "train/a/rotated.png")).size == (50, 93)
    enlarged = load("image_folder", "test", tmp_path, resolution=64)
    original = Image.open(tmp_path / "val/a/1.png")
    larger = original.resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pixels_of(enlarged)[0], np.asarray(larger))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (noise_png()[:-60], "[Tt]runcated"),
        (b"no image", r"\(cannot identify image file: it is a text file that begins \"no image\"\): put a good copy"),
        (b"", "is empty"),
        (b"\0" * 600, r"\(cannot identify image file\): put a good copy"),
        (noise_png()[:12], r"\(cannot identify image file\): put a good copy"),
        (png(np.zeros((32, 32), np.uint16)), "its pixels have more than 8 bits.: convert it to PNG or JPEG with 8 bits, or"),
        (png16(), "its pixels have more than 8 bits.: convert it to PNG or JPEG with 8 bits, or"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", "file: it is an EPS picture.: convert it to PNG or"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "file: it is a HEIC picture.: convert it to PNG or JPEG with 8 bits, or"),
    ],
)
def test_unusable_image_is_named(tmp_path, bad, message):
    files = image_set()
    files["train/dog/1.png"] = bad
    write_files(tmp_path / "folder", files)
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar_bytes(files)))
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    for place in ("folder", "set.tar.gz", "set.tar"):
        with pytest.raises(DataError, match=f"train/dog/1.png.*{message}") as caught:
            load("image_folder", "train", tmp_path / place, resolution=16)
        assert str(tmp_path / place) in str(caught.value) and ("data.skip_corrupt" in str(caught.value) or not bad)
        assert len(load("image_folder", "test", tmp_path / place, resolution=16).labels) == 6


def test_a_png_that_pillow_decodes_to_other_pixels_is_noticed_by_its_checksum(tmp_path):
    content = encoded(0, "PNG")  # 48 x 48
    right = Image.open(io.BytesIO(content)).tobytes()
    found = 0
    for place, bit in itertools.product(range(len(content) - 160, len(content) - 12), (1, 16)):
        changed = content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]
        try:
            unnoticed = Image.open(io.BytesIO(changed)).tobytes() != right
        except Exception:  # Pillow refuses it, in one of many ways: nothing goes unnoticed
            continue
        if unnoticed:
            found += 1
            write_files(tmp_path, image_set(size=48) | {"train/cat/0.png": changed})
            with pytest.raises(DataError, match=r"train/cat/0\.png is not a usable image"):
                load("image_folder", "train", tmp_path, resolution=48)
    assert found


def test_cifar_images_must_be_32_pixels(tmp_path):
    write_files(tmp_path, {**image_set(CIFAR, 1), "train/ship/0.png": noise_png(33)})
    with pytest.raises(DataError, match=r"train/ship/0\.png.*33 x 33 pixels, not 32 x 32"):
        load("cifar10", "train", tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            image_set(folders=("train",)),
            "one of test/.*images in train, so there are no test images; give a place with test/.* A run can .*held_out=N",
        ),
        (image_set(folders=("val",)), "images in val, so there are no train images$"),
        ({"train/1.png": noise_png(), "val/a/readme": b""}, "images in no such folder, so there are no train images$"),
        ({"train/cat/notes.txt": b"", "val/cat/notes.txt": b""}, "images in no such folder, so"),
        ({**image_set(), "val/emu/1.png": noise_png()}, "test has images of emu, which is no class of train: .*, or take"),
        ({**image_set(), "val/Cat/1.png": noise_png()}, r"Cat, which is no class of train \(cat is: capitals count\)"),
    ],
)
def test_wrong_layout(tmp_path, files, message):
    write_files(tmp_path / "folder", files)
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    for split in ("train", "test"):  # one of them is there, or both are wrong
        try:
            load("image_folder", split, tmp_path / "folder", resolution=16)
        except DataError:
            break
    with pytest.raises(DataError, match=f"set.tar.*{message}"):
        load("image_folder", split, tmp_path / "set.tar", resolution=16)
    with pytest.raises(DataError, match=f"{message}|holds neither train/ nor"):
        load("image_folder", split, tmp_path / "folder", resolution=16)


def test_cifar_class_names_are_checked(tmp_path):
    write_files(tmp_path, image_set((*CIFAR[:-1], "lorry"), 1))
    with pytest.raises(DataError, match="test has images of lorry, which is no class of the data set: "):
        load("cifar10", "test", tmp_path)


def test_empty_folder_several_archives_and_overlapping_archives(tmp_path):
    with pytest.raises(DataError, match="holds neither train/ nor"):
        load("image_folder", "train", tmp_path, resolution=16)
    files = image_set()
    write_files(tmp_path, {"a.tar": tar_bytes(files), "b.tar": tar_bytes({"val/dog/1.png": noise_png()})})
    with pytest.raises(DataError, match=r"val/dog/1\.png occurs 2 times"):
        load("image_folder", "train", tmp_path, resolution=16)
    with pytest.raises(DataError, match="holds 2 archives"):
        load("cifar10", "train", tmp_path)


def test_damaged_archives(tmp_path):
    plain = tar_bytes(image_set(count=20))
    member = len(plain) // 2 // 512 * 512
    header = plain.index(b"val/dog/9.png")
    cases = {
        "cut inside a member.tar": plain[: member + 100],
        "cut at a header.tar": plain[:header],
        "cut inside a header.tar": plain[: header + 100],
        "damaged header.tar": plain[: header + 1] + b"YYYY" + plain[header + 5 :],
        "two in one.tar": plain + plain,
        "cut.tar.gz": gzip.compress(plain)[:-1000],
        "cut.tar.xz": lzma.compress(plain)[:-1000],
        "cut off the end mark.tar.xz": lzma.compress(plain[:header]),
        "damaged.tar.xz": lzma.compress(plain)[:1000] + bytes(100) + lzma.compress(plain)[1100:],
        "damaged.tar.gz": gzip.compress(plain)[:-8] + bytes(8),
        "empty.tar": b"",
    }
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name} is {'truncated' if data else 'empty'}") as caught:
            load("image_folder", "train", tmp_path / name, resolution=16)
        assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"7z\xbc\xaf\x27\x1c\0\4" + bytes(500), "a 7z archive"),
        (b"Rar!\x1a\7\1\0" + bytes(500), "a RAR archive"),
        (b"\x28\xb5\x2f\xfd" + bytes(500), "a file compressed by zstd"),
        (noise_png(), "a PNG picture"),
        (gzip.compress(b"hello" * 1000, mtime=0), "a text file that begins "),
    ],
)
def test_a_file_that_is_no_archive_is_called_what_it_is(tmp_path, content, kind):
    (tmp_path / "set.tar").write_bytes(content)
    with pytest.raises(DataError, match=f"set.tar is {kind}.*, neither tar nor zip: unpack it, and set the path to"):
        load("image_folder", "train", tmp_path / "set.tar", resolution=16)


@pytest.mark.parametrize("kind, target", [(tarfile.LNKTYPE, "train/cat/0.png"), (tarfile.SYMTYPE, "/etc/passwd")])
def test_links_in_archives_are_refused(tmp_path, kind, target):
    link = tarfile.TarInfo("train/cat/link.png")
    link.type, link.linkname = kind, target
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.addfile(link)
    with pytest.raises(DataError, match=r"train/cat/link\.png in .*set\.tar is a link"):
        load("image_folder", "train", tmp_path / "set.tar", resolution=16)


def test_archive_is_not_extracted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {**image_set(), "../outside.png": noise_png(), str(tmp_path / "absolute.png"): noise_png()}
    (tmp_path / "set.tar.gz").write_bytes(gzip.compress(tar_bytes(files)))
    load("image_folder", "train", tmp_path / "set.tar.gz", resolution=16)
    assert [file.name for file in tmp_path.iterdir()] == ["set.tar.gz"]


def test_set_larger_than_the_memory(tmp_path, monkeypatch):
    files = image_set(size=100)
    (tmp_path / "set.tar").write_bytes(tar_bytes(files))
    (tmp_path / "set.tar.xz").write_bytes(lzma.compress(tar_bytes(files)))
    (tmp_path / "proc").mkdir()
    monkeypatch.setattr(limits, "ROOT", tmp_path)
    needed = 6 * 100 * 100 * 3
    for share, enough in ((1, False), (0.81, False), (0.79, True)):
        available = round(needed / share / 1024)
        (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 9999999 kB\nMemAvailable:  {available} kB\n")
        if enough:
            assert len(load("image_folder", "train", tmp_path / "set.tar", resolution=100).labels) == 6
        else:
            with pytest.raises(DataError, match=r"needs 0\.00018 GB of memory.*limit"):
                load("image_folder", "train", tmp_path / "set.tar", resolution=100)
        with pytest.raises(DataError, match=r"set\.tar\.xz, uncompressed, needs"):
            load("image_folder", "train", tmp_path / "set.tar.xz", resolution=100)
    (tmp_path / "proc" / "meminfo").unlink()
    assert len(load("image_folder", "train", tmp_path / "set.tar", resolution=100).labels) == 6


def test_real_cifar10_jpeg(monkeypatch):
    archive = real("cifar10-jpeg", "cifar10_jpeg.tar.xz")
    listing, members = formats.tar_members, {}

    def spy(path):  # saves reading the archive a second time
        members.update((member.name, member) for member in listing(path))
        return list(members.values())

    monkeypatch.setattr(formats, "tar_members", spy)
    result = load("cifar10", "test", archive)
    check_form(result, 10000, 3, 32, CIFAR)
    assert result.labels.tolist() == [label for label in range(10) for _ in range(1000)]
    assert result.source == str(archive)
    assert len(members) == 60000
    for index, name in ((0, "test/airplane/0000.jpg"), (9999, "test/truck/0999.jpg")):
        image = Image.open(io.BytesIO(members[name].read()))
        np.testing.assert_array_equal(pixels_of(result)[index], np.asarray(image))


def test_real_imagenette():
    folder = real("imagenette-224")
    result = load("image_folder", "test", folder, resolution=64, limit=50)
    with tarfile.open(folder / "val.tar") as tar:
        names = sorted(name for name in tar.getnames() if name.endswith(".JPEG"))
        first = Image.open(tar.extractfile(names[0])).convert("RGB")
        first = first.resize((64, 64), Image.Resampling.BICUBIC)
    check_form(result, 50, 3, 64, sorted({name.split("/")[1] for name in names}))
    assert set(result.labels.tolist()) == set(range(10))
    np.testing.assert_array_equal(pixels_of(result)[0], np.asarray(first))
    wanted = [names[i * len(names) // 50].split("/")[1] for i in range(50)]
    assert [result.classes[label] for label in result.labels] == wanted


def zip_bytes(files: dict[str, bytes], flags: int = 0, method: int = 8) -> bytes:
    """A zip archive whose headers say these flags (1: encrypted) and this method of compression (9: Deflate64)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    content = bytearray(buffer.getvalue())
    for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for found in re.finditer(re.escape(mark), bytes(content)):
            content[found.start() + place] |= flags
            content[found.start() + place + 2] = method
    return bytes(content)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flags": 1}, "is encrypted: unpack it with its password"),
        ({"method": 9}, "is packed with deflate64, which cannot be read: unpack it"),
        ({"method": 200}, "is packed with method 200, which"),
    ],
)
def test_a_zip_archive_that_cannot_be_read_is_told_at_once(tmp_path, options, message):
    file = tmp_path / "set.zip"
    file.write_bytes(zip_bytes(image_set()))
    assert len(load("image_folder", "train", file, resolution=16).labels) == 6
    file.write_bytes(zip_bytes(image_set(), **options))
    with pytest.raises(DataError, match=rf"^{file}: (train|val)/\w+/\d.png {message}"):
        load("image_folder", "train", file, resolution=16)


def test_a_damaged_image_in_a_zip_archive_is_named(tmp_path):
    files = image_set()
    content = bytearray(zip_bytes(files))
    for name in ("train/cat/0.png", "train/dog/1.png"):
        place = content.index(name.encode()) + len(name)
        content[place + 40 : place + 60] = bytes(20)
    (tmp_path / "set.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"train/cat/0.png in .*set.zip is damaged \((.|\n)*train/dog/1.png in .*set.zip is"):
        load("image_folder", "train", tmp_path / "set.zip", resolution=16)
    found = load("image_folder", "train", tmp_path / "set.zip", resolution=16, choice=Choice(skip_corrupt=True))
    assert len(found.labels) == 4 and len(found.skipped) == 2
