"""The verify command: every test image decided exactly, on all cores."""

import hashlib
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastrobust.data import sets
from fastrobust.data.held_out import spread
from fastrobust.evaluation.answers import answers
from fastrobust.evaluation.trained import open_trained
from fastrobust.runtime import machine, run_directory
from fastrobust.runtime.distributed import pick_device
from fastrobust.runtime.errors import FastrobustError, installing
from fastrobust.runtime.files import write_json, write_text
from fastrobust.verification.store import FOLDER, VERDICTS, Verdicts


def command(arguments) -> int:
    """The verify command."""
    try:
        from fastrobust.verification import lowering, workers  # which need scipy and HiGHS
    except ImportError as error:
        raise FastrobustError(f"verification needs {error.name}: {installing('verify')}") from None

    if arguments.epsilon == 0 or not 0 < arguments.timeout < 1e7:
        raise FastrobustError("--epsilon and --timeout must be larger than 0")
    if arguments.vnnlib or arguments.run.endswith((".onnx", ".onnx.gz")):
        return a_property(arguments)
    if arguments.epsilon is None:
        raise FastrobustError("the verification of a run needs a radius, such as --epsilon 0.1 or --epsilon 8/255")
    device = pick_device(arguments.device)
    trained = open_trained(arguments.run, arguments.data)
    if (norm := arguments.norm or trained.config.norm) != "linf":
        why = "it was trained in it: --norm linf verifies it in L-infinity" if arguments.norm is None else "use --norm linf"
        raise FastrobustError(f"verification is exact in the L-infinity norm alone, not in {norm}; {why}")
    weights = trained.path / run_directory.WEIGHTS if trained.path.is_dir() else trained.path
    data = trained.images()
    network = lowering.lower_model(trained.model, tuple(data.images.shape[1:]))  # says at once what cannot be verified
    chosen = spread(data.labels.numpy(), data.classes, arguments.limit).tolist()
    part = data.take(chosen) if len(chosen) < len(data.labels) else data
    place = f"epsilon-{arguments.epsilon:g}"
    folder = Path(arguments.output) if arguments.output else weights.parent / FOLDER / place
    about = {"dataset": trained.config.data.dataset, "epsilon": arguments.epsilon}
    settings = about | {"weights": trained.digest, "images": data.checksum()}
    kept = settings | {"answers": answers(trained.model, data.images.shape[1:])}
    verdicts = Verdicts(folder, kept, about | digests_of_version_0_1(weights, data))
    began = time.monotonic()
    todo = [i for i in chosen if not workers.settled(verdicts.found.get(i), arguments.timeout)]
    if len(todo) < len(chosen):
        print(f"{len(chosen) - len(todo)} of {len(chosen)} images have been decided before")
    try:
        about_time = (arguments.epsilon, arguments.timeout, arguments.workers)
        workers.decide_all(trained.model, network, data, verdicts, todo, chosen, *about_time, str(device))
    except KeyboardInterrupt:
        print(f"stopped; the verdicts so far are in {folder}: run the same command to go on", file=sys.stderr)
        return 130
    records = [verdicts.found[i] for i in chosen]
    summary = settings | summarize(records, arguments, time.monotonic() - began, len(todo))
    summary |= {"images": part.checksum(), "chosen": part.chosen, "data": arguments.data}
    if (more := examples_in(folder / "summary.json")) > len(chosen):  # of the same weights and test set
        print(f"summary.json keeps the result on {more} images of an earlier call")
    else:
        write_json(folder / "summary.json", summary | machine.environment(device.type))
    show(summary, folder)
    if arguments.json:
        print(json.dumps(summary))
    return 0


def a_property(arguments) -> int:
    """The answer for a property of an ONNX file, as in a result file of the competition; what it is about goes to stderr."""
    from fastrobust.verification import properties

    if not arguments.vnnlib or not arguments.run.endswith((".onnx", ".onnx.gz")):
        raise FastrobustError("an ONNX file and a property go together: fastrobust verify NETWORK.onnx --vnnlib FILE")
    for name in ("epsilon", "norm", "limit", "data"):
        if getattr(arguments, name) is not None:
            raise FastrobustError(f"--{name} says nothing about a property; its file holds the inputs that are meant")
    began = time.monotonic()
    answer = properties.verify(Path(arguments.run), Path(arguments.vnnlib), arguments.timeout, pick_device(arguments.device))
    seconds = round(time.monotonic() - began, 3)
    if arguments.output:
        write_text(Path(arguments.output), answer.text())
    print(f"{answer.answer} by {answer.by}, {answer.domains} domains, {seconds:.1f} seconds", file=sys.stderr)
    print(f"{answer.answer}\n" if arguments.output else answer.text(), end="")
    if arguments.json:
        about = {"network": arguments.run, "property": arguments.vnnlib, "timeout_seconds": arguments.timeout}
        found = {"answer": answer.answer, "by": answer.by, "domains": answer.domains, "seconds": seconds}
        print(json.dumps(about | found))
    return 0


def examples_in(summary: Path) -> int:
    try:
        return int(json.loads(summary.read_text())["examples"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0


def digests_of_version_0_1(weights: Path, data: sets.ImageSet) -> dict[str, str]:
    """What weights and images were told by in settings.json before they had one digest each."""
    return {
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "images_sha256": hashlib.sha256(data.images.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest(),
    }


def summarize(records: list[dict[str, Any]], arguments, seconds: float, decided_now: int) -> dict[str, Any]:
    tally = Counter(record["verdict"] for record in records)
    n = len(records)
    return {
        "examples": n,
        **{name: tally[name] for name in VERDICTS},
        "verified_accuracy": tally["verified"] / n,
        "upper_bound": (tally["verified"] + tally["timeout"]) / n,
        "epsilon": arguments.epsilon,
        "timeout_seconds": arguments.timeout,
        "workers": arguments.workers,
        "seconds": round(seconds, 3),
        "decided_now": decided_now,
        "core_seconds": round(sum(record["seconds"] for record in records), 3),
        "slowest_seconds": max(record["seconds"] for record in records),
        "by": dict(Counter(f"{record['verdict']} by {record['by']}" for record in records)),
    }


def show(summary: dict[str, Any], folder: Path) -> None:
    n = summary["examples"]
    table = Table("verdict", "images", "of all")
    for name in VERDICTS:
        table.add_row(name, str(summary[name]), f"{summary[name] / n:.2%}")
    Console().print(table)
    bound = "" if not summary["timeout"] else f" (at most {summary['upper_bound']:.2%}: {summary['timeout']} undecided)"
    print(f"verified accuracy  {summary['verified_accuracy']:.2%}{bound}")
    print(f"epsilon            {summary['epsilon']:g}, {n} test images")
    print(f"seconds            {summary['seconds']:.1f} for {summary['decided_now']} images")
    print(f"verdicts           {folder}")
