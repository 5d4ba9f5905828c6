"""What the command lines share: errors as one message and an exit status, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from fastrobust.errors import FastrobustError


def main_with_errors(command: Callable[[], int]) -> int:
    """Run a command. Exit status 2 for a problem that the user can mend, 128 + signal when stopped by one."""
    try:
        return command()
    except FastrobustError as error:
        signum = getattr(error, "signum", None)
        print(f"{'' if signum else 'error: '}{error}", file=sys.stderr)
        return 128 + signum if signum else 2
    except KeyboardInterrupt:
        print("stopped by the keyboard", file=sys.stderr)
        return 130
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
