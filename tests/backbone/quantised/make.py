"""Makes the files beside it: one weight in each form, packed and unpacked again by the form's own package, in float32.

Run by hand, as the packages are large, some of them no longer released, and two come without their other modules:

    python make.py SITE SOURCES

SITE holds compressed-tensors 0.20.0 and bitsandbytes 0.50.2, SOURCES autoawq 0.2.9 and auto-gptq 0.7.1, unpacked.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE, (SITE, SOURCES) = Path(__file__).parent, sys.argv[1:3]
sys.path.insert(0, SITE)
OUT, IN, GROUP = 32, 64, 32


def write(name: str, parts: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    assert weight.shape == (OUT, IN) and weight.dtype == torch.float32
    tensors = {f"m.{end}": tensor.contiguous() for end, tensor in parts.items() if tensor is not None}
    save_file(tensors | {"reference": weight.contiguous()}, HERE / f"{name}.safetensors")


def module(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(SOURCES) / path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def awq(rng: torch.Generator) -> None:
    qweight = torch.randint(-(2**31), 2**31, (IN, OUT // 8), generator=rng).to(torch.int32)
    qzeros = torch.randint(-(2**31), 2**31, (IN // GROUP, OUT // 8), generator=rng).to(torch.int32)
    scales = torch.rand(IN // GROUP, OUT, generator=rng).half() + 0.1
    unpack = module("autoawq-0.2.9/awq/utils/packing_utils.py").dequantize_gemm
    weight = unpack(qweight, qzeros, scales.float(), 4, GROUP).T
    write("awq", {"qweight": qweight, "qzeros": qzeros, "scales": scales}, weight)


def gptq(rng: torch.Generator) -> None:
    layer = module("auto_gptq/nn_modules/qlinear/qlinear_cuda.py").QuantLinear
    for name, bits, order in (
        ("gptq-4", 4, False),
        ("gptq-4-ordered", 4, True),
        ("gptq-8", 8, False),
        ("gptq-2", 2, False),
    ):
        linear = torch.nn.Linear(IN, OUT, bias=False)
        linear.weight.data = torch.randn(OUT, IN, generator=rng)
        groups = torch.arange(IN) // GROUP
        groups = groups[torch.randperm(IN, generator=rng)] if order else groups
        packed = layer(bits, GROUP, IN, OUT, bias=False)
        scales = torch.rand(OUT, IN // GROUP, generator=rng) + 0.5
        zeros = torch.randint(1, 2**bits, (OUT, IN // GROUP), generator=rng).float()
        packed.pack(linear, scales, zeros, groups.to(torch.int32))
        packed.scales = packed.scales.half().float()
        weight = packed(torch.eye(IN)).T.detach()
        parts = {"qweight": packed.qweight, "qzeros": packed.qzeros, "scales": packed.scales.half()}
        write(name, parts | {"g_idx": packed.g_idx.to(torch.int32)}, weight)


def bitsandbytes(rng: torch.Generator) -> None:
    from bitsandbytes import functional

    weight = torch.randn(OUT, IN, generator=rng)
    for name, kind, nested in (("bnb-nf4", "nf4", False), ("bnb-nf4-nested", "nf4", True), ("bnb-fp4", "fp4", False)):
        codes, state = functional.quantize_4bit(weight, blocksize=64, compress_statistics=nested, quant_type=kind)
        parts = {"weight": codes} | {f"weight.{end}": value for end, value in state.as_dict(packed=True).items()}
        write(name, parts, functional.dequantize_4bit(codes, state).float())
    codes, greatest, _ = functional.int8_vectorwise_quant(weight.half())
    parts = {"weight": codes, "SCB": greatest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    write("bnb-int8", parts, functional.int8_vectorwise_dequant(codes, greatest).float())


def compressed_tensors(rng: torch.Generator) -> None:
    from compressed_tensors import compressors as forms
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def one(name: str, form, scale, zero=None, groups=None, whole=None, **arguments) -> None:
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
        parts = {"weight": torch.randn(OUT, IN, generator=rng), "weight_scale": scale, "weight_zero_point": zero}
        parts |= {"weight_g_idx": groups, "weight_global_scale": whole}
        packed = form.compress({end: value for end, value in parts.items() if value is not None}, scheme)
        write(name, packed, form.decompress(packed, scheme)["weight"].float())

    def scale(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=rng) / 4 + 0.1

    groups = (OUT, IN // GROUP)
    grouped = {"num_bits": 4, "strategy": "group", "group_size": GROUP}
    zero = torch.randint(-8, 8, groups, generator=rng).to(torch.int8)
    packed = forms.PackedQuantizationCompressor
    one("ct-int4", packed, scale(*groups), **grouped)
    one("ct-int4-asymmetric", packed, scale(*groups), zero, symmetric=False, **grouped)
    one("ct-int8-rows", packed, scale(OUT, 1) / 50, num_bits=8, strategy="channel")
    one("ct-int8", forms.IntQuantizationCompressor, scale(OUT, 1) / 50, num_bits=8, strategy="channel")
    eight = {"num_bits": 8, "type": "float"}
    one("ct-fp8-rows", forms.FloatQuantizationCompressor, scale(OUT, 1) / 50, strategy="channel", **eight)
    one("ct-fp8", forms.FloatQuantizationCompressor, scale(1) / 50, strategy="tensor", **eight)
    four = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    fine = (scale(OUT, IN // 16) * 100).to(torch.float8_e4m3fn).float()
    one("ct-nvfp4", forms.NVFP4PackedCompressor, fine, whole=torch.tensor([90.0]), **four)


if __name__ == "__main__":
    for make in (awq, gptq, bitsandbytes, compressed_tensors):
        make(torch.Generator().manual_seed(0))
