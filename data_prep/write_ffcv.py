"""Write a data set as FFCV files, for the loader ffcv.

python data_prep/write_ffcv.py imagenet
python data_prep/write_ffcv.py imagenet --dry-run              # sizes and time
python data_prep/write_ffcv.py image_folder --source DIR --output DIR --sizes 160 original --storage mixed
"""

import sys

from fastrobust.cli import main_with_errors
from fastrobust.data import writing

if __name__ == "__main__":
    sys.exit(main_with_errors(lambda: writing.main("ffcv", None)))
