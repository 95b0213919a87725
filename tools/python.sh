#!/bin/sh
# Print the newest supported Python that runs and can create virtual environments. A command on the PATH may do neither:
# pyenv has shims for versions that are not selected, and Debian has venv in a separate package.
for name in python3.13 python3.12 python3.11 python3 python; do
  if "$name" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
    command -v "$name"
    exit
  fi
done
echo "no Python 3.11, 3.12 or 3.13 with venv was found; install one, or name it: make install PYTHON=/path/to/python" >&2
exit 1
