"""What the command lines share: errors as one message and an exit status, never a traceback."""

import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastrobust.runtime.errors import FastrobustError, first_line, is_out_of_memory


def main_with_errors(command: Callable[[], int]) -> int:
    """Run a command. Exit status 2 for a problem that the user can mend, 130 when stopped by the keyboard, 75 when a
    scheduler or a lost terminal stopped a run that can be resumed. Names that are not UTF-8 are printed with
    backslashes."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = interruptible(command)
        sys.stdout.flush()
        return status
    except FastrobustError as error:
        status = getattr(error, "status", 2)
        if not getattr(error, "silent", False):
            print(f"{'error: ' if status == 2 else ''}{error}", file=sys.stderr)
        return status
    except KeyboardInterrupt as stopped:  # what it holds says how to go on
        print("; ".join(["stopped by the keyboard", *map(str, stopped.args)]), file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: out of memory: {first_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read what is printed has had enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 2


def interruptible(command: Callable[[], Any]) -> Any:
    """Run a command. What Ctrl-C became on its way, such as an ImportError of a library that it met in the middle of its
    import, is a KeyboardInterrupt again."""
    try:
        return command()
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not hasattr(error, "status"):
            if isinstance(cause, KeyboardInterrupt):
                raise KeyboardInterrupt(*cause.args) from error
            cause = cause.__cause__ or cause.__context__
        raise


def to_paste(*words: object) -> str:
    """A fastrobust command as it can be pasted into the shell that started this program."""
    script = shutil.which("fastrobust")
    ours = script is not None and Path(script).parent == Path(sysconfig.get_path("scripts"))
    command = ["fastrobust"] if ours else [sys.executable, "-m", "fastrobust"]
    return shlex.join([*command, *map(str, words)])
