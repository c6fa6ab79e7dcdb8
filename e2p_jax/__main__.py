"""`python -m e2p_jax` is `e2p`."""

import sys

from e2p_jax.cli import main

sys.exit(main())
