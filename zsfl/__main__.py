"""`python -m zsfl` is the `zsfl` command."""

import sys

from zsfl.cli import main

sys.exit(main())
