"""What TensorRT-LLM 1.2.1 calls the parts of this decoder, and what it makes one linear of.

Source: the checkpoint that ModelOpt 0.47.0 writes for a Qwen2 model (``tests/golden/modelopt``). A
TensorRT-LLM layer has five linears::

    attention.qkv    q_proj, k_proj and v_proj, their rows one after the other
    attention.dense  o_proj
    mlp.fc           gate_proj, the branch that goes through silu
    mlp.gate         up_proj
    mlp.proj         down_proj

Names of ours are canonical (:func:`mmr5_runtime.spec.canonical_name`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, has_bias

_LINEARS: Mapping[str, tuple[str, ...]] = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
_NORMS = {
    "input_layernorm": "input_layernorm",
    "post_layernorm": "post_attention_layernorm",
}
# Linears that share a scale of the whole weight, because a build may run them as one product.
_ONE_SCALE = (("mlp.fc", "mlp.gate"),)


@dataclass(frozen=True)
class TrtLinear:
    """One linear of a TensorRT-LLM layer.

    ``name`` is theirs, without a suffix; ``sources`` are our linears whose rows it stacks, with
    ``rows`` rows each; ``scaled_with`` are our linears that count for a scale of the whole weight:
    the sources, and for fc and gate those of both.
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int
    scaled_with: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Output and input size."""
        return sum(self.rows), self.columns

    @property
    def has_bias(self) -> bool:
        """Whether it has a bias: q, k and v do."""
        return has_bias(self.sources[0])


def trt_linears(spec: ModelSpec) -> list[TrtLinear]:
    """Every linear inside the layers, in order."""
    shapes = decoder_linear_shapes(spec)
    found = []
    for index in range(spec.text.num_layers):
        sources = {
            name: tuple(f"model.layers.{index}.{part}" for part in parts)
            for name, parts in _LINEARS.items()
        }
        for name, own in sources.items():
            together = next((group for group in _ONE_SCALE if name in group), (name,))
            found.append(
                TrtLinear(
                    name=f"transformer.layers.{index}.{name}",
                    sources=own,
                    rows=tuple(shapes[source][0] for source in own),
                    columns=shapes[own[0]][1],
                    scaled_with=tuple(source for other in together for source in sources[other]),
                )
            )
    return found


def dense_tensors(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors that are never quantized: our name and shape by theirs.

    The weights of the embedding, the norms and the head; biases belong to their linears.
    """
    text = spec.text
    table, norm = (text.vocab_size, text.hidden_size), (text.hidden_size,)
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        "transformer.vocab_embedding.weight": ("model.embed_tokens.weight", table)
    }
    for index in range(text.num_layers):
        for theirs, ours in _NORMS.items():
            name = f"transformer.layers.{index}.{theirs}.weight"
            names[name] = (f"model.layers.{index}.{ours}.weight", norm)
    names["transformer.ln_f.weight"] = ("model.norm.weight", norm)
    names["lm_head.weight"] = ("lm_head.weight", table)
    return names
