"""The errors that fastrobust raises on purpose."""

import re
from importlib import metadata


class FastrobustError(Exception):
    """A problem the user can mend; its message says what was wrong, where, and what to do.

    The command-line programs print the message without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """What an exception says in its first line, or else its name."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def installing(extra: str) -> str:
    """The command that installs what an extra of this package needs. It names the packages, as no index may have ours."""
    try:
        needed = metadata.requires("fastrobust") or []
    except metadata.PackageNotFoundError:
        needed = []
    named = [line.split(";")[0].strip() for line in needed if re.search(rf"""extra == ['"]{extra}['"]""", line)]
    return "pip install " + (" ".join(f"'{one}'" for one in named) or f"-e '.[{extra}]' in the project's folder")


def is_out_of_memory(error: BaseException) -> bool:
    """torch has an error of its own for a GPU; its CPU allocator says it in words. oneDNN says that it could not create a
    primitive where there is no memory for the code of a kernel; a primitive *descriptor* is what does not exist."""
    words = r"can't allocate memory|could not create a primitive\b(?! descriptor)"
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or re.search(words, str(error)) is not None


class ConfigError(FastrobustError):
    """A configuration is not valid."""


class DataError(FastrobustError):
    """A data set is missing, damaged, or not in a form that can be read."""


class RunError(FastrobustError):
    """A run cannot start, continue or be read back."""
