"""`python -m cluster.cli`: the command line without the installed script."""

import sys

from cluster.cli.main import main

sys.exit(main())
