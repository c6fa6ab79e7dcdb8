"""No torch, as on the hosts that a run is made for: where it is installed transformers imports it, for two seconds."""

import sys

sys.modules["torch"] = None  # type: ignore[assignment]
