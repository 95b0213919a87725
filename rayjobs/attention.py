"""What the attention heads of all students look at, as a Ray job.

ray job submit --working-dir . -- python rayjobs/attention.py configs/quickstart.yaml storage=/a/folder/all/nodes/see
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main(["attention", *sys.argv[1:]]))
