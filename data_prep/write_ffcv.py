"""Write a data set as FFCV files, for the loader ffcv. The same as `fastrobust prepare ffcv`.

python data_prep/write_ffcv.py imagenet
python data_prep/write_ffcv.py imagenet --dry-run              # sizes and time
python data_prep/write_ffcv.py image_folder --data DIR --output DIR --sizes 160 original --storage mixed
"""

import sys

from fastrobust.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "ffcv", *sys.argv[1:]]))
