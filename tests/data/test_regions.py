"""JPEGs of which a part is decoded alone: the part is, bit by bit, what the whole image holds there, in every decoder, and
so are the loaders' batches. The oracle decodes everything and crops then."""

import ctypes
import importlib.util
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from data_files import need
from loader_batches import config_for
from PIL import Image
from prepared_files import upright, write

from fastrobust.config.sections import Augment
from fastrobust.data import loaders
from fastrobust.data.loaders.dali import Dali
from fastrobust.data.loaders.torch_workers import Torch
from fastrobust.data.prepared import beton, regions, shards, writing
from fastrobust.runtime.errors import ConfigError

CPU = torch.device("cpu")


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    rough = np.random.default_rng(seed).integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def plain(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def by_simplejpeg(data: bytes) -> np.ndarray:
    return pytest.importorskip("simplejpeg").decode_jpeg(data, "RGB", fastdct=True)


def by_opencv(data: bytes) -> np.ndarray:
    cv2 = pytest.importorskip("cv2")
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]


def cut(data: bytes, *box: int):
    pytest.importorskip("numba")
    from fastrobust.data.loaders.cut import part

    return part(data, box, np.zeros(len(data), np.uint8))


@pytest.mark.parametrize("decode", [by_pillow, by_simplejpeg, by_opencv])
@pytest.mark.parametrize("size", [(160, 213), (97, 64), (16, 16), (1, 1), (33, 5), (300, 17)], ids=str)
def test_a_part_has_the_pixels_of_the_whole(decode, size):
    image = photo(*size)
    data = regions.encode(image, 90)
    whole = decode(data)
    assert np.array_equal(whole, decode(plain(image, 90))), "no pixel is other for it"
    random, lengths = np.random.default_rng(1), []
    for _ in range(60):
        top, left = random.integers(0, size[1]), random.integers(0, size[0])
        height, width = random.integers(1, size[1] - top + 1), random.integers(1, size[0] - left + 1)
        part, y, x = cut(data, *map(int, (top, left, height, width)))
        pixels = decode(bytes(part))
        assert 0 <= top - y <= 16 and 0 <= left - x <= 16 and len(pixels) - (top - y) - height <= 16
        box = pixels[top - y : top - y + height, left - x : left - x + width]
        assert np.array_equal(box, whole[top : top + height, left : left + width])
        lengths.append(len(part))
    assert max(lengths) <= len(data) and (min(size) < 64 or np.mean(lengths) < 0.7 * len(data))


def test_what_was_not_made_for_it_is_decoded_whole(monkeypatch):
    image = photo(160, 100)
    assert cut(plain(image, 90), 3, 3, 9, 9) == (plain(image, 90), 0, 0)
    monkeypatch.setattr(regions, "MOST", 69)  # one MCU fewer than it has
    assert regions.encode(image, 90) == plain(image, 90)
    assert cut(b"", 0, 0, 1, 1) == (b"", 0, 0)


def test_the_decoder_of_ffcv_reads_it():
    package = importlib.util.find_spec("ffcv")
    if package is None:
        pytest.skip("FFCV is not installed")
    library = ctypes.CDLL(str(next(Path(package.submodule_search_locations[0]).glob("_libffcv*.so"))))  # no import: 5 s
    data, out, side = regions.encode(photo(213, 160), 90), np.empty((160, 213, 3), np.uint8), (160, 213)
    library.imdecode.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p]
    library.imdecode.argtypes += 6 * [ctypes.c_uint32] + 2 * [ctypes.c_bool]
    assert library.imdecode(data, len(data), *side, out.ctypes.data, *side, 0, 0, 1, 1, False, False) == 0
    assert np.array_equal(out, by_simplejpeg(data)), "and our loader has its pixels"


@pytest.mark.parametrize("mirror", [False, True])
def test_shrinking_gives_opencvs_bits(mirror):
    need("ffcv")
    import cv2

    from fastrobust.data.loaders.resize import shrink

    random = np.random.default_rng(2)
    image = random.integers(0, 256, (333, 412, 3), np.uint8)
    for side in (1, 7, 32, 100, 128):
        out = np.empty((side, side, 3), np.uint8)
        for _ in range(12):
            height, width = (int(random.integers(side, size + 1)) for size in image.shape[:2])
            height += not (height % side or width % side)  # whole ratios are OpenCV's own
            top, left = (
                int(random.integers(0, size - n + 1)) for size, n in zip(image.shape, (height, width), strict=False)
            )
            shrink(image, top, left, height, width, mirror, out)
            box = image[top : top + height, left : left + width]
            expected = cv2.resize(box, (side, side), interpolation=cv2.INTER_AREA)
            assert np.array_equal(out, expected[:, ::-1] if mirror else expected), (side, height, width)


def by_triangles(image: np.ndarray, top: int, left: int, height: int, width: int, side: int) -> np.ndarray:
    """The slow way: every pixel of the image has its weight for every pixel of the result."""

    def weights(start: int, length: int, size: int) -> np.ndarray:
        reach = max(1.0, length / side)
        centres = start + (np.arange(side)[:, None] + 0.5) * length / side - 0.5
        places = np.arange(-size, 2 * size)  # those outside have the colour of the edge
        each = np.maximum(0, 1 - abs(places - centres) / reach)
        inside = np.zeros((side, size))
        np.add.at(inside, (slice(None), places.clip(0, size - 1)), each / each.sum(1, keepdims=True))
        return inside

    rows, columns = weights(top, height, image.shape[0]), weights(left, width, image.shape[1])
    return np.einsum("yi,xj,ijc->yxc", rows, columns, image.astype(float), optimize=True)


BOXES = [(20, 30, 100, 120), (0, 0, 160, 213), (5, 9, 150, 60), (40, 50, 20, 11), (159, 212, 1, 1)]


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("side", [3, 64, 100])
def test_smoothing_is_the_sum_of_all_pixels(mirror, side):
    pytest.importorskip("numba")
    from fastrobust.data.loaders.resize import smooth

    image, out = np.random.default_rng(2).integers(0, 256, (160, 213, 3), np.uint8), np.empty((side, side, 3), np.uint8)
    for box in BOXES:
        smooth(image, *box, mirror, out)
        found = out[:, ::-1] if mirror else out
        assert abs(found - by_triangles(image, *box, side)).max() < 0.501


def test_smoothing_is_what_dali_does_on_a_gpu():
    """Of the same function of DALI's, here on the CPU."""
    need("dali")
    from fastrobust.data.loaders.dali import dali, resized
    from fastrobust.data.loaders.resize import smooth

    fn, _, Pipeline = dali()
    image = np.random.default_rng(2).integers(0, 256, (160, 213, 3), np.uint8)
    corners = np.array([[box[:2], np.add(box[:2], box[2:])] for box in BOXES], np.float32)
    corners[::2, :, 1] = corners[::2, ::-1, 1]  # mirrored
    for side in (3, 64, 100):
        pipeline, out = Pipeline(len(BOXES), 1, None), np.empty((side, side, 3), np.uint8)
        with pipeline:
            inputs = fn.external_source(
                source=lambda: ([image] * len(BOXES), list(corners[:, 0]), list(corners[:, 1])), num_outputs=3
            )
            pipeline.set_outputs(resized(*inputs, side))
        pipeline.build()
        for k, box in enumerate(BOXES):
            smooth(image, *box, k % 2 == 0, out)
            difference = abs(out.astype(int) - np.array(pipeline.run()[0].at(k)))
            assert difference.max() <= 1 and difference.mean() < 0.1  # halves are rounded up there, and to even here


def test_odd_lengths_of_mcus_are_not_believed():
    """The image is decoded whole then; no byte beyond the file is read, none beyond the buffer is written."""
    pytest.importorskip("numba")
    from fastrobust.data.loaders.cut import part

    image = photo(160, 100)
    good = regions.encode(image, 90)
    end = regions.PLACE + 2 + int.from_bytes(good[regions.PLACE + 2 : regions.PLACE + 4], "big")
    random = np.random.default_rng(3)
    for _ in range(300):
        data, room = bytearray(good), np.zeros(2 * len(good), np.uint8)
        for place in random.integers(regions.PLACE + 2, min(end + 20, len(good)), 3):
            data[place] = random.integers(256)
        found, *_ = part(bytes(data[: random.integers(10, len(data) + 1)]), (5, 40, 60, 70), room[: len(good)])
        assert len(found) <= len(good) and not room[len(good) :].any()


@pytest.fixture(scope="module")
def both(photos, tmp_path_factory):
    """kind -> (files as an older version wrote them, files of this one)."""
    folder = tmp_path_factory.mktemp("versions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "encode", plain)
        patch.setattr(writing, "MANIFEST_FORMAT", 2)
        for kind in ("ffcv", "webdataset"):
            write(kind, photos, folder / f"old-{kind}", "--sizes", "64", "original")
    for kind in ("ffcv", "webdataset"):
        write(kind, photos, folder / f"new-{kind}", "--sizes", "64", "original")
    return lambda kind: (folder / f"old-{kind}", folder / f"new-{kind}")


# mean and greatest difference. DALI counts places from another corner, and rounds some others. torch decodes whole images
@pytest.mark.parametrize(("name", "mean", "most"), [("ffcv", 0, 0), ("dali", 1e-3, 1), ("torch", 0, 0)])
@pytest.mark.parametrize("size", [64, "original"])
@pytest.mark.parametrize("augment", [Augment(crop="random_resized", flip=True), None], ids=["crops", "middle squares"])
def test_batches_are_those_of_images_decoded_whole(both, name, mean, most, size, augment):
    need(name)
    if name == "ffcv":
        from fastrobust.data.loaders.ffcv import Ffcv as kind

        files, read = both("ffcv"), beton.read
    else:
        files, read, kind = both("webdataset"), shards.read, {"dali": Dali, "torch": Torch}[name]
    for side in (24, 48):
        made = [kind(read(place, "train", size), size, 3, side, augment, CPU, 2) for place in files]
        assert [loader.data.manifest["format"] for loader in made] == [2, 3]
        if augment is None:
            pairs = [(made[0].in_order().images, made[1].in_order().images)]
        else:
            batches = [list(loader.batches(0, 0, 9, 0, 8)) for loader in made]
            assert all(torch.equal(a.index, b.index) for a, b in zip(*batches, strict=True))
            pairs = [(a.images, b.images) for a, b in zip(*batches, strict=True)]
        difference = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in pairs])
        assert difference.float().mean() <= mean and difference.max() <= most
        for loader in made:
            loader.close()


@pytest.mark.parametrize("kind", ["ffcv", "webdataset"])
def test_the_files_hold_what_can_be_cut(both, photos, kind):
    found = {"ffcv": beton, "webdataset": shards}[kind].read(both(kind)[1], "train", "original")
    descriptors = found.open()
    for i, file in enumerate(sorted((photos / "train").rglob("*.jpg"))):
        data = found.read(descriptors, i)
        assert len(cut(data, 0, 0, 1, 1)[0]) < len(data)
        assert np.array_equal(by_pillow(data), by_pillow(plain(upright(file), 90)))
    for descriptor in descriptors:
        os.close(descriptor)


def test_an_older_file_is_not_taken_for_a_new_one(both, photos, monkeypatch, capsys):
    """It is read, which is said, and not mixed with new ones."""
    monkeypatch.setattr(loaders, "installed", lambda package: True)
    for place in both("ffcv"):
        config = loaders.resolve(config_for(photos, data={"prepared": str(place)}), CPU)
        assert config.loader == "ffcv" and ("older version" in capsys.readouterr().out) == ("old" in place.name)
    with pytest.raises(ConfigError, match=r"was written with format 2 instead of 3.*--overwrite"):
        write("ffcv", photos, both("ffcv")[0], "--sizes", "64", "original")
