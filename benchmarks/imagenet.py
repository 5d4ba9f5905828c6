"""The ImageNet schedule: images/s of training in each of its phases, and from that the hours, the disk space and the limit.

    python -m benchmarks.imagenet              # a GPU; on the config's prepared files, else on a sample
    python -m benchmarks.imagenet --quick      # two CPU cores: batches of 4, a few minutes; shows that it works, no more
    python -m benchmarks.imagenet --config configs/imagenette_3phase.yaml model.name=resnet50

Each phase is one training step (the config's method, model and precision; the engine as in training), fed in turn with one
synthetic batch that stays on the device, and with real batches of every loader that is installed. The same loader is timed
alone: what it gives over what training on the synthetic batch takes says which of data and compute is the limit.
Hours are images x passes / rate, summed over the phases.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import loader as loader_benchmark
from benchmarks import measure
from fastrobust.attack.verdicts import evaluating
from fastrobust.config import reading
from fastrobust.config.schema import Config
from fastrobust.data import formats, loaders, sets
from fastrobust.data.batch import Batch
from fastrobust.data.loaders.resident import Resident
from fastrobust.data.prepared import records, writing
from fastrobust.runtime import distributed
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import DataError, FastrobustError, first_line
from fastrobust.runtime.limits import cores
from fastrobust.runtime.operations import Operations
from fastrobust.train import engine
from fastrobust.train.step import Step, build

ROOT = Path(__file__).resolve().parents[1]
IMAGES = 1_281_167  # of ImageNet, for training
LEAD = 5  # untimed batches at the start of a loader's turn: more than it has ready
GOAL = 1.5  # a loader should give this many times what training takes
SYNTHETIC = "synthetic"
FILES = {
    "torch": "webdataset",
    "ffcv": "ffcv",
    "dali": "webdataset",
}  # loader: its kind of prepared files; torch first, its workers are forked


# ---- images


def pictures(config: Config, count: int) -> tuple[sets.Pictures, str]:
    """(`count` training images, what they are): evenly out of the config's data set if that is there, else ImageNet
    samples or generated ones. Too few are repeated."""
    try:
        found = sets.pictures(config.data.dataset, "train", config.data.path, count)
    except DataError:
        files, what = loader_benchmark.sample_images(count)
        members = [formats.Member(f"{i}.jpg", f"image {i} of {what}", lambda f=f: f) for i, f in enumerate(files)]
        image, where = (lambda i: formats.open_upright(members[i])), (lambda i: members[i].where)
        classes = tuple(f"{k:03}" for k in range(1000))
        found = sets.Pictures(image, where, lambda i: members[i].name, np.arange(len(files)) % 1000, classes, what)
    distinct = len(found.labels)
    again = {part: lambda i, part=part: getattr(found, part)(i % distinct) for part in ("image", "where", "name")}
    repeated = found._replace(labels=found.labels[np.arange(count) % distinct], **again)
    return repeated, f"{count} images, {distinct} of them distinct, of {found.source}"


def write_sample(config: Config, folder: Path, count: int) -> tuple[dict[str, Config], str]:
    """Prepared files of a sample, and loader -> the config that reads them with it."""
    source, what = pictures(config, count)
    sizes = tuple(dict.fromkeys(loaders.stored(config, phase) for phase in config.phases))
    options = {"dataset": config.data.dataset, "limit": None, "cap": None, "quality": 90, "storage": "jpeg"}
    options |= {"skip_corrupt": False, "overwrite": False, "workers": cores()}
    for kind in dict.fromkeys(FILES.values()):
        writing.write_split(kind, "train", source, sizes, Namespace(**options, output=folder / kind))
    whole = changed(config, data={"limit": None})
    return {name: reading_with(whole, name, folder / kind) for name, kind in FILES.items()}, f"a sample: {what}"


def prepared(config: Config) -> dict[str, Config]:
    """The same for the prepared files that the config finds as it is."""
    there = {name: loaders.folder(config, kind) for name, kind in FILES.items() if loaders.prepared(config, kind)}
    return {name: reading_with(config, name, place) for name, place in there.items()}


def reading_with(config: Config, name: str, place: Path) -> Config:
    return changed(config, loader=name, data={"prepared": str(place)})


def records_of(config: Config, phase) -> records.Records:
    kind = loaders.kind_of_files(config)
    return loaders.read_records(config, kind, "train", loaders.stored(config, phase), config.data.limit)


def disk(config: Config, configs: dict[str, Config], images: int) -> dict[str, dict[str, float]]:
    """For every kind and stored size: bytes of an image on average, and GB of as many images: the files' own bytes where
    all of them are there, else the mean times the number."""
    result = {}
    for name in ("ffcv", "dali"):
        for phase in config.phases if name in configs else ():
            found = records_of(configs[name], phase)
            mean, files = found.length.mean().item(), sum(file["bytes"] for file in found.manifest["files"])
            whole = files if len(found) == images else mean * images
            facts = {"bytes_per_image": mean, "gigabytes": whole / 1e9, "judged_from": len(found)}
            result[f"{name} {loaders.stored(config, phase)}"] = facts
    return result


# ---- one phase


def changed(config: Config, **sections: Any) -> Config:
    """The config with other values in some sections, checked as any config is."""
    values = config.to_dict()
    for key, value in sections.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) else value
    return reading.parse(values, "the benchmark")


def synthetic_step(config: Config, index: int, classes: int, device: torch.device) -> tuple[Step, Batch]:
    """The training step of a phase, and a batch of random images on the device. They have the size of the crop, like those
    that a decoding loader gives: the same step serves both."""
    phase = config.phases[index]
    whole = phase.model_dump() | {"resize": phase.resolution}
    plain = {"augment": {"crop": "none", "flip": False}, "prepared": None, "limit": None}
    one = changed(config, phases=[whole], data=plain)
    generator = torch.Generator().manual_seed(0)
    shape = (phase.batch_size, phase.resolution, phase.resolution, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (phase.batch_size,), generator=generator)
    names = tuple(map(str, range(classes)))
    loader = Resident(sets.ImageSet(pixels.permute(0, 3, 1, 2), labels, names, SYNTHETIC), device)
    return build(one, loader, device), next(loader.batches(0, 0, phase.batch_size, 0, 1))


def flops(step: Step, batch: Batch) -> dict[str, float]:
    """Floating-point operations of convolutions and linear layers, for one image: of a forward pass, and of a whole step
    (counted while it is run), one without the gradient of the first layer that every eighth step has."""
    step.learner.looks = False
    x = torch.zeros(1, *batch.images.shape[1:], device=batch.images.device)
    with Operations() as forward, evaluating(step.learner.model), torch.no_grad():
        step.learner.model(x)
    with Operations() as whole:
        step.take(batch)
    return {"forward": forward.number, "step": whole.number / len(batch.labels)}


def memory_used(device: torch.device) -> dict[str, float] | None:
    """GB: what torch has taken for training, and all that is taken on the GPU, the loaders' and the driver's share too."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return {"torch": torch.cuda.max_memory_reserved(device) / 1e9, "gpu": (total - free) / 1e9}


def open_loader(config: Config, index: int, batches: int, device: torch.device):
    """(loader, an iterator over `batches` of its batches, of which the first is already taken)."""
    found = loaders.Phases(config, device).enter(index)
    try:
        coming = found.batches(0, index, config.phases[index].batch_size, 0, batches)
        next(coming)
    except BaseException:
        found.close()
        raise
    return found, coming


def measure_phase(
    config: Config, index: int, configs: dict[str, Config], classes: int, device: torch.device, options: Namespace
) -> dict[str, Any]:
    """A loader's training turn comes right after its turn alone, which leaves nothing ready: no head start."""
    phase = config.phases[index]
    gc.collect()  # a step and its engine hold each other: the last phase's memory
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    step, batch = synthetic_step(config, index, classes, device)
    counted = flops(step, batch)
    run = engine.prepare(step.engine, step.take, batch, step)
    rows: dict[str, Callable] = {SYNTHETIC: lambda: run(batch)}
    lead, pull = (LEAD, 1) if device.type == "cuda" else (1, LEAD)  # a step on a CPU takes seconds: one must do
    batches = 1 + (1 + pull) * (1 + options.repetitions * (lead + options.steps))
    opened, failed = [], {}
    for name, found in configs.items():
        try:
            loader, coming = open_loader(found, index, batches, device)
        except (FastrobustError, RuntimeError) as error:
            failed[name] = first_line(error)
            print(f"warning: the loader {name} failed and is left out: {first_line(error)}", file=sys.stderr)
            continue
        opened.append((loader, coming))
        rows[f"{name} alone"] = lambda coming=coming: [next(coming) for _ in range(pull)]
        rows[name] = lambda coming=coming: run(next(coming))
    try:
        times = measure.interleaved(rows, device, repetitions=options.repetitions, inner=options.steps, lead=lead)
        memory = memory_used(device)
    finally:
        for loader, coming in opened:
            coming.close()
            loader.close()
    times = {name: [s / pull for s in t] if name.endswith(" alone") else t for name, t in times.items()}
    return {
        "resize": phase.resize,
        "resolution": phase.resolution,
        "batch_size": phase.batch_size,
        "passes": config.passes(phase),
        "engine": step.engine,
        "captured": isinstance(run, engine.GraphStep),
        "flops_per_image": counted,
        "memory_gb": memory,
        "failed": failed,
        "images_per_second": {name: rate(t, phase.batch_size) for name, t in times.items()},
        "limit": limits(times),
    }


def rate(times: list[float], batch_size: int) -> dict[str, float]:
    """Images/s."""
    s = measure.summary(times)
    return {"median": batch_size / s["median"], "min": batch_size / s["max"], "max": batch_size / s["min"]}


def limits(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """For every loader: what it gives alone, over what training on a synthetic batch takes; and which of the two is the
    limit."""
    found = {}
    for name in times:
        if f"{name} alone" in times:
            over = measure.ratio(times[SYNTHETIC], times[f"{name} alone"])
            found[name] = {"loader_over_training": over, "limit": "data" if over < 1 else "compute", "goal": over >= GOAL}
    return found


# ---- all phases


def project(phases: list[dict[str, Any]], images: int) -> dict[str, float]:
    """Hours of all phases for every source of images that was measured in all of them: images x passes / rate."""
    names = [name for name in phases[0]["images_per_second"] if not name.endswith(" alone")]
    seconds = {}
    for name in names:
        rates = [phase["images_per_second"].get(name) for phase in phases]
        if all(rates):
            seconds[name] = sum(images * p["passes"] / r["median"] for p, r in zip(phases, rates, strict=True))
    return {name: s / 3600 for name, s in seconds.items()}


def table(phases: list[dict[str, Any]], hours: dict[str, float], images: int) -> Iterator[list[str]]:
    for number, phase in enumerate(phases):
        rates, memory = phase["images_per_second"], phase["memory_gb"]
        for name, r in rates.items():
            if name.endswith(" alone"):
                continue
            cells = [f"{number}: {phase['resize']} → {phase['resolution']}, {phase['batch_size']}", name]
            cells.append(f"{r['median']:,.3g} ({r['min']:,.3g} to {r['max']:,.3g})")
            cells.append(f"{r['median'] * phase['flops_per_image']['step'] / 1e12:.3g}")
            if found := phase["limit"].get(name):
                alone = rates[f"{name} alone"]["median"]
                cells += [f"{alone:,.3g}", f"{found['loader_over_training']:.2f}", found["limit"], ""]
            else:
                cells += ["", "", "", f"{memory['torch']:.1f}" if memory else ""]
            yield [*cells, f"{images * phase['passes'] / r['median'] / 3600:.3g}"]
    for name, total in hours.items():
        yield ["all phases", name, "", "", "", "", "", "", f"{total:.3g}"]


def main() -> int:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the config, as in training")
    p.add_argument("--config", default=str(ROOT / "configs/imagenet_3phase.yaml"))
    p.add_argument("--batch-size", type=int, help="of every phase; default: the config's, with --quick on a CPU 4")
    p.add_argument("--images", type=int, help="images of a sample, where no prepared files are found")
    p.add_argument("--steps", type=int, help="timed steps of each row's turn (default 20; with --quick 10, on a CPU 1)")
    p.add_argument("--repetitions", type=int, help="default 5, with --quick 2")
    return main_with_errors(lambda: run(p.parse_intermixed_args()))


def run(options: Namespace) -> int:
    config = reading.load(options.config, options.overrides)
    device = distributed.pick_device(options.device)
    small = options.quick and device.type != "cuda"
    options.steps = options.steps or (1 if small else 10 if options.quick else 20)
    options.repetitions = options.repetitions or (2 if options.quick else 5)
    batch_size = options.batch_size or (4 if small else None)
    if batch_size:
        config = changed(config, phases=[phase.model_dump() | {"batch_size": batch_size} for phase in config.phases])
    if device.type != "cuda":
        config = changed(config, precision="fp32")  # half precision is for GPUs
    with tempfile.TemporaryDirectory() as temporary:
        configs, what = prepared(config), "the config's prepared files"
        if not configs:
            count = options.images or (32 if small else 2048)
            configs, what = write_sample(config, Path(temporary), max(count, *(p.batch_size for p in config.phases)))
        first = records_of(next(iter(configs.values())), config.phases[0])
        images = IMAGES if config.data.dataset == "imagenet" else len(first)
        space = disk(config, configs, images)
        usable = {n: configs[n] for n in FILES if n in configs and loaders.available(n)}
        phases = []
        for index, phase in enumerate(config.phases):
            print(f"phase {index}: {phase.resolution} pixels, batches of {phase.batch_size}", file=sys.stderr, flush=True)
            phases.append(measure_phase(config, index, usable, len(first.classes), device, options))
    hours = project(phases, images)
    said = f"projected from {options.repetitions} x {options.steps} steps of each phase to {images:,} images a pass"
    if batch_size:
        said += f", with batches of {batch_size} in every phase instead of the config's: not what the config would take"
    memory = [phase["memory_gb"] for phase in phases if phase["memory_gb"]]
    result = {
        "config": Path(options.config).name,
        "overrides": options.overrides,
        "method": config.method.name,
        "model": config.model.name,
        "precision": config.precision,
        "images": what,
        "images_per_pass": images,
        "steps": options.steps,
        "repetitions": options.repetitions,
        "phases": phases,
        "hours": hours,
        "hours_are": said,
        "disk": space,
        "largest_memory_gb": {key: max(m[key] for m in memory) for key in memory[0]} if memory else None,
    }
    print(f"images: {what}\nhours: {said}")
    for name, facts in space.items():
        size = f"{facts['bytes_per_image'] / 1e3:.1f} kB an image, {facts['gigabytes']:.3g} GB for {images:,}"
        print(f"{name}: {size} (judged from {facts['judged_from']:,})")
    for number, phase in enumerate(phases):
        forward, step = (phase["flops_per_image"][part] / 1e9 for part in ("forward", "step"))
        print(f"phase {number}: {forward:.2f} GFLOP an image forward, {step:.2f} in a step: {step / forward:.2f} units")
    columns = ["phase, batch", "images", "images/s, median (min to max)", "TFLOP/s", "loader alone", "over training"]
    columns += ["limit", "GB", f"hours (batches of {batch_size})" if batch_size else "hours"]
    title = f"imagenet, {config.method.name}, {config.model.name}, {config.precision}"
    measure.report(title, columns, list(table(phases, hours, images)), result, options.json, device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
