"""`python -m dynkp.cli`: the earlier spelling of `python -m dynkp`."""

import sys

from dynkp.cli import main

if __name__ == "__main__":
    sys.exit(main())
