"""Run a command of raykd as a Ray job, with the same arguments as `raykd`.

ray job submit --working-dir . -- python rayjobs/run.py run configs/quickstart.yaml storage=/shared/raykd
"""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main())
