"""`python -m vocseg` is the command `vocseg`."""

from vocseg.cli import main

main()
