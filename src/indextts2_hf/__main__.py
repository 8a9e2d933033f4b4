"""`python -m indextts2_hf` is the command `indextts2`."""

import sys

from indextts2_cli import main


sys.exit(main())
