"""`python -m fastrobust.train CONFIG` is `fastrobust train CONFIG`."""

import sys

from fastrobust.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
