"""The loaders of others that `benchmarks.loader` compares with: each is a function of the folder of files, the stored size,
the resolution, the batch size, the number of threads, the device and whether it takes the squares in the images' middles
instead of random-resized crops and flips, and gives a function: a number of batches -> these; or raises ImportError. They
give uint8 batches. Their JPEGs are plain ones: the restart markers of ours would cost them 8 to 11 %."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastrobust.data.prepared import beton, shards
from fastrobust.runtime.torchvision_compat import import_torchvision

os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")  # GNU OpenMP ends what DataLoaders fork

AHEAD = 2  # batches that DALI has ready


def ffcv(folder: Path, size, resolution: int, batch_size: int, workers: int, device: torch.device, middle: bool):
    """FFCV's own Loader."""
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor, ToTorchImage

    to = [ToDevice(device, non_blocking=True)] if device.type == "cuda" else []
    decode = [RandomResizedCropRGBImageDecoder((resolution, resolution)), RandomHorizontalFlip()]
    decode = [CenterCropRGBImageDecoder((resolution, resolution), ratio=1)] if middle else decode
    pipelines = {"image": [*decode, ToTensor(), *to, ToTorchImage()], "label": [IntDecoder(), ToTensor(), *to]}
    threads = torch.get_num_threads()
    options = {"order": OrderOption.RANDOM, "os_cache": True, "drop_last": True, "pipelines": pipelines}
    batches = Loader(str(folder / "plain" / f"train_{size}.beton"), batch_size, workers, **options)
    torch.set_num_threads(threads)  # FFCV sets it
    return passes(batches)


def dali_reader(folder: Path, size, resolution: int, batch_size: int, workers: int, device: torch.device, middle: bool):
    """DALI's own pipeline: its reader of the shards, shuffled, its fused decoder of random crops."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.plugin.pytorch import DALIGenericIterator

    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch_size,
        num_threads=workers,
        prefetch_queue_depth=AHEAD,
        device_id=(device.index or 0) if gpu else None,
    )
    def pipeline():
        shards = [str(file) for file in sorted((folder / "plain").glob(f"train_{size}-*.tar"))]
        reader = {"paths": shards, "ext": ["jpg", "cls"], "random_shuffle": True, "initial_fill": 512, "name": "shards"}
        files, labels = fn.readers.webdataset(missing_component_behavior="error", **reader)
        area, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
        place, linear = {"device": "mixed" if gpu else "cpu", "output_type": types.RGB}, types.INTERP_LINEAR
        labels = fn.pad(labels, fill_value=0)
        if middle:
            images = fn.resize(
                fn.decoders.image(files, **place), resize_shorter=resolution, interp_type=linear, antialias=True
            )
            return fn.crop(images, crop=(resolution, resolution)), labels
        images = fn.decoders.image_random_crop(files, random_area=area, random_aspect_ratio=ratio, **place)
        images = fn.resize(images, size=[float(resolution)] * 2, interp_type=linear, antialias=True)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    iterator = DALIGenericIterator(pipeline(), ["images", "labels"], size=-1, auto_reset=True)

    def one_pass(count: int) -> Iterator:
        for _ in range(AHEAD):  # were made before the pass began
            next(iterator)
        for _ in range(count):
            yield next(iterator)

    return one_pass


def data_loader(read):
    """torch's DataLoader on an image folder; `read` gives a function from an image file to a uint8 H x W x 3 array or an
    image of torchvision's, and says whether RandomResizedCrop works on tensors."""

    def make(folder: Path, size, resolution: int, batch_size: int, workers: int, device: torch.device, middle: bool):
        torchvision = import_torchvision()
        transforms = torchvision.transforms
        open_file, tensors = read()
        steps = steps_of(transforms, resolution, middle) + ([] if tensors else [transforms.PILToTensor()])
        data = torchvision.datasets.ImageFolder(
            str(folder / "plain" / f"{size}"), transforms.Compose(steps), loader=open_file
        )
        options = {"num_workers": workers, "pin_memory": device.type == "cuda", "drop_last": True}
        return passes(torch.utils.data.DataLoader(data, batch_size, shuffle=True, **options), device)

    return make


def steps_of(transforms, resolution: int, middle: bool) -> list:
    if middle:
        return [transforms.Resize(resolution, antialias=True), transforms.CenterCrop(resolution)]
    return [transforms.RandomResizedCrop(resolution, antialias=True), transforms.RandomHorizontalFlip()]


def webdataset(folder: Path, size, resolution: int, batch_size: int, workers: int, device: torch.device, middle: bool):
    """The WebDataset library on the tars, decoded by simplejpeg. Each worker reads whole tars: here all of them read all."""
    import webdataset as wds
    from simplejpeg import decode_jpeg

    change = import_torchvision().transforms.Compose(steps_of(import_torchvision().transforms, resolution, middle))
    tars = [str(file) for file in sorted((folder / "plain").glob(f"train_{size}-*.tar"))]
    data = wds.WebDataset(tars, shardshuffle=False, workersplitter=None, nodesplitter=None, empty_check=False)
    data = data.shuffle(512).to_tuple("jpg", "cls")
    data = data.map_tuple(lambda jpeg: change(tensor(decode_jpeg(jpeg, "RGB", fastdct=True))), int)
    options = {"num_workers": workers, "pin_memory": device.type == "cuda", "drop_last": True}
    return passes(torch.utils.data.DataLoader(data, batch_size, **options), device)


def by_pillow():
    def open_file(path: str) -> Image.Image:
        with open(path, "rb") as file:
            return Image.open(io.BytesIO(file.read())).convert("RGB")

    return open_file, False


def by_torchvision():
    torchvision = import_torchvision()
    from torchvision.io import ImageReadMode, decode_jpeg

    def open_file(path: str) -> torch.Tensor:
        with open(path, "rb") as file:
            return decode_jpeg(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8), mode=ImageReadMode.RGB)

    try:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8)).save(buffer, "JPEG")
        decode_jpeg(torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8))
    except (RuntimeError, AttributeError) as error:
        raise ImportError(f"this build of torchvision {torchvision.__version__} decodes no JPEG") from error
    return open_file, True


def by_simplejpeg():
    from simplejpeg import decode_jpeg

    return lambda path: tensor(decode_jpeg(Path(path).read_bytes(), "RGB", fastdct=True)), True


def by_pyturbojpeg():
    from turbojpeg import TJFLAG_FASTDCT, TJPF_RGB, TurboJPEG

    try:
        decoder = TurboJPEG()
    except (OSError, RuntimeError) as error:  # no library, or one that is too old
        raise ImportError(str(error).splitlines()[0]) from error
    return lambda path: tensor(decoder.decode(Path(path).read_bytes(), TJPF_RGB, flags=TJFLAG_FASTDCT)), True


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def passes(batches, device: torch.device | None = None):
    """count -> so many batches of one epoch; with `device` moved there, with the channels last."""

    def one_pass(count: int) -> Iterator:
        for _, (images, labels) in zip(range(count), batches, strict=False):
            if device is not None:
                images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
                labels = labels.to(device, non_blocking=True)
            yield images, labels

    return one_pass


OTHERS = {
    "FFCV's Loader": ffcv,
    "DALI's pipeline": dali_reader,
    "DataLoader": data_loader(by_pillow),
    "DataLoader, decode_jpeg": data_loader(by_torchvision),
    "DataLoader, simplejpeg": data_loader(by_simplejpeg),
    "DataLoader, PyTurboJPEG": data_loader(by_pyturbojpeg),
    "WebDataset, simplejpeg": webdataset,
}


def write_plain(source: Path, folder: Path, sizes: list, quality: int = 90) -> None:
    """The pixels of .beton files of bare ones as plain JPEGs: .beton files, tars and an image folder for each size."""
    folder.mkdir()
    for size in sizes:
        found = beton.read(source, "train", size)
        descriptors, stem = found.open(), folder / f"train_{size}"
        writers = [beton.BetonWriter(stem.with_suffix(".beton"), len(found)), shards.ShardWriter(stem, len(found))]
        for i, label in enumerate(found.label.tolist()):
            height, width = int(found.height[i]), int(found.width[i])
            pixels = np.frombuffer(found.read(descriptors, i), np.uint8, height * width * 3)
            file = folder / f"{size}" / f"{label:04}" / f"{i:08}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(height, width, 3)).save(file, quality=quality)
            for writer in writers:
                writer.add(label, height, width, False, file.read_bytes())
        for path in [path for writer in writers for path in writer.close()]:
            path.rename(path.with_name(path.name.removesuffix(".partial")))
        for descriptor in descriptors:
            os.close(descriptor)
