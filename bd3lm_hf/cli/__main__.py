"""`python -m bd3lm_hf.cli`."""

import sys

from . import main


sys.exit(main())
