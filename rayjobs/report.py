"""Tables and plots from what an experiment wrote, as a Ray job.

ray job submit --working-dir . -- python rayjobs/report.py configs/quickstart.yaml storage=/a/folder/all/nodes/see
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
