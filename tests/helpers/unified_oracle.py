"""What ModelOpt makes of a tiny Qwen2.5-VL in the Hugging Face layout: the golden files of it.

Needs ModelOpt and is otherwise never imported: in an environment with the versions that
``tests/golden/modelopt/unified/README.md`` names, with the packages and ``tests`` on the path::

    PYTHONPATH=.:export:kernels:benchmarks:tests python tests/helpers/unified_oracle.py \
        tests/golden/modelopt/unified

writes one folder per quantization::

    values.safetensors    its codes (int4 packed as we do) and scales by our names, taken from the
                          arguments of its packers and not from the file it exports
    tensors.json          dtype, shape and, of quantized linears, sha256 of every tensor it writes
    config.json           and
    hf_quant_config.json  as it writes them
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.tiny import make_hf_model, tiny_configs
from mmr5_kernels.layout import pack_int4

CASES = {"w4a16": "INT4_AWQ_CFG", "fp8": "FP8_PER_CHANNEL_PER_TOKEN_CFG"}
LAYERS, VOCABULARY = 1, 576


def unified_config() -> Any:
    """The model: one decoder layer, a head of its own, columns in multiples of 128."""
    config = copy.deepcopy(tiny_configs()["int4"])
    config.text_config.num_hidden_layers = LAYERS
    config.text_config.layer_types = ["full_attention"] * LAYERS
    config.text_config.vocab_size = VOCABULARY
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    return config


def describe(path: Path) -> dict[str, dict[str, Any]]:
    """dtype and shape of every tensor of a safetensors file; of quantized linears also sha256."""
    found: dict[str, dict[str, Any]] = {}
    with safe_open(path, framework="pt") as reader:
        names = sorted(reader.keys())
        quantized = {name.removesuffix("_scale") for name in names if name.endswith("weight_scale")}
        for name in names:
            view = reader.get_slice(name)
            found[name] = {"dtype": view.get_dtype(), "shape": list(view.get_shape())}
            if name.removesuffix("_scale") in quantized:
                found[name]["sha256"] = bytes_sha256(reader.get_tensor(name))
    return found


def bytes_sha256(tensor: Tensor) -> str:
    """sha256 of a tensor's bytes in memory."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def make(name: str, folder: Path) -> None:
    """Quantizes and exports one case."""
    import modelopt.torch.export.unified_export_hf as exporter
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(getattr(mtq, CASES[name]))
    config["quant_cfg"] = [*config["quant_cfg"], {"quantizer_name": "*visual*", "enable": False}]
    model = make_hf_model(unified_config(), seed=9).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 500, (1, 64), generator=generator) for _ in range(8)]

    def loop(quantized: Any) -> None:
        for prompt in prompts:
            quantized(input_ids=prompt)

    seen: list[tuple[Tensor, Tensor]] = []
    pack = exporter.to_quantized_weight

    def watched(weight: Tensor, scale: Tensor, *rest: Any, **named: Any) -> Any:
        seen.append((weight.detach().clone(), scale.detach().clone()))
        return pack(weight, scale, *rest, **named)

    with tempfile.TemporaryDirectory() as made, torch.inference_mode():
        mtq.quantize(model, config, loop)
        linears = [
            path
            for path, module in model.named_modules()
            if "layers." in path and _quantized(module)
        ]
        exporter.to_quantized_weight = watched
        try:
            exporter.export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=made)
        finally:
            exporter.to_quantized_weight = pack
        values: dict[str, Tensor] = {}
        for path, (weight, scale) in zip(linears, seen, strict=True):
            linear = path.replace("model.language_model.", "model.")
            values |= {f"{linear}.{part}": t for part, t in _values(name, weight, scale).items()}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(values, folder / "values.safetensors")
        listed = describe(Path(made) / "model.safetensors")
        (folder / "tensors.json").write_text(json.dumps(listed, indent=1) + "\n")
        for file in ("config.json", "hf_quant_config.json"):
            shutil.copyfile(Path(made) / file, folder / file)


def _quantized(module: Any) -> bool:
    quantizer = getattr(module, "weight_quantizer", None)
    return quantizer is not None and bool(quantizer.is_enabled)


def _values(name: str, weight: Tensor, scale: Tensor) -> dict[str, Tensor]:
    scale = scale.to(torch.float32)
    if name == "fp8":
        codes = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale[:, None].contiguous()}
    columns = scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)
    codes = (weight / columns).round().clamp(-8, 7).to(torch.int8)
    return {"weight_packed": pack_int4(codes), "weight_scale": scale.contiguous()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for case in CASES:
        make(case, Path(sys.argv[1]) / case)
