"""`python -m vocseg` is the command `vocseg`."""

import sys

# Python puts the working directory first: a click.py that lies there is not what vocseg is to import.
if not sys.flags.safe_path:
    del sys.path[0]

from vocseg.cli import main

main()
