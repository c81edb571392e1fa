"""Run the command line as `python -m postmortem`."""

from postmortem.cli import main

main()
