"""`python -m ckd`: the same as the console script `ckd`."""

import sys

from ckd.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m ckd"))
