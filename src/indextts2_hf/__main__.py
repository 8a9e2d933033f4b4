"""`python -m indextts2_hf` is the command `indextts2`."""

import sys

from indextts2_cli import main


if __name__ == "__main__":
    sys.exit(main())
