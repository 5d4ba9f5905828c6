"""A benchmark of the verification competition, its answers and times beside published ones.

    python -m benchmarks.vnncomp vnncomp2021/benchmarks/mnistfc --published vnncomp2021_results/results_csv/a-b-CROWN.csv

The folders are clones of https://github.com/stanleybak/vnncomp2021 (or a later year's) and of its results. What is decided
is kept in the file of --output: an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from fastrobust.__main__ import count
from fastrobust.runtime import machine
from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import FastrobustError
from fastrobust.runtime.files import write_json
from fastrobust.verification import properties

WORDS = {"holds": "unsat", "violated": "sat", "unsat": "unsat", "sat": "sat"}  # all others mean: not solved


def read_published(files: list[Path], folder: Path) -> dict[str, dict[tuple[str, str], tuple[str, float]]]:
    """{tool: {(network, property): (answer, seconds)}}, names without folders."""
    found = {}
    for file in files:
        rows = [row for row in csv.reader(file.open()) if len(row) >= 6 and row[0] == folder.name]
        found[file.stem] = {
            (Path(row[1]).name, Path(row[2]).name): (WORDS.get(row[4].lower(), "none"), float(row[5])) for row in rows
        }
    return found


def main() -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.vnncomp", description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path, help="of one benchmark, with its list of instances (*instances.csv)")
    p.add_argument("--published", type=Path, nargs="*", default=[], help="result files of other tools")
    p.add_argument("--timeout", type=float, default=120, help="seconds for an instance, where its list does not say less")
    p.add_argument("--every", type=count, default=1, help="only every so manieth instance")
    p.add_argument("--threads", type=count, default=1)
    p.add_argument("--output", type=Path, required=True, help="a JSON file")
    arguments = p.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)

    def measure() -> int:
        (listed,) = arguments.folder.glob("*instances.csv")
        published = read_published(arguments.published, arguments.folder)
        known = json.loads(arguments.output.read_text())["instances"] if arguments.output.exists() else []
        for network, property_, limit in list(csv.reader(listed.open()))[:: arguments.every]:
            names = (Path(network).name, Path(property_).name)
            if any((record["network"], record["property"]) == names for record in known):
                continue
            began = time.monotonic()
            try:
                timeout = min(arguments.timeout, float(limit))
                answer = properties.verify(arguments.folder / network, arguments.folder / property_, timeout)
                record = {"answer": answer.answer, "by": answer.by, "domains": answer.domains}
            except FastrobustError as error:
                record = {"answer": "refused", "by": str(error), "domains": 0}
            record = {"network": names[0], "property": names[1], **record, "seconds": round(time.monotonic() - began, 2)}
            record["published"] = {tool: rows[names] for tool, rows in published.items() if names in rows}
            record["contradicts"] = [
                tool for tool, (said, _) in record["published"].items() if {said, record["answer"]} == {"sat", "unsat"}
            ]
            known.append(record)
            write_json(arguments.output, summary(known, arguments) | machine.environment("cpu"))
            print(*names, record["answer"], record["by"], record["seconds"], record["published"], flush=True)
        print(json.dumps({key: value for key, value in summary(known, arguments).items() if key != "instances"}, indent=1))
        return 0

    return main_with_errors(measure)


def summary(known: list[dict], arguments) -> dict:
    tools = sorted({tool for record in known for tool in record["published"]})
    solved = lambda said: said in ("sat", "unsat")
    return {
        "benchmark": arguments.folder.name,
        "timeout_seconds": arguments.timeout,
        "every": arguments.every,
        "threads": arguments.threads,
        "answers": Counter(record["answer"] for record in known),
        "seconds_of_solved": round(sum(record["seconds"] for record in known if solved(record["answer"])), 1),
        "published_solved": {
            tool: sum(solved(record["published"].get(tool, ("none", 0))[0]) for record in known) for tool in tools
        },
        "contradictions": [record["property"] for record in known if record["contradicts"]],
        "instances": known,
    }


if __name__ == "__main__":
    sys.exit(main())
