"""The students are trained, a Ray Tune trial for each arm and seed, as a Ray job.

ray job submit --working-dir . -- python rayjobs/train.py configs/quickstart.yaml storage=/a/folder/all/nodes/see
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
