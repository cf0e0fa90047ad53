"""``python -m lrcompile``."""

from lrcompile.cli import main

main()
