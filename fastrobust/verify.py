"""Exact robust accuracy of a trained ReLU network, image by image: python -m fastrobust.verify RUN --epsilon 0.1"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastrobust.cli import main_with_errors
from fastrobust.errors import FastrobustError, RunError
from fastrobust.evaluate import count, pixels

VERDICTS = ("misclassified", "verified", "falsified", "timeout")
CHUNK = 10  # images that a worker takes at a time, fewer where that would leave another worker idle


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m fastrobust.verify", description=__doc__.splitlines()[0])
    p.add_argument("run", help="a run directory, or a model.safetensors that fastrobust wrote")
    p.add_argument("--epsilon", type=pixels, required=True, help="radius in pixels of [0, 1], such as 0.1 or 8/255")
    p.add_argument("--limit", type=count, help="the first so many test images (default: all)")
    p.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="for one image (default: 60)")
    p.add_argument("--jobs", type=count, default=len(os.sched_getaffinity(0)), help="processes (default: all cores)")
    p.add_argument("--data", help="where the data set lies (default: as the run's config says)")
    p.add_argument("--output", type=Path, help="where verdicts are kept (default: RUN/verification/epsilon-EPSILON)")
    p.add_argument("--json", action="store_true", help="end with one line of JSON")
    return p


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    return main_with_errors(lambda: verify(arguments))


class Results:
    """FOLDER/settings.json says what the verdicts are about; verdicts.jsonl has a line for each image, the last one counts;
    witnesses/INDEX.npy is the adversarial image (float32 C x H x W) of each that is falsified."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        from fastrobust import run

        self.folder, self.lines = folder, folder / "verdicts.jsonl"
        with run.explained(f"{folder} cannot be used"):
            (folder / "witnesses").mkdir(parents=True, exist_ok=True)
        stored = self.read_settings()
        if stored is None:
            run.write_json(folder / "settings.json", settings)
        elif {key: stored.get(key) for key in settings} != settings:
            odd = [key for key in settings if stored.get(key) != settings[key]]
            raise RunError(f"{folder} holds verdicts about something else ({', '.join(odd)} differ); give another --output")
        self.found = self.read()

    def read_settings(self) -> dict[str, Any] | None:
        path = self.folder / "settings.json"
        if not path.exists():
            return None
        try:
            return dict(json.loads(path.read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise RunError(f"{path} is damaged ({error}); remove {self.folder} to start anew") from None

    def read(self) -> dict[int, dict[str, Any]]:
        """The verdicts so far. A line that was cut short by a crash is dropped; that image is decided again."""
        if not self.lines.exists():
            return {}
        found, whole = {}, 0
        content = self.lines.read_bytes()
        for line in content.splitlines(keepends=True):
            try:
                record = json.loads(line)
                if not line.endswith(b"\n") or record["verdict"] not in VERDICTS:
                    break
                found[int(record["index"])] = record
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line)
        if whole < len(content):
            if content[whole:].count(b"\n") > 1:
                raise RunError(f"{self.lines} is damaged after {len(found)} verdicts; remove {self.folder} to start anew")
            os.truncate(self.lines, whole)
        return found

    def add(self, verdicts: list) -> None:
        """Witnesses first: a line is written only when all that it speaks of is on disk."""
        import io

        import numpy as np

        from fastrobust import run

        text = ""
        for v in verdicts:
            record = {key: getattr(v, key) for key in ("index", "label", "verdict", "by", "seconds", "domains")}
            if v.witness is not None:
                buffer = io.BytesIO()
                np.save(buffer, v.witness.numpy())
                content = buffer.getvalue()
                run.write_atomically(self.folder / "witnesses" / f"{v.index}.npy", lambda file, c=content: file.write(c))
            self.found[v.index] = record
            text += json.dumps(record) + "\n"
        with run.explained(f"{self.lines} cannot be written"), self.lines.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


_decider = None  # of a worker


def start_worker(weights: str, shape: tuple[int, ...], epsilon: float, die_with_parent: Callable[[int], None]) -> None:
    import signal

    import torch

    from fastrobust import run
    from fastrobust.verification.decide import Decider

    global _decider
    die_with_parent(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops the workers
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # numbers below 1e-38 are slow, and far below what bounds are widened by
    _decider = Decider(run.load(weights), shape, epsilon)


def work(indices: list[int], images, labels, timeout: float) -> list:
    return _decider.decide(indices, images, labels, timeout)


def verify(arguments: argparse.Namespace) -> int:
    try:
        import highspy  # noqa: F401
        import scipy  # noqa: F401
    except ImportError as error:
        raise FastrobustError(f"verification needs {error.name}: pip install 'fastrobust[verify]'") from None
    from fastrobust import run
    from fastrobust.data import loaders
    from fastrobust.verification.network import extract

    if arguments.epsilon == 0 or not 0 < arguments.timeout < 1e7:
        raise FastrobustError("--epsilon and --timeout must be larger than 0")
    model, config, _ = run.read_weights(arguments.run)
    if arguments.data:
        config.data.path = arguments.data
    weights = Path(arguments.run) / run.WEIGHTS if Path(arguments.run).is_dir() else Path(arguments.run)
    data = loaders.test_set(config, None)
    shape = tuple(data.images.shape[1:])
    extract(model, shape)  # says at once what cannot be verified
    total = min(arguments.limit or len(data.labels), len(data.labels))
    folder = arguments.output or weights.parent / "verification" / f"epsilon-{arguments.epsilon:g}"
    settings = {
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "dataset": config.data.dataset,
        "images_sha256": hashlib.sha256(data.images.permute(0, 2, 3, 1).numpy().tobytes()).hexdigest(),
        "epsilon": arguments.epsilon,
    }
    results = Results(folder, settings)
    began = time.monotonic()
    todo = [i for i in range(total) if not settled(results.found.get(i), arguments.timeout)]
    if len(todo) < total:
        print(f"{total - len(todo)} of {total} images have been decided before")
    try:
        decide_all(arguments, results, weights, data, shape, todo, total)
    except KeyboardInterrupt:
        print(f"stopped; the verdicts so far are in {folder}: run the same command to go on", file=sys.stderr)
        return 130
    summary = summarize([results.found[i] for i in range(total)], arguments, time.monotonic() - began, len(todo))
    run.write_json(folder / "summary.json", summary | run.environment("cpu"))
    show(summary, folder)
    if arguments.json:
        print(json.dumps(summary))
    return 0


def settled(record: dict[str, Any] | None, timeout: float) -> bool:
    """A timeout is tried again when there is more time for it now."""
    return record is not None and (record["verdict"] != "timeout" or record["seconds"] >= 0.95 * timeout)


def decide_all(arguments, results: Results, weights: Path, data, shape, todo: list[int], total: int) -> None:
    from fastrobust.data.dataloader import DieWith
    from fastrobust.progress import Progress

    size = max(1, min(CHUNK, len(todo) // (4 * arguments.jobs)))
    chunks = [todo[i : i + size] for i in range(0, len(todo), size)]
    tally = Counter(record["verdict"] for i, record in results.found.items() if i < total)
    if not chunks:
        return
    about = (str(weights), shape, arguments.epsilon, DieWith(os.getpid()))
    pool = ProcessPoolExecutor(min(arguments.jobs, len(chunks)), get_context("spawn"), start_worker, about)
    try:
        with Progress("verify", total, total - len(todo)) as bar:
            futures = [
                pool.submit(work, chunk, data.images[chunk], data.labels[chunk], arguments.timeout) for chunk in chunks
            ]
            for future in as_completed(futures):
                verdicts = future.result()
                for v in verdicts:
                    if v.index in results.found:
                        tally[results.found[v.index]["verdict"]] -= 1
                    tally[v.verdict] += 1
                results.add(verdicts)
                detail = "  ".join(f"{tally[name]} {name}" for name in VERDICTS)
                bar.advance(len(verdicts), detail if bar.due() else None)
    except BrokenProcessPool:
        raise RunError(
            f"a verifying process died (out of memory?); the verdicts so far are in {results.folder}: run the same command "
            "to go on, with fewer --jobs if memory is short"
        ) from None
    finally:
        for process in list((pool._processes or {}).values()):  # nothing that still runs is waited for
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


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
        "jobs": arguments.jobs,
        "seconds": round(seconds, 3),
        "decided_now": decided_now,
        "core_seconds": round(sum(record["seconds"] for record in records), 3),
        "slowest_seconds": max(record["seconds"] for record in records),
        "by": dict(Counter(f"{record['verdict']} by {record['by']}" for record in records)),
    }


def show(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    n = summary["examples"]
    table = Table("verdict", "images", "of all")
    for name in VERDICTS:
        table.add_row(name, str(summary[name]), f"{summary[name] / n:.2%}")
    Console().print(table)
    bound = "" if not summary["timeout"] else f" (at most {summary['upper_bound']:.2%}: {summary['timeout']} undecided)"
    print(f"verified accuracy  {summary['verified_accuracy']:.2%}{bound}  epsilon {summary['epsilon']:g}, {n} test images")
    print(f"seconds            {summary['seconds']:.1f} for {summary['decided_now']} images")
    print(f"verdicts           {folder}")


if __name__ == "__main__":
    sys.exit(main())
