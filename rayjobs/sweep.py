"""A search for hyper-parameters, chosen by validation problems and then tested, as a Ray job.

ray job submit --working-dir . -- python rayjobs/sweep.py configs/sweeps/demo.yaml storage=/a/folder/all/nodes/see
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main(["sweep", *sys.argv[1:]]))
