"""`python -m winnow_serve` is the `winnow` command."""

import sys

from winnow_serve import main

sys.exit(main())
