"""Devices to compile for that are not here: libtpu compiles for TPUs, jax's CUDA plugin for NVIDIA's cards."""

import contextlib
import dataclasses
import importlib.util
import os
import re
from typing import Any

import jax

from e2p_jax.errors import UserError
from e2p_jax.plan.cards import CARDS, Card


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of one device; 0 where nothing is published."""

    memory: int
    """Bytes that a program may use."""
    flops: float = 0.0
    """A second, in bfloat16."""
    bandwidth: float = 0.0
    """Bytes per second from memory."""
    interconnect: float = 0.0
    """Bytes per second from its neighbours."""


# What libtpu would ask a metadata server for, and complain about; and that no other process can hold a TPU.
NO_MACHINE = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}
GIB = 2**30
CARD_SHARE = 0.92  # of a card's memory goes to programs: what `launch/run.sh` sets, where jax by itself takes 0.75
# Memory is what libtpu gives to programs; the rest from cloud.google.com/tpu/docs, a page for each.
CHIPS = {
    "v5e": Chip(int(15.75 * GIB), 197e12, 819e9, 200e9),
    "v5p": Chip(int(95.74 * GIB), 459e12, 2765e9, 600e9),
    "v6e": Chip(int(31.25 * GIB), 918e12, 1600e9, 400e9),
    "tpu7x": Chip(int(94.74 * GIB), 2307e12 / 2, 7380e9 / 2, 300e9),  # of whose chips each is two devices
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for."""

    name: str
    devices: list[jax.Device]
    chip: Chip

    @property
    def memory(self) -> int:
        """Bytes of a device that a run knows of: on a CPU none."""
        return 0 if self.devices[0].platform == "cpu" else self.chip.memory


def find_topology(name: str) -> Topology:
    """`v5e:4x4`, `v5p:2x4x4`, `v6e:16x16`, `tpu7x:2x2x1`, or of two such slices `v5e:4x4:2`; `h100:8` or, of two hosts
    with 8 cards each, `h100:2x8`; or `cpu:N`, whose N devices share this machine's memory.

    Raises:
      UserError: not one of these, or there is no compiler for it.
    """
    kind, _, size = name.partition(":")
    if kind == "cpu" and re.fullmatch(r"[1-9]\d*", size):
        return _cpus(name, int(size))
    if kind in CHIPS and (found := re.fullmatch(r"(\d+x\d+(?:x\d+)?)(?::([2-9]|\d\d+))?", size)):
        return _tpus(name, CHIPS[kind], f"{kind}:{found[1]}", int(found[2] or 1))
    if kind in CARDS and (found := re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", size)):
        return _cards(name, CARDS[kind], int(found[1] or 1), int(found[2]))
    raise UserError(
        f"--topology {name}: give cpu:N; a TPU and its grid: v5e:4x4, v5p:2x4x4, v6e:8x8, tpu7x:2x2x1, or of two "
        f"slices v5e:4x4:2; or NVIDIA's cards, {', '.join(CARDS)}: h100:8, or of two hosts h100:2x8"
    )


def _cpus(name: str, count: int) -> Topology:
    with contextlib.suppress(RuntimeError):  # jax has started already, with as many as it has
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")[:count]
    if len(devices) < count:
        raise UserError(f"--topology {name}: this process has {len(devices)} CPU devices; start one of its own")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Topology(name, devices, Chip(memory // count))


def _tpus(name: str, chip: Chip, slice_: str, count: int) -> Topology:
    for variable, value in NO_MACHINE.items():
        os.environ.setdefault(variable, value)
    missing = importlib.util.find_spec("libtpu") is None
    options = {"num_slices": count} if count > 1 else {}
    return Topology(name, _described(name, slice_, "tpu", "libtpu", "tpu", missing, **options), chip)


def _cards(name: str, card: Card, hosts: int, each: int) -> Topology:
    jax.devices("cpu")  # jax starts on what is here
    options = {"target_config": card.description(), "topology": f"1x{hosts}x{each}"}
    missing = importlib.util.find_spec("jax_cuda13_plugin") is None
    devices = _described(name, "", "cuda", "jax's CUDA plugin", "cuda13", missing, **options)
    memory = int(card.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", CARD_SHARE)))
    return Topology(
        name, devices, Chip(memory, card.flops, card.bandwidth, card.nvlink if hosts == 1 else card.network)
    )


def _described(
    name: str, described: str, platform: str, compiler: str, extra: str, missing: bool, **options: Any
) -> list[jax.Device]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(described, platform, **options).devices)
    except Exception as error:  # libtpu, the plugin and jax raise several
        if missing:
            raise UserError(
                f"--topology {name}: {compiler} is not installed, and compiles for {platform.upper()}; pip install "
                f"'e2p-jax[{extra}]' into an environment (none of the devices is needed), or plan for cpu:N"
            ) from error
        raise UserError(f"--topology {name}: {compiler} does not give it: {str(error).splitlines()[0]}") from error
