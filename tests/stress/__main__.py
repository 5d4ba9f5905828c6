"""Does a run survive what machines and files do to it?

python -m tests.stress [PART ...] [--count N | --quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastrobust.runtime.command import main_with_errors
from fastrobust.runtime.errors import ConfigError
from fastrobust.runtime.files import write_json
from fastrobust.runtime.progress import duration
from tests.stress.parts import PARTS


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m tests.stress", description=__doc__.splitlines()[0])
    p.add_argument("parts", nargs="*", metavar="PART", help=f"default: all of {', '.join(PARTS)}")
    p.add_argument("--quick", action="store_true", help="a few of each, as `make test` does")
    p.add_argument("--count", type=int, help="so many kills, files, epochs, … of each part")
    p.add_argument("--json", metavar="FILE", type=Path, help="where the figures go; those of other parts in it stay")
    arguments = p.parse_args(argv)
    return main_with_errors(lambda: stress(arguments.parts or list(PARTS), arguments))


def stress(names: list[str], arguments: argparse.Namespace) -> int:
    file = arguments.json
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise ConfigError(f"there is no part {unknown[0]}; there are {', '.join(PARTS)}")
    found = json.loads(file.read_text()) if file is not None and file.exists() else {}
    failed = []
    for number, name in enumerate(names, 1):
        print(f"[{number}/{len(names)}] {name} ...", flush=True)
        began = time.monotonic()
        count = arguments.count or (PARTS[name].quick if arguments.quick else PARTS[name].full)
        with tempfile.TemporaryDirectory(prefix="stress-", ignore_cleanup_errors=True) as folder:
            figures = PARTS[name].run(Path(folder), count)
        seconds = time.monotonic() - began
        print(f"    {json.dumps(figures)}  {duration(seconds)}", flush=True)
        if figures["wrong"]:
            failed.append(name)
        found[name] = figures | {
            "seconds": round(seconds, 1),
            "command": f"python -m tests.stress {name}" + (f" --count {count}" if count != PARTS[name].full else ""),
            "date": time.strftime("%Y-%m-%d"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        if file is not None:
            write_json(file, found)
    print(
        f"{len(names) - len(failed)} of {len(names)} parts without a fault"
        + (f"; not: {', '.join(failed)}" if failed else "")
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
