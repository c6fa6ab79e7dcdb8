"""Counts what a compiled step costs, by its optimised HLO text: matrix FLOPs, memory traffic, collectives.

XLA's own `cost_analysis` counts the body of a loop once, and the layers are a loop: it reports one layer. Here every
instruction counts as often as its computation runs.

The text is parsed here because nothing that is installed with jax reads the program: jaxlib ships no schema of the HLO
proto, and what libtpu writes of device groups is newer than the published one.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}  # the others end with theirs, less what follows
_VMEM = 1  # memory space of arrays that never leave a TPU core
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all"}
_FREE |= {"partition-id", "replica-id", "iota", "opt-barrier"}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")

_KERNELS = ("tpu_custom_call", "__cudnn$fmha", "mosaic_gpu", "__gpu$xla.gpu.triton")  # targets of custom calls

_ARRAY = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{[\d,]*(?::[^}]*?)?\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")


class Array(NamedTuple):
    """One array of an instruction's result."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool

    @property
    def nbytes(self) -> int:
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[1]) if digits else 0)
        return -(-bits * int(np.prod(self.shape)) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = arrays opcode(operands), attributes`."""

    name: str
    arrays: tuple[Array, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # and, of a parameter or constant, its number or value
    is_root: bool

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def hbm_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays if array.in_hbm)

    def attribute(self, name: str) -> str | None:
        """Computation called as `name`, or the braces after it."""
        found = re.search(rf"\b{name}=(?:%([\w.\-]+)|(\{{.*?\}}|[\w\->]+))", self.attributes)
        return found and (found[1] or found[2])

    @property
    def op_name(self) -> str:
        """Names its place in the program, such as `jit(train_step)/jvp(..)/dot_general`."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for match in _ARRAY.finditer(text):
        space = _SPACE.search(match[0])
        shape = tuple(int(n) for n in match[2].split(",") if n)
        found.append(Array(match[1], shape, space is None or int(space[1]) != _VMEM))
    return tuple(found)


def _matching(text: str) -> int:
    """Index after the parenthesis that closes the one `text` begins with."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return place + 1
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def _instruction(line: str) -> Instruction | None:
    found = _INSTRUCTION.match(line)
    if not found:
        return None
    rest = _COMMENT.sub("", found[2])
    end = _matching(rest) if rest.startswith("(") else rest.index(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    rest = rest[len(opcode) :]
    end = _matching(rest)
    inside = rest[1 : end - 1]
    attributes = rest[end:] if opcode not in ("parameter", "constant") else f"{inside}{rest[end:]}"
    root = line.lstrip().startswith("ROOT ")
    return Instruction(found[1], _arrays(result), opcode, tuple(_NAME.findall(inside)), attributes, root)


class Collective(NamedTuple):
    """One collective of the program."""

    kind: str
    arrays: tuple[Array, ...]  # its results on one device
    group: int  # devices that take part together
    times: int  # it runs in a step
    op_name: str

    @property
    def nbytes(self) -> int:
        """Of its results, once."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def received(self) -> int:
        """Bytes that come to one device in a step, by the best ring algorithm."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "reduce-scatter": self.group - 1, "collective-permute": 1.0}
        return round(self.nbytes * factor.get(self.kind, share) * self.times)


class Program:
    """A parsed module: computations by name, and how often each runs in one execution."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        entry = current = ""
        for line in text.splitlines():
            if not line.startswith(" "):
                header = _HEADER.match(line)
                if header:
                    current = header[2]
                    self.computations[current] = {}
                    entry = current if header[1] else entry
            elif current and (instruction := _instruction(line)):
                self.computations[current][instruction.name] = instruction
        self.unknown_loops: list[str] = []
        """Loops whose number of iterations is not in the text; they count once."""
        self.runs: dict[str, int] = {}
        self.fused: set[str] = set()
        """Computations inside of one instruction, whose intermediate results stay in registers."""
        self._visit(entry, 1, fused=False)

    def _visit(self, name: str, times: int, fused: bool) -> None:
        self.runs[name] = self.runs.get(name, 0) + times
        if fused:
            self.fused.add(name)
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                body = instruction.attribute("body")
                assert body
                self._visit(body, times * self._iterations(instruction, self.computations[name]), fused)
            elif instruction.opcode == "conditional":
                branches = re.search(r"branch_computations=\{(.*?)\}", instruction.attributes)
                names = _NAME.findall(branches[1]) if branches else []
                names += [n for n in map(instruction.attribute, ("true_computation", "false_computation")) if n]
                for branch in names:
                    self._visit(branch, times, fused)
            elif called := instruction.attribute("calls"):
                self._visit(called, times, fused or not instruction.opcode.startswith("async"))
            elif instruction.opcode == "call" and (called := instruction.attribute("to_apply")):
                self._visit(called, times, fused)

    def _iterations(self, loop: Instruction, around: Computation) -> int:
        """From XLA's own note, or from `for (i = start; i < bound; i += step)`, as jax writes scans."""
        known = re.search(r'known_trip_count[^}]*?n[\\"]*:[\\"]*(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition, body = (self.computations[loop.attribute(name) or ""] for name in ("condition", "body"))
        try:
            index, bound = (condition[name] for name in _root(condition).operands)
            place = int(index.attribute("index") or "")
            step = body[_root(body).operands[place]]
            added = next(body[name] for name in step.operands if body[name].opcode == "constant")
            start = around[around[loop.operands[0]].operands[place]]
            while start.opcode in ("copy", "bitcast"):
                start = around[start.operands[0]]
            first = _value(start) if start.opcode == "constant" else 0  # a constant that an outer loop hands in
            return math.ceil((_value(bound) - first) / _value(added))
        except (KeyError, ValueError, IndexError, StopIteration):
            self.unknown_loops.append(loop.name)
            return 1

    def instructions(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every instruction, what stands around it, and how often it runs."""
        for name, times in self.runs.items():
            for instruction in self.computations[name].values():
                yield instruction, self.computations[name], times

    @property
    def kernels(self) -> dict[str, int]:
        """Kernels written by hand -> how often they run: those of Pallas, cuDNN's attention."""
        found: dict[str, int] = {}
        for instruction, _, times in self.instructions():
            if instruction.opcode == "custom-call" and (name := _kernel(instruction)):
                found[name] = found.get(name, 0) + times
        return found

    @property
    def loops(self) -> int:
        return sum(instruction.opcode == "while" for instruction, _, _ in self.instructions())

    @functools.cached_property
    def flops(self) -> float:
        """Of matrix products and of kernels that state theirs; one device, one execution."""
        return float(sum(_flops(one, around) * times for one, around, times in self.instructions()))

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Read from and written to memory by one device: what every instruction takes in and puts out, slices of
        larger arrays as the slices; arrays that a TPU keeps on its core are left out.
        """
        return sum(
            self._traffic(instruction, self.computations[name]) * times
            for name, times in self.runs.items()
            if name not in self.fused
            for instruction in self.computations[name].values()
        )

    def _traffic(self, instruction: Instruction, around: Computation) -> int:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return 0
        operands = [around[name] for name in instruction.operands]
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * instruction.hbm_bytes
        if opcode == "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes
        called = instruction.attribute("calls")
        if opcode not in ("fusion", "fusion-start") or called is None:
            return instruction.hbm_bytes * (not opcode.endswith("-start")) + sum(o.hbm_bytes for o in operands)
        read = sum(min(self._read(called, number), operand.hbm_bytes) for number, operand in enumerate(operands))
        return read + self._written(called, instruction.hbm_bytes)

    def _written(self, called: str, whole: int) -> int:
        """Bytes that a fusion writes: of an update in place, the update."""
        inside = self.computations[called]
        root = _root(inside)
        parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0
        for part in parts:
            while part.opcode == "bitcast":
                part = inside[part.operands[0]]
            if part.opcode == "dynamic-update-slice":
                total += inside[part.operands[1]].nbytes
            elif part.opcode == "fusion" and (deeper := part.attribute("calls")):
                total += self._written(deeper, part.nbytes)
            else:
                total += part.nbytes
        return min(total, whole)

    def _only_renames(self, instruction: Instruction) -> bool:
        """Whether, inside of a fusion, it gives all of its operand in another form, which alone reads nothing."""
        called = instruction.attribute("calls") if instruction.opcode == "fusion" else None
        if called is None:
            return instruction.opcode in ("bitcast", "copy")
        return len(self.computations[called]) == 2 and self._only_renames(_root(self.computations[called]))

    def _read(self, called: str, number: int) -> int:
        """Bytes of a parameter that a fusion reads: of slices, the slices; of what it updates in place, nothing."""
        inside = self.computations[called]
        parameter = next(i for i in inside.values() if i.opcode == "parameter" and _value(i) == number)
        names, total = {parameter.name}, 0  # what it is called, reshaped or in other tiles
        for user in inside.values():
            for place, name in enumerate(user.operands):
                if name not in names:
                    continue
                if self._only_renames(user):
                    names.add(user.name)
                elif user.opcode == "fusion" and (deeper := user.attribute("calls")):
                    total += self._read(deeper, place)
                elif place == 0 and user.opcode in ("dynamic-slice", "slice", "gather"):
                    total += user.nbytes
                elif place or user.opcode != "dynamic-update-slice":
                    return parameter.nbytes
        return min(total, parameter.nbytes)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        """An asynchronous one stands in several fusions under one channel; it is one."""
        found: dict[str, Collective] = {}
        for instruction, around, times in self.instructions():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            key = channel[1] if channel else instruction.name
            arrays = tuple(array for array in instruction.arrays if array.shape or array.dtype.startswith("f"))
            if instruction.opcode.endswith("-start") and kind in ("all-gather", "collective-permute"):
                taken = len([o for name in instruction.operands for o in around[name].arrays])
                arrays = arrays[taken : 2 * taken]  # after what it took in
            if key not in found:
                group = _group(instruction.attributes)
                found[key] = Collective(kind, arrays, group, times, instruction.op_name)
        return list(found.values())


def _root(computation: Mapping[str, Instruction]) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.is_root)


def _value(constant: Instruction) -> int:
    """Of an integer constant; anything else is a ValueError."""
    return int(constant.attributes.split(",")[0])


def _kernel(call: Instruction) -> str | None:
    """Name of the kernel that a custom call runs; None where XLA itself made the call."""
    target = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    if target is None or not target[1].startswith(_KERNELS):
        return None
    return target[1] if target[1].startswith("__cudnn") else re.sub(r"\.\d+$", "", call.name)


def _numbers(text: str | None) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text or "")]


def _flops(instruction: Instruction, around: Computation) -> float:
    if instruction.opcode == "custom-call":
        if "__cudnn$fmha" in instruction.attributes:
            return _attention_flops(instruction, around)
        stated = re.search(r'"cost_estimate":\s*(\{[^}]*\})', instruction.attributes.replace('\\"', '"'))
        return float(json.loads(stated[1]).get("flops", 0)) if stated else 0.0
    if instruction.opcode == "dot":
        left = around[instruction.operands[0]].arrays[0].shape
        summed = [left[axis] for axis in _numbers(instruction.attribute("lhs_contracting_dims"))]
        return 2.0 * np.prod(instruction.arrays[0].shape, dtype=float) * np.prod(summed, dtype=float)
    if instruction.opcode == "convolution":
        return _convolution_flops(instruction, around)
    return 0.0


def _attention_flops(call: Instruction, around: Computation) -> float:
    """Of cuDNN's attention as if every row were one causal segment: half of all pairs, in two products forward, five
    backward. Of shorter segments it skips more.
    """
    batch, length, heads, width = around[call.operands[0]].arrays[0].shape
    products = 5 if "SoftmaxBackward" in call.attributes else 2
    return products * batch * heads * length**2 * width


def _convolution_flops(instruction: Instruction, around: Computation) -> float:
    """A TPU's matrix products are convolutions, batch axes its spatial ones; only places inside the input count."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels
    left, right, out = (
        dict(zip(names, shape, strict=True))
        for names, shape in (
            (labels[1], around[instruction.operands[0]].arrays[0].shape),
            (labels[2], around[instruction.operands[1]].arrays[0].shape),
            (labels[3], instruction.arrays[0].shape),
        )
    )
    window = instruction.attribute("window") or "{}"
    spatial = sorted(label for label in right if label.isdigit())

    def setting(name: str, default: str) -> list[str]:
        found = re.search(rf"\b{name}=([\dx_\-]+)", window)
        return found[1].split("x") if found else [default] * len(spatial)

    pads, strides = setting("pad", "0_0"), setting("stride", "1")
    grow_left, grow_right = setting("lhs_dilate", "1"), setting("rhs_dilate", "1")
    places = 1.0
    for number, axis in enumerate(spatial):
        low = int(pads[number].split("_")[0])
        outputs = np.arange(out[axis])[:, None] * int(strides[number])
        at = outputs + np.arange(right[axis])[None] * int(grow_right[number]) - low
        dilation = int(grow_left[number])
        inside = (at >= 0) & (at % dilation == 0) & (at // dilation < left[axis])
        places *= int(inside.sum())
    groups = _numbers(instruction.attribute("batch_group_count"))
    return 2.0 * places * out["b"] * out["f"] * right["i"] / (groups[0] if groups else 1)


def _group(attributes: str) -> int:
    """Devices in a group of `replica_groups`, in any of its notations; a permutation moves between two."""
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes):
        sizes = dict(re.findall(r"'([\w:.]+)'=(\d+)", mesh[1]))
        return int(np.prod([int(sizes[axis]) for axis in re.findall(r"'([\w:.]+)'", mesh[2])]))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", attributes):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return len(listed[1].split(","))
    return 2
