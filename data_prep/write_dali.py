"""Write a data set as WebDataset shards, for the loaders dali and torch. The same as `fastrobust prepare dali`.

python data_prep/write_dali.py imagenet
python data_prep/write_dali.py imagenet --dry-run              # sizes and time
python data_prep/write_dali.py image_folder --data DIR --output DIR --sizes 160 original --storage mixed
"""

import sys

from fastrobust.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "dali", *sys.argv[1:]]))
