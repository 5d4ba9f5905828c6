"""Training: methods, steps, runs. `main` is the train command, for programs that call it."""


def main(argv: list[str] | None = None) -> int:
    """`fastrobust train ARGV`; without arguments those of this program. Returns the exit status."""
    import sys

    from fastrobust.__main__ import main as command

    return command(["train", *(sys.argv[1:] if argv is None else argv)])
