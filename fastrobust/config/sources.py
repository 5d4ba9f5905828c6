"""Which code the user's own parts of a config are, for the records of a run."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastrobust.config.parts import imported
from fastrobust.runtime.errors import ConfigError

OWN = re.compile(r"(given/)?([\w.]+)[.:]\w+")  # package.module:name, and the class of a network that was given from Python


def sources(values: Iterable[Any]) -> dict[str, dict[str, str]]:
    """For each value that names a part of the user's own: its module's file, the file's SHA-256, and the version of the
    package that it was installed with, if it was. What cannot be found is left out."""
    found = {}
    for name in sorted({v for v in values if isinstance(v, str) and (":" in v or v.startswith("given/"))}):
        match = OWN.fullmatch(name)
        with contextlib.suppress(ConfigError, OSError, TypeError, KeyError):
            if match and not match[1]:
                imported("code", name)
            module = sys.modules[match[2] if match else ""]
            file = Path(inspect.getsourcefile(module))
            facts = {"file": os.path.abspath(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for package in importlib.metadata.packages_distributions().get(module.__name__.partition(".")[0], ()):
                facts["version"] = f"{package} {importlib.metadata.version(package)}"
            found[name] = facts
    return found


def changed(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """A line for each part whose code is not what it was."""
    return [
        f"{name}: its code in {now[name]['file']} is not what the run was begun with"
        for name in before.keys() & now.keys()
        if before[name].get("sha256") != now[name]["sha256"]
    ]
