"""One training step: images/s of every method, engine and precision against the usual loop, on the paper's ResNet-18.

    python -m benchmarks.step --quick          # two CPU cores: a few minutes
    python -m benchmarks.step --json benchmarks/results/step.json
    OMP_NUM_THREADS=1 python -m benchmarks.step --quick --engines   # FGSM in fp32 and bf16, with every engine

Images are random: what is in them does not change the time. Batches are ready in memory, for the usual loop too.
"""

from __future__ import annotations

import time

import torch

from benchmarks import measure, usual_loop
from fastrobust.config import parts, reading
from fastrobust.config.schema import Config
from fastrobust.data.loaders.resident import Resident
from fastrobust.data.sets import ImageSet
from fastrobust.models import winograd
from fastrobust.runtime import distributed, half
from fastrobust.train.step import build

MODEL = "preact_resnet18_paper"
METHODS = {
    "standard": {"name": "standard"},
    "fgsm": {"name": "fgsm"},
    "pgd-7": {"name": "pgd", "steps": 7, "alpha": "2/255"},
    "free-8": {"name": "free", "replays": 8},
}


def images(n: int, side: int = 32) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (n,), generator=generator)
    return ImageSet(pixels.permute(0, 3, 1, 2), labels, tuple("0123456789"), "random")


def network() -> torch.nn.Module:
    """The model without its normalisation, as the usual loop takes it."""
    return parts.find("model.name", parts.MODELS, MODEL)(3, 10)


def cifar_config(method: str, engine_name: str, precision: str, batch_size: int, epochs: int = 100) -> Config:
    return reading.parse(
        {
            "name": "benchmark",
            "engine": engine_name,
            "precision": precision,
            "epsilon": "8/255",
            "data": {"dataset": "cifar10", "augment": {"crop": "pad", "flip": True}},
            "model": {"name": MODEL},
            "method": METHODS[method],
            "optimizer": {"name": "sgd"},
            "schedule": {"name": "cyclic", "max_lr": 0.2},
            "phases": [{"epochs": epochs, "batch_size": batch_size}],
        },
        "the benchmark",
    )


def main() -> None:
    p = measure.arguments(__doc__.splitlines()[0])
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--compile", action="store_true", help="with --quick: also the compiled engine, which takes minutes")
    p.add_argument("--engines", action="store_true", help="FGSM alone, in every precision and with every engine")
    arguments = p.parse_args()
    device, batch_size = distributed.pick_device(arguments.device), arguments.batch_size
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = True
    data = images(4 * batch_size)
    loader = Resident(data, device)
    batch = next(loader.batches(0, 0, batch_size, 0, 1))
    graphs = ["fused", "cuda_graph", "compile+cuda_graph", "fused+cuda_graph"]
    engines = ["eager", "compile", *(graphs if cuda else [])]
    precisions = ["fp16", "bf16", "fp32"] if cuda else ["fp32", "bf16"] if half.has_bf16() else ["fp32"]
    kinds = [(m, e, p) for p in precisions for e in engines for m in METHODS]
    if arguments.engines:
        kinds = [("fgsm", e, p) for p in precisions for e in engines]
        if not cuda and (trouble := winograd.trouble(network(), winograd.CHANNELS)):
            print(f"left out: engines numba and winograd, {trouble}")
        elif not cuda:
            kinds += [("fgsm", "numba", p) for p in precisions] + [("fgsm", "winograd", "fp32")]
    if arguments.quick:
        kinds = kinds if arguments.engines else [(m, e, precisions[0]) for e in engines for m in ("standard", "fgsm")]
        if not cuda and not arguments.compile:
            kinds = [kind for kind in kinds if kind[1] != "compile"]

    rows = {}
    for method, engine_name, precision in kinds:
        step = build(cifar_config(method, engine_name, precision, batch_size), loader, device)
        rows[f"{method} {engine_name} {precision}"] = lambda step=step: step(batch)
    for fp16 in [False, True] if cuda else [False]:
        loop = usual_loop.UsualLoop(network(), device, half=fp16)
        x, y = next(iter(usual_loop.loader(data.images, data.labels, batch_size, 0, False)))
        rows[f"usual loop {'fp16' if fp16 else 'fp32'}"] = lambda loop=loop, x=x, y=y: loop.step(x, y)
    if not cuda:
        given_back = {f"{name}, memory given back": call for name, call in rows.items() if "fgsm eager" in name}
        rows |= given_back if arguments.engines else {}
        rows = {
            name: measure.with_memory(call, kept="usual" not in name and name not in given_back)
            for name, call in rows.items()
        }

    repetitions = (5 if arguments.quick else 15) if not cuda else 20
    counts = {"repetitions": repetitions, "inner": 10 if cuda else 1, "warm_up": 3 if cuda else 1}
    clock = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter  # others may be at work
    times = measure.interleaved(rows, device, **counts, clock=clock)
    best = precisions[0]
    usual = times[f"usual loop {'fp16' if cuda else 'fp32'}"]
    standard = times.get(f"standard {engines[0]} {best}", usual)
    fastest = min(
        (n for n in rows if n.startswith("fgsm") and n.endswith(best)), key=lambda n: measure.summary(times[n])["median"]
    )
    result = {
        "model": MODEL,
        "batch_size": batch_size,
        "fgsm_over_standard": None if arguments.engines else measure.ratio(times[f"fgsm {engines[0]} {best}"], standard),
        "speedup_over_usual_loop": measure.ratio(usual, times[f"fgsm {engines[0]} {best}"]),
        "fastest_fgsm": fastest,
        "fastest_speedup_over_usual_loop": measure.ratio(usual, times[fastest]),
        "speedups_over_usual_loop": {
            name: measure.summary([a / b for a, b in zip(usual, t, strict=True)]) for name, t in times.items()
        },
        "clock": clock.__name__,
        "repetitions": repetitions,
        "seconds_per_step": {name: measure.summary(t) for name, t in times.items()},
    }
    table = []
    for name, t in times.items():
        s = measure.summary(t)
        ms = f"{s['median'] * 1e3:.2f} ({s['min'] * 1e3:.2f} to {s['max'] * 1e3:.2f})"
        cells = [
            name,
            ms,
            f"{batch_size / s['median']:,.0f}",
            "" if arguments.engines else f"{measure.ratio(t, standard):.2f}",
            f"{measure.ratio(usual, t):.2f}",
        ]
        table.append(cells)
    columns = ["step", "ms, median (min to max)", "images/s", "over standard", "times the usual loop's speed"]
    measure.report("step", columns, table, result, arguments.json, device)


if __name__ == "__main__":
    main()
