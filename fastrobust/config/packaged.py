"""The configs that come with fastrobust, by name: `fastrobust train mnist_fgsm`, `fastrobust configs`.

They are the files in `configs/` of the repository; an installed wheel has them in `fastrobust/configs/`. Only the standard
library is imported at first, so that `--help` can list them at once.
"""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import fill

from fastrobust.config.places import expand

INDENT = 4 * " "
_PACKAGE = Path(__file__).resolve().parent.parent
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")


def folder() -> Path | None:
    return next((place for place in _PLACES if (place / "quickstart.yaml").is_file()), None)


def names() -> list[str]:
    return sorted(file.stem for file in folder().glob("*.yaml")) if folder() else []


def find(path: str | Path) -> Path:
    """The file itself if it is there; else `mnist_fgsm`, `mnist_fgsm.yaml` and `configs/mnist_fgsm.yaml` are the file that
    comes with fastrobust, wherever the command is run. A path that is none of these is given back. Raises ConfigError."""
    path = Path(expand(path))
    file = folder() / f"{path.name.removesuffix('.yaml')}.yaml" if folder() else path
    return file if not path.is_file() and str(path.parent) in (".", "configs") and file.is_file() else path


def command(arguments) -> int:
    """The configs command: all of them in a few lines each, or one as it stands in its file."""
    from fastrobust.config import reading
    from fastrobust.config.hints import did_you_mean
    from fastrobust.config.numbers import radius_in_words
    from fastrobust.runtime.errors import ConfigError

    if arguments.name:
        file = find(arguments.name)
        if not file.is_file():
            raise ConfigError(f"there is no config '{arguments.name}'{did_you_mean(arguments.name, names())}")
        print(file.read_text(encoding="utf-8"), end="")
        return 0
    for name in names():
        config = reading.load(name)
        data = config.data.dataset + (f" ({config.data.limit:,} images)" if config.data.limit else "")
        radius = f" at {radius_in_words(config.epsilon, config.norm)}" if config.method.attacks else ""
        trains = f"{data}, {config.model.name}, {config.method.name}{radius}, {config.epochs} epochs"
        print(name)
        for text in (trains, about(find(name))):
            print(fill(text, 80, initial_indent=INDENT, subsequent_indent=INDENT))
    print("\nTables are those of the paper. One of them: fastrobust configs NAME")
    print("Train it:              fastrobust train NAME epsilon=4/255 seed=1")
    return 0


def about(file: Path) -> str:
    """What a config gives: the first sentence above it, after the commands."""
    lines = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    text = " ".join(line for line in lines if not re.match(r"(python|make) ", line))
    return re.split(r"(?<=\.) (?=[A-Z\d])", text)[0]
