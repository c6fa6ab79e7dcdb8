"""NVIDIA cards as XLA's compiler asks about them, so that it compiles for one that is not there."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Card:
    """Facts of one card; bytes, and a second, unless named otherwise.

    Sizes, bandwidth and clock are those of the cards' descriptions in openxla/xla (Apache-2.0), under
    xla/backends/gpu/target_config/specs; rates and links are NVIDIA's data sheets', of dense products in bfloat16, one
    direction of NVLink, and the network adapter that a DGX has for each card.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    units: int
    """Of single precision, in each multiprocessor."""
    clock: float
    """GHz."""
    memory: int
    bandwidth: int
    l2: int
    shared: int
    """Memory of a multiprocessor that its threads share."""
    flops: float
    nvlink: float
    network: float

    def description(self) -> str:
        """A `GpuTargetConfigProto` in text; what it leaves out changes nothing in the program."""
        major, minor = self.capability
        feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
        values = {
            "threads_per_block_limit": 1024,
            "threads_per_warp": 32,
            "shared_memory_per_block": 49152,
            "shared_memory_per_core": self.shared,
            "shared_memory_per_block_optin": self.shared - 1024,
            "threads_per_core_limit": 2048,
            "core_count": self.multiprocessors,
            "fpus_per_core": self.units,
            "block_dim_limit_x": 2**31 - 1,
            "block_dim_limit_y": 65535,
            "block_dim_limit_z": 65535,
            "thread_dim_limit_x": 1024,
            "thread_dim_limit_y": 1024,
            "thread_dim_limit_z": 64,
            "registers_per_core_limit": 65536,
            "registers_per_block_limit": 65536,
            "memory_bandwidth": self.bandwidth,
            "l2_cache_size": self.l2,
            "clock_rate_ghz": self.clock,
            "device_memory_size": self.memory,
            "device_address_bits": 64,
        }
        fields = " ".join(f"{name}: {value}" for name, value in values.items())
        return (
            f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: {major} minor: {minor} "
            f'feature_extension: {feature} }} device_vendor: "NVIDIA Corporation" name: "{self.name}" '
            'driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" '
            'dnn_version: "9.15.0" } platform_name: "CUDA" dnn_version_info { major: 9 minor: 15 } '
            f'device_description_str: "{self.name}"'
        )


_A100, _HOPPER = 167_936, 233_472  # bytes of shared memory
CARDS = {
    "a100": Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040, _A100,
        312e12, 300e9, 25e9,
    ),
    "h100": Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800, _HOPPER,
        989e12, 450e9, 50e9,
    ),
    "h200": Card(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800, _HOPPER,
        989e12, 450e9, 50e9,
    ),
    "b200": Card(
        "NVIDIA B200", (10, 0), 148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864, _HOPPER,
        2250e12, 900e9, 50e9,
    ),
}  # fmt: skip
