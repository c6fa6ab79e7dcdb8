"""XLA's flags for tests, and for the processes that they start."""

from importlib.metadata import version
from importlib.util import find_spec

# Nearly all time of these small models is compilation: nothing is optimised for speed, no program is split to be
# compiled by several threads, and the old emitters take a quarter of the new ones' time. jaxlib 0.11 and libtpu know
# those no longer, and end at flags that they do not know.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11) and find_spec("libtpu") is None:
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """Of a process with so many CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={devices}"
