"""`python -m peftlite`: the command line, also for torchrun."""

import sys

from peftlite.cli import main

sys.exit(main())
