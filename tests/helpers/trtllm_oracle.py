"""What ModelOpt makes of a tiny Qwen2 model: the golden files of the TensorRT-LLM checkpoint.

Needs ModelOpt and is otherwise never imported: in an environment with the versions that
``tests/golden/modelopt/README.md`` names, with the packages and ``tests`` on the path::

    PYTHONPATH=.:export:kernels:tests python tests/helpers/trtllm_oracle.py tests/golden/modelopt

writes one folder per quantization::

    values.safetensors   its codes and scales by our names (int4 packed as we do), and the largest
                         inputs; read from the quantized modules, whose simulated weights divided by
                         their scales are the codes, and not from the file it exports
    DTYPE/config.json    what its exporter writes when the 16-bit parts are DTYPE
    DTYPE/tensors.json   dtype, shape and sha256 of every tensor it writes
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import warnings
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.trtllm_tiny import VOCABULARY, dense_decoder, tiny_spec
from mmr5_kernels.layout import FP8, INT4, INT8, Format, pack_int4
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """One quantization: ModelOpt's name of it, None for none, and which of our formats it is."""

    config: str | None
    format: Format | None
    layers: int

    @property
    def spec(self) -> ModelSpec:
        """The model it is tried on."""
        return tiny_spec(self.layers)


CASES = {
    "int4-awq": Case("INT4_AWQ_CFG", Format("int4", INT4.group_size, scale="fp32"), 2),
    "int8-smoothquant": Case(
        "INT8_SMOOTHQUANT_CFG", Format("int8", activations=INT8.activations, scale="fp32"), 1
    ),
    "fp8": Case("FP8_DEFAULT_CFG", FP8, 2),
    "none": Case(None, None, 2),
}


def describe(path: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and sha256 of the bytes of every tensor of a safetensors file, by name."""
    found = {}
    with safe_open(path, framework="pt") as reader:
        for name in sorted(reader.keys()):
            tensor = reader.get_tensor(name)
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            found[name] = {
                "dtype": reader.get_slice(name).get_dtype(),
                "shape": list(tensor.shape),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
    return found


def run(case: Case, folder: Path) -> None:
    """Quantizes and exports, and writes the golden files of one case into ``folder``."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    model = _model(case.spec)
    if case.config is not None:
        ids = (torch.arange(256) * 7 % VOCABULARY).view(4, 64)
        config = deepcopy(getattr(mtq, case.config))
        model = mtq.quantize(model, config, lambda quantized: quantized(ids))
    for name, dtype in DTYPES.items():
        target = folder / name
        target.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory() as exported,
            torch.inference_mode(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            export_tensorrt_llm_checkpoint(
                model, "qwen", dtype=dtype, export_dir=exported, inference_tensor_parallel=1
            )
            made = Path(exported)
            _write_json(target / "config.json", json.loads((made / "config.json").read_text()))
            _write_json(target / "tensors.json", describe(made / "rank0.safetensors"))
    # Afterwards: the exporter gives q, k and v, and gate and up, what they have to share.
    values = _values(case, model)
    if values:
        save_file(values, folder / "values.safetensors")


def _model(spec: ModelSpec) -> Any:
    """The text model in transformers; Qwen2.5-VL itself is unknown to ModelOpt's exporter."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    text = spec.text
    config = Qwen2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_layers,
        num_attention_heads=text.num_heads,
        num_key_value_heads=text.num_kv_heads,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=text.rms_norm_eps,
        tie_word_embeddings=False,
        architectures=["Qwen2ForCausalLM"],
    )
    # ModelOpt looks for it here, where transformers 5 keeps it elsewhere and had it left out.
    config.rope_theta = text.rope_theta
    model = Qwen2ForCausalLM(config).eval()
    dense = {name: tensor.float() for name, tensor in dense_decoder(spec).items()}
    model.load_state_dict(dense)
    return model


def _values(case: Case, model: Any) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    for name in decoder_linear_shapes(case.spec) if case.format is not None else ():
        module = model.get_submodule(name)
        if module.input_quantizer.amax is not None:
            values[f"{name}.input_absmax"] = module.input_quantizer.amax.float().reshape(1).clone()
        if case.format == FP8:
            continue  # our writer makes the codes itself
        scale = (module.weight_quantizer.amax.float() / module.weight_quantizer.maxbound).reshape(
            len(module.weight), -1
        )
        with torch.inference_mode():
            simulated = module.weight_quantizer(module.weight).float()
        steps = (simulated.unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(-1)).flatten(1)
        codes = steps.round()
        assert (codes - steps).abs().max() < 1e-3, name  # or they are no codes
        values |= _stored(name, codes.to(torch.int8), scale, case.format)
    return values


def _stored(name: str, codes: Tensor, scale: Tensor, format: Format | None) -> Mapping[str, Tensor]:
    four = format is not None and format.weights == "int4"
    weight = {f"{name}.weight_packed": pack_int4(codes)} if four else {f"{name}.weight": codes}
    return weight | {f"{name}.weight_scale": scale.clone()}


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for label, each in CASES.items():
        run(each, Path(sys.argv[1]) / label)
