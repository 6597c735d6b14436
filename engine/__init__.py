"""What the trainer stands on."""
import sys

import torch

OLDEST_TORCH = 2, 7  # the first whose compiler has recompile_limit
TESTED_TORCH = (2, 11), (2, 14)  # from the first to the last on which tests have passed

if torch.__version__ < OLDEST_TORCH:  # said here, before modules ask it for what it lacks
    oldest = ".".join(map(str, OLDEST_TORCH))
    print(f"expected torch {oldest} or newer, found {torch.__version__}; install what requirements.txt pins",
          file=sys.stderr)
    sys.exit(2)
