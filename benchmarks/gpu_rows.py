"""The results of `benchmarks.gpu_report` in words: a part's figures, and rows for RECORDS.md.

    python -m benchmarks.gpu_rows DIR        # a folder with gpu_report.tar.gz, or with what was in it

Nothing is copied from results of a simulated device: they are marked, and their figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import gpu_probe

NAN = "not a number"
Figures = Iterator[tuple[str, str]]  # (what, value)


def number(value: Any, form: str = ",.3g") -> str:
    if value is None:
        return "none"
    return format(value, form) if isinstance(value, int | float) and math.isfinite(value) else NAN


def share(value: Any) -> str:
    return number(value, ".2%")


def spread(s: dict[str, Any], unit: float = 1.0) -> str:
    median, low, high = (s[key] if s[key] is None else s[key] * unit for key in ("median", "min", "max"))
    return f"{number(median)} ({number(low)} to {number(high)})"


# ---- what the parts found


def of_probe(r: dict, folder: Path) -> Figures:
    keys = ("device", "driver_clock_power", "torch", "cuda", "triton", "data", "data_error", "cores", "missing")
    yield "machine", "; ".join(f"{key} {r[key]}" for key in keys if r.get(key))
    yield "a captured graph counts right", str(r.get("counts_right", "not reached"))
    if "bf16_matmul_tflops" in r:
        yield "matrix product, 8192, bf16", f"{number(r['bf16_matmul_tflops'])} TFLOP/s"


def of_tests(r: dict, folder: Path) -> Figures:
    counts = ", ".join(f"{r[key]} {key}" for key in ("passed", "skipped") if r[key])
    yield "tests", f"{counts or 'none passed'}, {len(r['failed'])} failed, of {number(r['selected'])}"
    for name in r["failed"][:12]:
        yield "failed", name
    if len(r["failed"]) > 12:
        yield "failed", f"and {len(r['failed']) - 12} more"


def of_profile(r: dict, folder: Path) -> Figures:
    about = f"{r['method']}, {r['engine']}, {r['precision']}, batch {r['batch_size']}"
    yield f"ms a step: {about}", number(r["milliseconds_per_step"])
    yield f"ms a step in which a kernel runs: {about}", f"{number(r['busy_milliseconds_per_step'])}"
    for row in r["top"][:4]:
        yield f"kernel {row['name'][:60]}", f"{number(row['milliseconds'])} ms a step, {share(row['share'])}"


def of_epoch(r: dict, folder: Path) -> Figures:
    about = f"{r['precision']}, batch {r['batch_size']}, {r['images_timed']:,} images"
    about += "" if r["images_timed"] == 50_000 else " scaled to 50,000"
    for name, s in r["seconds_per_pass_of_50000"].items():
        engine = "" if name in ("data", "usual loop") else f"{r['engine']}, "
        yield f"s a pass: {name} ({engine}{about})", spread(s)
    yield "FGSM over the usual loop", f"{number(r['speedup_over_usual_loop'])} ×"


def of_train(r: dict, folder: Path) -> Figures:
    """`r` is empty where the training was cut: then what its epochs wrote."""
    for file in sorted(folder.glob("*/metrics.jsonl")):
        history = [json.loads(line) for line in file.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
        if history:
            last = history[-1]
            seconds = sorted(h["seconds"] for h in history if h.get("seconds") is not None)
            first = number(history[0].get("seconds"))
            yield "s an epoch, median", f"{number(seconds[len(seconds) // 2] if seconds else None)} (the first: {first})"
            yield f"after epoch {last['epoch']}, the guard's minibatch, PGD", share(last.get("guard_accuracy"))
    if r:
        yield "clean accuracy", f"{share(r['clean_accuracy'])}, n = {r['examples']:,}"
        yield from (attack_of(e) for e in r["evaluations"])
        stopped = f"; {r['stopped']}" if r["stopped"] else ""
        yield "training", f"{r['epochs']} epochs, {number(r['train_seconds'])} s, {r['precision']}{stopped}"
        yield "evaluation", f"{number(r.get('evaluation_seconds'))} s"


def attack_of(e: dict) -> tuple[str, str]:
    value = share(e["robust_accuracy"])
    if low_high := e.get("robust_interval"):
        value += f" (95 %: {share(low_high[0])} to {share(low_high[1])})"
    return f"{e['attack'].upper()}, epsilon {number(e['epsilon'] * 255)}/255", f"{value}, n = {e['examples']:,}"


def of_robust(r: dict, folder: Path) -> Figures:
    yield "clean accuracy", f"{share(r['clean_accuracy'])}, n = {r['examples']:,}"
    yield attack_of(r)
    yield "seconds of the attack", number(r["seconds"])


def of_evaluate(r: dict, folder: Path) -> Figures:
    for name, s in r["seconds"].items():
        yield f"s of {r['attack']} on {r['examples']:,} images of {r['dataset']}: {name}", spread(s)
    yield "over the plain attack", f"{number(r['speedup_over_plain'])} ×, {r['different_verdicts']} verdicts differ"


def of_step(r: dict, folder: Path) -> Figures:
    for name, s in r["seconds_per_step"].items():
        yield f"ms a step, batch {r['batch_size']}: {name}", spread(s, 1e3)
    yield f"{r['fastest_fgsm']} over the usual loop", f"{number(r['fastest_speedup_over_usual_loop'])} ×"


def of_imagenet(r: dict, folder: Path) -> Figures:
    for phase in r["phases"]:
        for name, s in phase["images_per_second"].items():
            captured = "captured" if phase["captured"] else "NOT captured"
            where = f"{phase['resolution']} pixels, batch {phase['batch_size']}, {captured}"
            yield f"images/s: {r['model']}, {r['precision']}, {where}, {name}", spread(s)
    for name, hours in r["hours"].items():
        yield f"hours of the whole schedule, {name} ({r['images']})", number(hours)


KINDS = {
    "probe": of_probe,
    "tests": of_tests,
    "profile": of_profile,
    "epoch": of_epoch,
    "train": of_train,
    "robust": of_robust,
    "evaluate": of_evaluate,
    "step": of_step,
    "imagenet": of_imagenet,
}


def figures(folder: Path) -> list[tuple[str, str]]:
    """Of a part's folder. What cannot be read is said, never raised: results may be partial, or garbage."""
    kind = folder.name.split("_")[0]
    try:
        if kind == "train":
            summaries = [json.loads(file.read_text()) for file in folder.glob("*/summary.json")]
            found = summaries[0] if summaries else {}
        elif (folder / "result.json").exists():
            found = json.loads((folder / "result.json").read_text())
        elif (found := result_in((folder / "log.txt").read_text(errors="replace"), folder.name)) is None:
            return [("no result", "its log has none")]
    except (OSError, ValueError) as error:
        return [("no result", str(error).replace(f"{folder}/", ""))]
    seen = []
    try:
        for one in KINDS[kind](found, folder):
            seen.append(one)
    except Exception as error:
        seen.append(("the rest cannot be read", f"{type(error).__name__}: {error}"))
    return seen or [("no result", "nothing was written")]


def result_in(log: str, part: str) -> dict[str, Any] | None:
    """The result of a part that wrote no file: what its log tells of tests, else its last line of JSON."""
    if part.startswith("tests"):
        return counted(log)
    for line in reversed(log.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None


def counted(log: str) -> dict[str, Any]:
    """From pytest's lines, with and without its helper processes; also of a log that ends somewhere."""
    outcome: dict[str, str] = {}
    words = "PASSED|FAILED|SKIPPED|ERROR|XFAIL"
    test = re.compile(rf"(?:\[gw\d+\] \[ *\d+%\] ({words}) )?(\S*tests/\S+::\S+(?: [^\[]*\])?) ?({words})?")
    for found in filter(None, map(test.match, log.splitlines())):
        if status := found[1] or found[3]:
            outcome[found[2][found[2].index("tests/") :]] = status
    patterns = (r"/ (\d+) selected", r"\[(\d+) items?\]", r"collected (\d+)")
    selected = next(filter(None, (re.search(pattern, log) for pattern in patterns)), None)
    count = list(outcome.values()).count
    reasons = dict(re.findall(r"^(?:FAILED|ERROR) \S*(tests/\S+::.*?) - (.*)$", log, re.MULTILINE))
    failed = [
        f"{name}: {reasons[name]}" if name in reasons else name
        for name, status in outcome.items()
        if status in ("FAILED", "ERROR")
    ]
    found = {"passed": count("PASSED"), "skipped": count("SKIPPED"), "failed": failed}
    return found | {"selected": int(selected[1]) if selected else None}


# ---- words


def state_of(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def device_name(facts: dict[str, Any]) -> str:
    name = facts.get("device") or "unknown device"
    return f"SIMULATED, NOT MEASURED: {name}" if facts.get("simulated") else name


def lines(folder: Path) -> list[str]:
    """A part's figures, for reading."""
    state = state_of(folder)
    marks = [device_name(state)] if state.get("simulated") else []
    marks += [state["data"]] if state.get("data") else []
    return [*(f"[{mark}]" for mark in marks), *(f"{what}: {value}" for what, value in figures(folder))]


def commit_of(state: dict[str, Any], here: str, commit: str | None) -> str:
    """The commit that measured. A machine without the history tells a digest of the code: this tree's commit is meant, if
    the code here is the same."""
    if state.get("commit"):
        return state["commit"]
    if state.get("sources") == here and commit:
        return commit
    return f"code {state.get('sources', 'unknown')}"


def rows(place: Path) -> Iterator[str]:
    """Markdown: a table for each device, a row for each figure."""
    from fastrobust.runtime import machine

    here, commit = gpu_probe.sources(), machine.environment("cpu")["commit"]
    for home in sorted({state.parent.parent for state in place.rglob("state.json")}):
        states = [(state_of(file.parent), file.parent) for file in sorted(home.glob("*/state.json"))]
        yield f"### {device_name(states[0][0])}\n"
        yield "| date | part | what | value | command | commit |\n|---|---|---|---|---|---|"
        for state, folder in states:
            name = state["part"] + ("" if state["status"] == "done" else f", {state['status'].upper()}")
            name += f", {state['data']}" if state.get("data") else ""
            name += ", SIMULATED" if state.get("simulated") else ""
            for what, value in figures(folder):
                cells = [state["date"], name, what, value, f"`{state['command']}`", commit_of(state, here, commit)]
                yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
        yield ""


def unpack(archives: list[Path], folder: Path) -> None:
    """Each into a folder of its own. One that cannot be read is named and left out."""
    for number, archive in enumerate(archives):
        try:
            with tarfile.open(archive) as opened:
                opened.extractall(folder / str(number), filter="data")
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            print(f"warning: {archive} cannot be read to its end: {error}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    folder = p.parse_args(argv).folder
    with tempfile.TemporaryDirectory() as scratch:
        unpack(sorted(folder.glob("*.tar.gz")), Path(scratch))
        place = Path(scratch) if any(Path(scratch).iterdir()) else folder
        found = list(rows(place))
    if not found:
        print(f"error: {folder} holds no results of benchmarks.gpu_report", file=sys.stderr)
        return 2
    print("\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
