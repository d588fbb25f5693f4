"""`python -m kvpo` is the same as the `kvpo` command."""

import sys

from kvpo.app.cli import main

sys.exit(main())
