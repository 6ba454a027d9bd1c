"""``python -m permdistill.paper``."""

from permdistill.paper.cli import main

main()
