"""Paths as people write them: ~/runs, $DISK/photos. Only the standard library is imported here."""

import os
import re
from pathlib import Path

from fastrobust.runtime.errors import ConfigError


def expand(path: str | Path) -> str:
    """The path with ~ and $VARIABLES written out. Raises ConfigError for those that are none, unless there is a file or
    folder of that very name."""
    found = os.path.expanduser(os.path.expandvars(path))
    if not os.path.lexists(found):
        if unset := re.search(r"\$\{?(\w+)", found):
            raise ConfigError(f"the environment variable {unset[1]} is not set")
        if found.startswith("~"):
            raise ConfigError(f"there is no home folder for '{found.split('/')[0]}'")
    return found


def utf8(text: str, where: str = "") -> str:
    """The text, which a config can hold. Raises ConfigError for one with bytes that are not UTF-8, as paths may have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        found = f"{where}'{text.encode(errors='backslashreplace').decode()}' is not UTF-8, and a config cannot hold it"
        raise ConfigError(f"{found}: rename it, or give a link to it with a plain name") from None
    return text
