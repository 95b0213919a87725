"""The whole experiment, from problems to report, as a Ray job.

ray job submit --working-dir . -- python rayjobs/run.py configs/quickstart.yaml storage=/a/folder/all/nodes/see
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
