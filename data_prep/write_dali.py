"""Write a data set as WebDataset shards, for the loaders dali and torch.

python data_prep/write_dali.py imagenet
python data_prep/write_dali.py imagenet --dry-run              # sizes and time
python data_prep/write_dali.py image_folder --source DIR --output DIR --sizes 160 original --storage mixed
"""

import sys

from fastrobust.cli import main_with_errors
from fastrobust.data import writing

if __name__ == "__main__":
    sys.exit(main_with_errors(lambda: writing.main("webdataset", None)))
