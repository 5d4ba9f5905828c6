"""`python -m fastrobust.train CONFIG` is `fastrobust train CONFIG`."""

import sys

from fastrobust.train import main

if __name__ == "__main__":
    sys.exit(main())
