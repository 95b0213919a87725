"""The primed teacher answers the training problems, as a Ray job.

ray job submit --working-dir . -- python rayjobs/generate.py configs/quickstart.yaml storage=/a/folder/all/nodes/see
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
