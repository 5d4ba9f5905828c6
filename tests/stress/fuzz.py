"""Damaged files of every kind that is read: each must be refused with an error that names it, or be read correctly. Where a
format has no checksum, a file may also be read as something else; those are counted apart."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import random
import re
import signal
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from fastrobust.__main__ import main as cli
from fastrobust.config import parts, reading
from fastrobust.data import formats, loaders, sets
from fastrobust.data.prepared import beton, records
from fastrobust.models.weights import build_model, read_weights, save_weights
from fastrobust.runtime import run_directory
from fastrobust.runtime.errors import FastrobustError
from tests.stress import child, tiny

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 3 << 30  # bytes that a process may take beyond what it has
CASE_SECONDS = 20  # for one file


class Target(NamedTuple):
    """file: what is damaged. content: what it holds undamaged. read() gives its content in a form that can be compared.
    has_checksum: a change cannot go unnoticed. mutate(content, rng) gives a damaged content."""

    file: Path
    content: bytes
    read: Callable[[], Any]
    has_checksum: bool
    mutate: Callable[[bytes, random.Random], bytes]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to six changes: bits, bytes, numbers, and blocks that are cut, doubled, zeroed or shuffled."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        place = rng.randrange(len(data) + 1) if rng.random() < 0.6 else rng.randrange(min(len(data), 512) + 1)
        size = min(rng.choice((1, 2, 4, 16, 200, 3000)), len(data) - place)
        kind = rng.randrange(9)
        if kind == 0 and size:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            data[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 2:
            number = rng.choice((0, 1, -1, 2**31 - 1, -(2**31), rng.randrange(-(2**31), 2**31)))
            data[place : place + 4] = struct.pack(rng.choice("<>") + "i", number)
        elif kind == 3:
            del data[place : place + size]
        elif kind == 4:
            data[place:place] = data[place : place + size]
        elif kind == 5:
            data[place:place] = rng.randbytes(rng.choice((1, 4, 100)))
        elif kind == 6:
            data[place : place + size] = bytes(size)
        elif kind == 7:
            data[place : place + size] = rng.randbytes(size)
        else:
            del data[place:]
    return bytes(data)


def mutate_text(content: bytes, rng: random.Random) -> bytes:
    """One to four edits of characters, words or lines, as people and editors make them."""
    text = content.decode()
    for _ in range(rng.randint(1, 4)):
        lines = text.split("\n")
        i, j = rng.randrange(len(text) + 1), rng.randrange(len(lines))
        character = rng.choice("0123456789.-/:,{}[]#&*!|>'\"%@ \n\tabezxNé\0")
        kind = rng.randrange(8)
        if kind == 0:
            text = text[:i] + text[i + 1 :]
        elif kind == 1:
            text = text[:i] + character + text[i + 1 :]
        elif kind == 2:
            text = text[:i] + character + text[i:]
        elif kind == 3:
            text = "\n".join(lines[:j] + lines[j + 1 :])
        elif kind == 4:
            text = "\n".join([*lines[:j], lines[rng.randrange(len(lines))], *lines[j:]])
        elif kind == 5:
            lines[j] = lines[rng.randrange(len(lines))]
            text = "\n".join(lines)
        elif kind == 6:
            words = re.findall(r"[\w./-]+", text) or [""]
            odd = ["null", "true", "1e999", "-1", "[]", "{}", "8", "*a", "!!python/object/apply:os.getcwd"]
            other = [*words, *odd]
            text = text.replace(rng.choice(words), rng.choice(other), 1)
        else:
            text = text[:i] + text[i : i + 30] * rng.choice((2, 3, 50)) + text[i + 30 :]
    return text.encode()


# ---- what is read


def arrays(found: sets.ImageSet) -> tuple:
    return found.images.numpy().tobytes(), found.labels.tolist(), found.classes


def configs(folder: Path) -> list[Target]:
    """Every config of the project."""
    found = sorted((ROOT / "configs").glob("*.yaml"))
    return [
        Target(folder / file.name, file.read_bytes(), lambda file=file: reading.load(folder / file.name), False, mutate_text)
        for file in found
    ]


def idx(folder: Path) -> list[Target]:
    """MNIST's files, plain and gzipped, with the checksums of these contents in the place of the known ones."""
    noise = np.random.default_rng(0)
    images, labels = noise.integers(0, 256, (20, 28, 28), np.uint8), (np.arange(20) % 10).astype(np.uint8)
    contents = [struct.pack(">4I", 0x803, 20, 28, 28) + images.tobytes(), struct.pack(">2I", 0x801, 20) + labels.tobytes()]
    sets._IDX_MD5["mnist", "train"] = [hashlib.md5(content).hexdigest() for content in contents]
    targets = []
    for suffix, pack in {"": bytes, ".gz": lambda content: gzip.compress(content, mtime=0)}.items():
        place = folder / f"idx{suffix}"
        place.mkdir()
        for split in ("train", "test"):
            for name, content in zip(sets._IDX_NAMES[split], contents, strict=True):
                (place / f"{name}{suffix}").write_bytes(pack(content))
        for name in sets._IDX_NAMES["train"]:
            file = place / f"{name}{suffix}"
            read = lambda place=place: arrays(sets.load("mnist", "train", place))
            targets.append(Target(file, file.read_bytes(), read, True, mutate_bytes))
    return targets


def cifar_pickles(folder: Path) -> list[Target]:
    noise = np.random.default_rng(0)
    targets = []
    for protocol in (2, 4):
        place = folder / f"protocol{protocol}"
        place.mkdir()
        for name in [*formats.CIFAR_BATCHES["train"], "test_batch"]:
            batch = {"data": noise.integers(0, 256, (6, 3072), np.uint8), "labels": noise.integers(0, 10, 6).tolist()}
            (place / name).write_bytes(pickle.dumps(batch, protocol=protocol))
        file = place / "data_batch_3"
        read = lambda place=place: arrays(sets.load("cifar10", "train", place))
        targets.append(Target(file, file.read_bytes(), read, False, mutate_bytes))
    return targets


def photograph(seed: int, size: int = 48) -> Image.Image:
    """A smooth coloured picture with noise, as a photograph compresses."""
    noise = np.random.default_rng(seed)
    coarse = Image.fromarray(noise.integers(0, 256, (5, 5, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse).astype(int) + noise.integers(-6, 7, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encoded(seed: int, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    photograph(seed).save(buffer, kind, **options)
    return buffer.getvalue()


def archives(folder: Path) -> list[Target]:
    """Tars of JPEGs, plain and compressed."""
    targets = []
    for suffix in (".tar", ".tar.gz", ".tar.xz"):
        file = folder / f"images{suffix}"
        with tarfile.open(file, f"w:{suffix.rpartition('.')[2].replace('tar', '')}") as archive:
            for i in range(8):
                content = encoded(i, "JPEG", quality=75)
                info = tarfile.TarInfo(f"{'train' if i < 4 else 'val'}/class{i % 2}/{i}.jpg")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        read = lambda file=file: arrays(sets.load("image_folder", "train", file, resolution=32))
        targets.append(Target(file, file.read_bytes(), read, suffix != ".tar", mutate_bytes))
    return targets


def images(folder: Path) -> list[Target]:
    targets = []
    kinds = {"JPEG": {"quality": 75}, "PNG": {}, "WEBP": {}, "GIF": {}, "BMP": {}, "TIFF": {}, "PPM": {}}
    progressive = encoded(0, "JPEG", progressive=True, subsampling=0)
    contents = {kind.lower(): encoded(0, kind, **options) for kind, options in kinds.items()} | {"jpg": progressive}
    for suffix, content in contents.items():
        file = folder / f"image.{suffix}"
        member = formats.Member(file.name, str(file), file.read_bytes)
        read = lambda member=member: formats.decode_all([member], 32, resize=True).tobytes()
        for _ in range(8 if suffix in ("jpeg", "jpg", "png") else 1):  # what people have
            targets.append(Target(file, content, read, suffix == "png", mutate_bytes))
    return targets


def checkpoint_of(folder: Path) -> tuple[Path, bytes]:
    tensors = {
        "a": torch.arange(300.0).reshape(20, 15),
        "b": torch.zeros((), dtype=torch.int64),
        "rng": torch.get_rng_state(),
    }
    run_directory.save_checkpoint(folder, tensors, {"position": {"step": 3}, "history": [{"loss": 0.5}]})
    return folder / run_directory.CHECKPOINT, (folder / run_directory.CHECKPOINT).read_bytes()


def comparable(tensors: dict[str, torch.Tensor]) -> list:
    return [(name, t.dtype, t.shape, t.contiguous().numpy().tobytes()) for name, t in tensors.items()]


def checkpoints(folder: Path) -> list[Target]:
    file, content = checkpoint_of(folder)

    def read():
        tensors, facts = run_directory.load_checkpoint(folder)
        return comparable(tensors), facts

    return [Target(file, content, read, True, mutate_bytes)]


def sealed_checkpoints(folder: Path) -> list[Target]:
    """Changed by someone who put the right checksum on them: what torch's reader makes of them."""
    (target,) = checkpoints(folder)
    plain = target.content[: -len(run_directory._seal(64 * "0"))] + bytes(2)

    def mutate(content: bytes, rng: random.Random) -> bytes:
        changed = mutate_bytes(plain, rng) + (bytes(2) if rng.random() < 0.5 else b"")
        return changed[:-2] + run_directory._seal(hashlib.sha256(changed[:-2] + bytes(2)).hexdigest())

    return [target._replace(mutate=mutate, has_checksum=False)]


def weights(folder: Path) -> list[Target]:
    settings = reading.load(tiny.write_config(folder, folder))
    torch.manual_seed(0)
    classes = tuple(f"bar{i}" for i in range(10))
    save_weights(folder, build_model(settings, classes), settings, classes)
    file = folder / run_directory.WEIGHTS

    def read():
        model, found, classes = read_weights(file)
        return comparable(model.state_dict()), found.to_dict(), classes

    return [Target(file, file.read_bytes(), read, True, mutate_bytes)]


def decoded(name: str, found: records.Records) -> tuple:
    """What a loader makes of prepared images, in order, as 32 x 32 pixels: FFCV's native decoder, DALI's, or Pillow."""
    kind = parts.find("loader", parts.LOADERS, name)
    loader = kind(found, "original", 3, 32, None, torch.device("cpu"), workers=1)
    try:
        return arrays(loader.in_order())
    finally:
        loader.close()


def loaders_here() -> list[str]:
    there = {name: loaders.available(name) for name in ("ffcv", "dali", "torch")}
    return [name for name, installed in there.items() if installed]


def prepared(folder: Path) -> list[Target]:
    """FFCV files and WebDataset shards, their indices and manifests."""
    beton.PAGE = 1 << 15  # else nearly all of a file is empty
    targets = []
    for kind, name in (("ffcv", "ffcv"), ("dali", "torch")):
        if name not in loaders_here():
            continue
        read_records = loaders.READERS[loaders.PREPARED[kind][0]]
        place, source = folder / kind, tiny.write_images(folder / "source", train=10, test=10, size=48)
        options = ["--data", source, "--output", place, "--storage", "mixed", "--workers", 1, "--splits", "train"]
        assert cli(["prepare", kind, *map(str, ["image_folder", *options])]) == 0
        read = lambda name=name, place=place, records=read_records: decoded(name, records(place, "train", "original"))
        for file in sorted(place.iterdir()):
            targets.append(Target(file, file.read_bytes(), read, True, mutate_bytes))
    return targets


def decoders(folder: Path) -> list[Target]:
    """JPEGs in prepared files by someone who put the right checksums on them: what the loaders' decoders make of them. Half
    of those that changed in length have another size in the index than in the picture."""
    (folder / "x").mkdir()
    targets = []
    for name in loaders_here():
        for options in ({}, {"progressive": True, "subsampling": 0}):
            file = folder / "x" / f"{name}{len(options)}.data"
            content = encoded(0, "JPEG", quality=75, **options)

            def read(name=name, file=file, content=content):
                data = file.read_bytes()
                height, width = (48, 48) if (len(data) - len(content)) % 2 == 0 else (len(data) % 97 + 1, 31)
                row = np.array([(0, 0, len(data), height, width, 0, 0, zlib.crc32(data))], records.ROW)
                columns = {column: row[column] for column in records.ROW.names}
                columns["raw"] = columns["raw"].astype(bool)
                return decoded(name, records.Records((file,), **columns, classes=("a",), manifest={"files": []}))

            targets.append(Target(file, content, read, False, mutate_bytes))
    return targets


TARGETS = {
    "configs": configs,
    "idx": idx,
    "cifar_pickles": cifar_pickles,
    "archives": archives,
    "images": images,
    "checkpoints": checkpoints,
    "sealed_checkpoints": sealed_checkpoints,
    "weights": weights,
    "prepared": prepared,
    "decoders": decoders,
}


# ---- the fuzzer


def judge(target: Target, expected: Any) -> tuple[str, str]:
    """(verdict, message) for the file as it is now."""
    try:
        found = target.read()
    except FastrobustError as error:
        text = str(error)
        return ("refused", text) if target.file.name in text else ("a bug: the file is not named", text)
    except Exception as error:
        return f"a bug: {type(error).__name__}", str(error)
    if found == expected:
        return "read correctly", ""
    return ("a bug: a change went unnoticed" if target.has_checksum else "read as something else"), ""


def fuzz_here(name: str, folder: str, count: int, seed: int, first: int) -> int:
    """Cases `first` to `count` of a target, in this process. After each, folder/verdicts.jsonl has a line more."""
    child.limit_memory(MEMORY)
    place = Path(folder) / f"from{first}"
    place.mkdir()
    targets = TARGETS[name](place)
    for target in targets:
        target.file.write_bytes(target.content)
    expected = [target.read() for target in targets]
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a case that takes too long ends this process
    with open(Path(folder) / "verdicts.jsonl", "a") as verdicts:
        for case in range(first, count):
            rng = random.Random(seed * 1_000_003 + case)
            which = rng.randrange(len(targets))
            content = targets[which].mutate(targets[which].content, rng)
            if content == targets[which].content:
                verdict = "unchanged", ""
            else:
                targets[which].file.write_bytes(content)
                signal.alarm(CASE_SECONDS)
                verdict = judge(targets[which], expected[which])
                signal.alarm(0)
                for left in place.glob("*.damaged.pt"):
                    left.unlink()
                targets[which].file.write_bytes(targets[which].content)
            verdicts.write(json.dumps([case, *verdict]) + "\n")
            verdicts.flush()
    return 0


def fuzz(name: str, folder: Path, count: int, seed: int = 0) -> dict:
    """`count` damaged files of a target. A process that crashes or hangs is a bug of the case that it was at."""
    folder.mkdir(parents=True)
    verdicts, done = folder / "verdicts.jsonl", 0
    crashes = []
    while done < count and len(crashes) < 20:
        ended = child.run(fuzz_here, name, str(folder), count, seed, done, log=folder / "log", limit=60 + count)
        done = len(verdicts.read_text().splitlines()) if verdicts.exists() else 0
        if ended.status != 0:
            crashes.append(f"case {done}: {child.ended_by(ended.status)} {ended.output[-300:]}")
            with open(verdicts, "a") as file:
                file.write(json.dumps([done, f"a bug: {child.ended_by(ended.status)}", ""]) + "\n")
            done += 1
    lines = [json.loads(line) for line in verdicts.read_text().splitlines()]
    counts = Counter(verdict for _, verdict, _ in lines)
    bugs = [f"case {case}: {verdict}: {text[:300]}" for case, verdict, text in lines if verdict.startswith("a bug")]
    return {"files": len(lines), "verdicts": dict(counts.most_common()), "wrong": bugs[:10] + crashes[:3]}
