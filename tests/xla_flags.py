"""XLA's flags for tests, and for the processes that they start."""

from importlib.metadata import version

# Nearly all time of these small models is compilation: nothing is optimised for speed, and the old emitters, which
# jaxlib 0.11 no longer has, take a quarter of the new ones' time.
QUICK = "--xla_backend_optimization_level=0"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def xla_flags(devices: int) -> str:
    """Of a process with so many CPU devices."""
    return f"{QUICK} --xla_force_host_platform_device_count={devices}"
