"""All students answer the test problems in one engine, as a Ray job.

ray job submit --working-dir . -- python rayjobs/evaluate.py configs/quickstart.yaml storage=/a/folder/all/nodes/see
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
