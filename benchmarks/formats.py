"""The three formats that DALI reads itself, written with the same JPEGs, and how fast DALI's reader goes through each."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

from benchmarks import measure
from fastrobust.data.loaders.dali import dali
from fastrobust.data.prepared import shards


def _varint(n: int) -> bytes:
    out = b""
    while n > 127:
        out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def _field(number: int, payload: bytes) -> bytes:
    """A length-delimited protobuf field."""
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def example(image: bytes, label: int) -> bytes:
    """A tf.train.Example with `image` and `label`."""
    entries = {b"image": _field(1, _field(1, image)), b"label": _field(3, _field(1, _varint(label)))}
    return _field(1, b"".join(_field(1, _field(1, key) + _field(2, value)) for key, value in entries.items()))


def write(folder: Path, size) -> tuple[Path, int]:
    """TFRecord and RecordIO files beside the shards. DALI checks no CRC of a TFRecord: they are left 0."""
    found = shards.read(folder / "webdataset-jpeg", "train", size)
    descriptors = found.open()
    with (
        open(folder / "a.tfrecord", "wb") as tf,
        open(folder / "a.tfrecord.idx", "w") as tf_index,
        open(folder / "a.rec", "wb") as rec,
        open(folder / "a.rec.idx", "w") as rec_index,
    ):
        for i in range(len(found)):
            image, label = found.read(descriptors, i), int(found.label[i])
            data = example(image, label)
            tf_index.write(f"{tf.tell()} {len(data) + 16}\n")
            tf.write(struct.pack("<QI", len(data), 0) + data + b"\0\0\0\0")
            rec_index.write(f"{i}\t{rec.tell()}\n")
            body = struct.pack("<IfQQ", 0, float(label), i, 0) + image
            rec.write(struct.pack("<II", 0xCED7230A, len(body)) + body + b"\0" * (-len(body) % 4))
    return found.files[0], len(found)


def compare(folder: Path, arguments, repetitions: int) -> None:
    fn, types, Pipeline = dali()
    import nvidia.dali.tfrecord as tfrec

    size = 160
    shard, count = write(folder, size)
    device, batches = torch.device("cpu"), count // arguments.batch_size
    features = {"image": tfrec.FixedLenFeature((), tfrec.string, ""), "label": tfrec.FixedLenFeature([1], tfrec.int64, -1)}
    shuffle = {"random_shuffle": True, "initial_fill": 64, "name": "reader"}

    def tf_record():
        paths = {"path": str(folder / "a.tfrecord"), "index_path": str(folder / "a.tfrecord.idx")}
        found = fn.readers.tfrecord(**paths, features=features, **shuffle)
        return found["image"], found["label"]

    def record_io():
        paths = {"path": [str(folder / "a.rec")], "index_path": [str(folder / "a.rec.idx")]}
        return fn.readers.mxnet(**paths, **shuffle)

    def web_dataset():
        return fn.readers.webdataset(paths=[str(shard)], ext=["jpg", "cls"], **shuffle)

    readers = {"WebDataset": web_dataset, "TFRecord": tf_record, "RecordIO": record_io}
    rows = {}
    for name, read in readers.items():
        for decode in (False, True):
            pipeline = Pipeline(arguments.batch_size, arguments.workers, None)
            with pipeline:
                files, labels = read()
                images = fn.decoders.image(files, device="cpu", output_type=types.RGB) if decode else files
                pipeline.set_outputs(images, labels)
            pipeline.build()
            rows[f"{name}{', decoded' if decode else ', bytes only'}"] = lambda p=pipeline: [p.run() for _ in range(batches)]
    times = measure.interleaved(rows, device, repetitions=repetitions)
    rates = {name: batches * arguments.batch_size / measure.summary(t)["median"] for name, t in times.items()}
    length = {"WebDataset": shard, "TFRecord": folder / "a.tfrecord", "RecordIO": folder / "a.rec"}
    table = [
        [name, f"{rate:,.0f}", f"{length[name.split(',')[0]].stat().st_size / 1e6:.2f}"] for name, rate in rates.items()
    ]
    result = {"images": count, "size": size, "images_per_second": rates}
    measure.report("formats that DALI reads", ["format", "images/s", "MB"], table, result, arguments.json, device)
