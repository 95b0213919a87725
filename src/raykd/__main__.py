"""`python -m raykd`: the command line."""

import sys

from raykd.cli import main

if __name__ == "__main__":
    sys.exit(main())
