"""`python -m dynkp`, which `accelerate launch -m dynkp predict ...` and torchrun start in every process."""

import sys

from dynkp.cli import main

if __name__ == "__main__":
    sys.exit(main())
