"""Quantised tensors of published checkpoints, dequantised when they are read.

`quantization_config` of config.json names the method; a method is an entry of `METHODS`: which tensors make one weight,
and how. A weight becomes a `Lazy` [out, in] of float32, so that no more than a few rows of it are worked out at once.
Activations are not quantised here: scales for them, and for keys and values in a cache, are left out.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from e2p_jax.backbone.lazy import Lazy
from e2p_jax.errors import UserError

Parts = Mapping[str, np.ndarray]
Settings = Mapping[str, Any]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which four bits of an int32 hold each of eight outputs
_FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0], np.float32)


class Method(NamedTuple):
    """How weights are stored."""

    key: str
    """End of the name of a tensor that only quantised weights have."""
    parts: tuple[str, ...]
    """Ends of what stands beside it, `?` in front of those that may be absent."""
    make: Callable[[Parts, Settings], Lazy]
    """The parts by their ends, and `quantization_config` -> the weight."""
    becomes: str = ".weight"
    """End of its name."""
    refuse: Callable[[Settings], str] = lambda settings: ""
    """Says what of the settings is not supported."""


def check_method(settings: Any, source: Path) -> tuple[Method, ...]:
    """What reads the tensors that `quantization_config` describes.

    Raises:
      UserError: a method, or a form of one, that is not known.
    """
    if not isinstance(settings, dict):
        raise UserError(f"{source}: quantization_config is {str(settings)[:60]}; it must be an object")
    name = settings.get("quant_method")
    methods = METHODS.get(name, ()) if isinstance(name, str) else ()
    why = next((why for method in methods if (why := method.refuse(settings))), "")
    if methods and not why:
        return methods
    what = f"{name!r} with {why}" if why else repr(name)[:60]
    raise UserError(
        f"{source}: quantization_config: weights quantised by {what} cannot be read; take the model unquantised, as "
        f"GGUF, or by one of {sorted(METHODS)}"
    )


def unpack(stored: dict[str, np.ndarray], settings: Settings, source: Path) -> dict[str, np.ndarray | Lazy]:
    """Names of the model as it was before quantisation -> tensors.

    Args:
      stored: the checkpoint's tensors.
      settings: `quantization_config`.
      source: names the file that it stands in.

    Raises:
      UserError: a method that is not known, or tensors that do not belong together.
    """
    left: dict[str, np.ndarray | Lazy] = dict(stored)
    found: dict[str, np.ndarray | Lazy] = {}
    for method in check_method(settings, source):
        for tensor in [tensor for tensor in left if tensor.endswith(method.key)]:
            module = tensor.removesuffix(method.key)
            parts = {method.key: stored[tensor]}
            for part in method.parts:
                end = part.removeprefix("?")
                held = [n for n in (module + end, *_states(module, end, left)) if n in left]
                if held:
                    parts[end] = stored[held[0]]
                elif not part.startswith("?"):
                    raise UserError(f"{source.parent}: {tensor} has no {module}{end} beside it; download it again")
            if method.key == ".weight_scale" and parts[".weight"].dtype.itemsize > 1:
                continue  # a scale of something that is not quantised
            try:
                found[module + method.becomes] = method.make(parts, settings)
            except (ValueError, IndexError, KeyError, TypeError, ArithmeticError) as error:
                raise UserError(f"{source.parent}: {tensor} and what belongs to it cannot be read ({error})") from error
            for end in parts:
                for n in (module + end, *_states(module, end, left)):
                    left.pop(n, None)
    return {n: tensor for n, tensor in left.items() if not n.endswith(_OF_ACTIVATIONS)} | found


_OF_ACTIVATIONS = (
    *(".input_scale", ".input_zero_point", ".input_global_scale", ".input_scale_ub", ".activation_scale"),
    *(".k_scale", ".v_scale", ".q_scale", ".output_scale"),
)


def _states(module: str, end: str, names: Mapping[str, Any]) -> list[str]:
    """Bitsandbytes writes the kind of a weight into the name of what says its shape."""
    return [n for kind in ("nf4", "fp4") if (n := f"{module}{end}{kind}") in names] if end.endswith("__") else []


def _fields(packed: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Whole numbers of so many bits, the lowest of each int32 first, along an axis of `packed` [R, C]."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    spread = packed.astype(np.int32).view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    spread = spread.astype(np.int32)
    return spread.reshape(len(packed), -1) if axis == 1 else spread.swapaxes(1, 2).reshape(-1, packed.shape[1])


def _float(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.float32)


def _awq(parts: Parts, settings: Settings) -> Lazy:
    """Outputs are packed eight to a number [in, out / 8], and have a scale and a zero for each group of inputs."""
    codes, zeros, scales = parts[".qweight"], parts[".qzeros"], parts[".scales"]
    width, group = codes.shape[0], codes.shape[0] // scales.shape[0]

    def columns(packed: np.ndarray, first: int, last: int) -> np.ndarray:
        fields = _fields(packed[:, first // 8 : -(-last // 8)], 4, 1)
        ordered = fields.reshape(len(packed), -1, 8)[:, :, _AWQ_ORDER].reshape(len(packed), -1)
        return ordered[:, first % 8 :][:, : last - first]

    def rows(first: int, last: int) -> np.ndarray:
        zero = np.repeat(columns(zeros, first, last), group, axis=0)
        scale = np.repeat(_float(scales[:, first:last]), group, axis=0)
        return (_float(columns(codes, first, last) - zero) * scale).T

    return Lazy((scales.shape[1], width), rows)


def _gptq(parts: Parts, settings: Settings) -> Lazy:
    """Inputs are packed [in * bits / 32, out]; each names its group, which has scales, and zeros packed along outputs.

    The first form of the format (`gptq`) keeps zeros less one.
    """
    codes, zeros, scales = parts[".qweight"], parts[".qzeros"], parts[".scales"]
    bits = settings["bits"]
    width, each = codes.shape[0] * 32 // bits, 32 // bits
    groups = parts.get(".g_idx", np.arange(width) // -(-width // scales.shape[0]))
    offset = 0 if settings.get("checkpoint_format", "gptq") == "gptq_v2" else 1

    def rows(first: int, last: int) -> np.ndarray:
        zero = _fields(zeros[:, first // each : -(-last // each)], bits, 1)[:, first % each :][:, : last - first]
        zero = zero + offset & (1 << bits) - 1
        code = _fields(codes[:, first:last], bits, 0)
        return (_float(code - zero[groups]) * _float(scales[:, first:last])[groups]).T

    return Lazy((scales.shape[1], width), rows)


def _bnb_4bit(parts: Parts, settings: Settings) -> Lazy:
    """Codes of a table of 16 numbers, the high half of a byte first, in blocks over the weight, row after row.

    The blocks' greatest values may be quantised themselves.
    """
    state = json.loads(parts[".weight.quant_state.bitsandbytes__"].tobytes())
    codes, table = parts[".weight"].reshape(-1), _float(parts[".weight.quant_map"])
    greatest = parts[".weight.absmax"]
    if ".weight.nested_absmax" in parts:
        outer = np.repeat(_float(parts[".weight.nested_absmax"]), state["nested_blocksize"])[: len(greatest)]
        greatest = _float(parts[".weight.nested_quant_map"])[greatest] * outer + np.float32(state["nested_offset"])
    out, width = state["shape"]

    def rows(first: int, last: int) -> np.ndarray:
        start, end = first * width, last * width
        pairs = codes[start // 2 : -(-end // 2)]
        flat = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)[start % 2 :][: end - start]
        blocks = _float(greatest)[np.arange(start, end) // state["blocksize"]]
        return (table[flat] * blocks).reshape(-1, width)

    return Lazy((out, width), rows)


def _bnb_int8(parts: Parts, settings: Settings) -> Lazy:
    """A row's greatest value is 127."""
    codes, greatest = parts[".weight"], _float(parts[".SCB"])
    if np.any(parts.get(".weight_format", 0)):
        raise ValueError("its weight_format is that of a GPU kernel")
    return Lazy(codes.shape, lambda a, b: _float(codes[a:b]) * (greatest[a:b, None] / np.float32(127)))


def _scaled(parts: Parts, settings: Settings) -> Lazy:
    """8 bits a number: a scale (and a zero) for all, a row, a group of a row's inputs, or a block of both."""
    codes = parts[".weight"]
    scale = _float(parts[".weight_scale_inv" if ".weight_scale_inv" in parts else ".weight_scale"])
    scale = scale.reshape(-1, 1) if scale.ndim < 2 else scale
    blocks = settings.get("weight_block_size") or _block_size(settings)
    tall, wide = blocks or (-(-codes.shape[0] // scale.shape[0]), -(-codes.shape[1] // scale.shape[1]))
    if (-(-codes.shape[0] // tall), -(-codes.shape[1] // wide)) != scale.shape:
        raise ValueError(f"scales {scale.shape} in blocks of {tall} x {wide} for a weight {codes.shape}")
    zero = parts.get(".weight_zero_point")

    def rows(first: int, last: int) -> np.ndarray:
        def spread(values: np.ndarray) -> np.ndarray:
            chosen = values.reshape(scale.shape)[np.arange(first, last) // tall]
            return np.repeat(chosen, wide, axis=1)[:, : codes.shape[1]]

        values = _float(codes[first:last])
        return (values if zero is None else values - spread(_float(zero))) * spread(scale)

    return Lazy(codes.shape, rows)


def _block_size(settings: Settings) -> tuple[int, int] | None:
    """Of compressed-tensors, where its scales are for blocks."""
    groups = settings.get("config_groups", {}).values()
    found = [group["weights"].get("block_structure") for group in groups if group.get("weights")]
    return tuple(found[0]) if found and found[0] else None


def _pack_quantized(parts: Parts, settings: Settings) -> Lazy:
    """compressed-tensors: inputs packed [out, in * bits / 32] as distances from the least code.

    Scales are for a row or a group of its inputs; zeros, where there are any, are packed along outputs.
    """
    codes, scales = parts[".weight_packed"], parts[".weight_scale"]
    out, width = (int(size) for size in parts[".weight_shape"])
    each = -(-width // codes.shape[1])
    bits = 32 // each
    least = 1 << bits - 1
    groups = parts.get(".weight_g_idx", np.arange(width) // -(-width // scales.shape[1]))
    zeros = parts.get(".weight_zero_point")

    def rows(first: int, last: int) -> np.ndarray:
        values = _fields(codes[first:last], bits, 1)[:, :width]
        if zeros is None:
            values = values - least
        else:
            zero = _fields(zeros[first // each : -(-last // each)], bits, 0)[first % each :][: last - first]
            values = values - zero[:, groups]
        return _float(values) * _float(scales[first:last])[:, groups]

    return Lazy((out, width), rows)


def _fp4(codes: np.ndarray) -> np.ndarray:
    """[..., n] uint8 -> [..., 2 n]: E2M1, the low half of a byte first (OCP Microscaling formats 1.0, 5.3.3)."""
    return _FP4[np.stack([codes & 15, codes >> 4], axis=-1)].reshape(*codes.shape[:-1], -1)


def _powers(exponents: np.ndarray) -> np.ndarray:
    """E8M0: powers of two, the exponent with 127 added (the same, 5.4.1)."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - 127)


def _fp4_packed(parts: Parts, settings: Settings) -> Lazy:
    """compressed-tensors: NVFP4, scales of 16 inputs in 8 bits and one for all, or MXFP4, powers of two for 32."""
    codes, scales = parts[".weight_packed"], parts[".weight_scale"]
    whole = _float(np.ravel(parts.get(".weight_global_scale", 1.0))[0])

    def rows(first: int, last: int) -> np.ndarray:
        scale = scales[first:last]
        scale = _powers(scale) if scale.dtype == np.uint8 else _float(scale) / whole
        values = _fp4(codes[first:last])
        return values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)

    return Lazy((codes.shape[0], 2 * codes.shape[1]), rows)


def _compressed(parts: Parts, settings: Settings) -> Lazy:
    return (_fp4_packed if parts[".weight_packed"].dtype == np.uint8 else _pack_quantized)(parts, settings)


def _mxfp4(parts: Parts, settings: Settings) -> Lazy:
    """gpt-oss: experts [X, out, in / 32, 16] with a scale each block; transposed, as transformers keeps them."""
    codes, scales = parts["_blocks"], parts["_scales"]
    experts, out, blocks, half = codes.shape

    def rows(first: int, last: int) -> np.ndarray:
        values = _fp4(codes[first:last]) * _powers(scales[first:last])[..., None]
        return values.reshape(last - first, out, -1).swapaxes(1, 2)

    return Lazy((experts, blocks * half * 2, out), rows)


def _other_awq(settings: Settings) -> str:
    bits, version = settings.get("bits", settings.get("w_bit", 4)), str(settings.get("version", "gemm")).lower()
    return "" if bits == 4 and version == "gemm" else f"bits={bits}, version={version!r}"


def _other_gptq(settings: Settings) -> str:
    bits, form = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    return "" if bits in (2, 4, 8) and form in ("gptq", "gptq_v2") else f"bits={bits!r}, checkpoint_format={form!r}"


def _other_compressed(settings: Settings) -> str:
    form = settings.get("format", "dense")
    known = (
        *("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision"),
        *("nvfp4-pack-quantized", "mxfp4-pack-quantized"),
    )
    if form not in known:
        return f"format={form!r}"
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if sparse != "dense" or settings.get("transform_config"):
        return "a sparsity_config" if sparse != "dense" else "a transform_config"
    return ""


def _other_modelopt(settings: Settings) -> str:
    algorithm = settings.get("quant_algo")
    return "" if algorithm == "FP8" else f"quant_algo={algorithm!r}"


_SCALED = Method(".weight_scale", (".weight", "?.weight_zero_point"), _scaled)
_BNB_4BIT = (
    *(".weight", ".weight.quant_map", ".weight.quant_state.bitsandbytes__"),
    *("?.weight.nested_absmax", "?.weight.nested_quant_map"),
)
_PACKED = (".weight_scale", "?.weight_shape", "?.weight_zero_point", "?.weight_g_idx", "?.weight_global_scale")


METHODS: dict[str, tuple[Method, ...]] = {
    "awq": (Method(".qweight", (".qzeros", ".scales"), _awq, refuse=_other_awq),),
    "gptq": (Method(".qweight", (".qzeros", ".scales", "?.g_idx"), _gptq, refuse=_other_gptq),),
    "bitsandbytes": (
        Method(".weight.absmax", _BNB_4BIT, _bnb_4bit),
        Method(".SCB", (".weight", "?.weight_format"), _bnb_int8),
    ),
    "compressed-tensors": (Method(".weight_packed", _PACKED, _compressed, refuse=_other_compressed), _SCALED),
    "fp8": (Method(".weight_scale_inv", (".weight",), _scaled),),
    "fbgemm_fp8": (_SCALED,),
    "modelopt": (_SCALED._replace(refuse=_other_modelopt),),
    "mxfp4": (Method("_blocks", ("_scales",), _mxfp4, becomes=""),),
}
