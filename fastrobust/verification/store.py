"""Where exact verdicts are kept: image by image, as they are found."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastrobust.evaluation.answers import alike
from fastrobust.runtime.errors import RunError
from fastrobust.runtime.files import explained, write_atomically, write_json

FOLDER = "verification"  # in a run directory; a folder for each epsilon
VERDICTS = ("misclassified", "verified", "falsified", "timeout")


class Verdicts:
    """FOLDER/settings.json says what the verdicts are about; verdicts.jsonl has a line for each image, the last one counts;
    witnesses/INDEX.npy is the adversarial image (float32 C x H x W) of each that is falsified.
    `older`: what settings.json held for the same in version 0.1; such a folder is taken over."""

    def __init__(self, folder: Path, settings: dict[str, Any], older: dict[str, Any]):
        self.folder, self.lines = folder, folder / "verdicts.jsonl"
        with explained(f"{folder} cannot be used"):
            (folder / "witnesses").mkdir(parents=True, exist_ok=True)
        stored, about = self.read_settings(), {key: value for key, value in settings.items() if key != "answers"}
        if stored is None or older == {key: stored.get(key) for key in older}:
            write_json(folder / "settings.json", settings)
        elif odd := [key for key in about if stored.get(key) != about[key]]:
            raise RunError(f"{folder} holds verdicts about something else ({', '.join(odd)} differ); give another --output")
        elif not alike(stored.get("answers"), settings.get("answers")):
            raise RunError(
                f"{folder} holds verdicts about other code of the model with these weights; give another --output"
            )
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
        text = ""
        for v in verdicts:
            record = {key: getattr(v, key) for key in ("index", "label", "verdict", "by", "seconds", "domains")}
            if v.witness is not None:
                buffer = io.BytesIO()
                np.save(buffer, v.witness.numpy())
                content = buffer.getvalue()
                write_atomically(self.folder / "witnesses" / f"{v.index}.npy", lambda file, c=content: file.write(c))
            self.found[v.index] = record
            text += json.dumps(record) + "\n"
        with explained(f"{self.lines} cannot be written"), self.lines.open("a") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
