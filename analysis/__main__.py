"""`python -m analysis`: the bench."""

import sys

from .bench.main import main

sys.exit(main())
