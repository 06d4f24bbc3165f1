"""What one Qwen2.5-VL checkpoint looks like: its dimensions, token ids and tensor names.

Nothing else in the project knows a model dimension; they all come from here, and here they come
from the checkpoint's ``config.json`` (see :mod:`mmr5_runtime.hf_config`) or from the manifest of an
engine folder. The letters used in every docstring of the project:

====== ==================================== ====== =======================================
T      new tokens of one call               P      image patches (before merging)
S      tokens already in the KV arena       N      pages; in a GEMM M x N x K the rows out
H      query heads                          B      sequences decoded together
K      key/value heads; GEMM inner size     L      decoder layers
D      head dimension                       V      vocabulary size
====== ==================================== ====== =======================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmr5_kernels.layout import Format
from mmr5_runtime.hf_config import parse_text, parse_tokens, parse_vision, require_qwen2_5_vl
from mmr5_runtime.types import CheckpointError, EngineError

# Rows and columns of an 8-bit matrix product come in multiples of this on GPUs.
EIGHT_BIT_MULTIPLE = 16


@dataclass(frozen=True)
class VisionSpec:
    """The vision tower: a ViT with windowed and full attention that merges patches at the end."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    fullatt_block_indexes: tuple[int, ...]
    in_channels: int = 3
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        _require(self.hidden_size % self.num_heads == 0, "vision hidden_size", "num_heads")
        # Rotary: half of a head for the row, half for the column, each made of pairs.
        _require(self.head_dim % 4 == 0, "vision head dimension", "4")
        _require(self.window_size % self.factor == 0, "vision window_size", "patch x merge size")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values of one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def factor(self) -> int:
        """Pixels on a side of one merged token; pages are resized to multiples of it."""
        return self.patch_size * self.spatial_merge_size

    @property
    def padded_intermediate(self) -> int:
        """``intermediate_size`` where the MLP is quantized: 3420, say, becomes 3424."""
        return -(-self.intermediate_size // EIGHT_BIT_MULTIPLE) * EIGHT_BIT_MULTIPLE

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2


@dataclass(frozen=True)
class TextSpec:
    """The language model: a pre-norm decoder with grouped-query attention and 3-axis rotary."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    max_position_embeddings: int
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        _require(self.num_heads % self.num_kv_heads == 0, "num_attention_heads", "kv heads")
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise CheckpointError(
                f"mrope_section {list(self.mrope_section)} must sum to half of the head dimension "
                f"{self.head_dim}; correct rope_scaling or head_dim in config.json."
            )

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def token_kv_values(self) -> int:
        """Numbers that one token leaves in the KV cache, all layers together."""
        return 2 * self.num_layers * self.kv_size


@dataclass(frozen=True)
class ModelSpec:
    """Everything the runtime knows about a checkpoint besides its weights."""

    vision: VisionSpec
    text: TextSpec
    image_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    def __post_init__(self) -> None:
        if self.vision.out_hidden_size != self.text.hidden_size:
            raise CheckpointError(
                f"the vision tower gives embeddings of {self.vision.out_hidden_size} values but "
                f"the language model takes {self.text.hidden_size}; make out_hidden_size and "
                "hidden_size in config.json equal."
            )
        ids = (self.image_token_id, self.vision_start_token_id, self.vision_end_token_id)
        for token in (*ids, *self.eos_token_ids, self.pad_token_id):
            if not 0 <= token < self.text.vocab_size:
                raise CheckpointError(
                    f"token id {token} in config.json or generation_config.json is outside the "
                    f"vocabulary of {self.text.vocab_size}; correct it or vocab_size."
                )

    @classmethod
    def from_hf_config(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> ModelSpec:
        """Reads ``config.json`` of either generation: flat (hub) or with ``text_config`` (nested).

        Raises :class:`CheckpointError` for another architecture, a missing size, or a variant this
        project does not compute (scaled rotary positions, sliding windows, another activation).
        """
        require_qwen2_5_vl(config)
        return cls(
            vision=VisionSpec(**parse_vision(config)),
            text=TextSpec(**parse_text(config)),
            **parse_tokens(config, generation_config or {}),
        )

    def to_json(self) -> dict[str, Any]:
        """A mapping that ``json`` can write; :meth:`from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSpec:
        """Rebuilds a spec from a manifest; raises :class:`EngineError` on an unknown shape."""
        try:
            vision, text = dict(data["vision"]), dict(data["text"])
            vision["fullatt_block_indexes"] = tuple(vision["fullatt_block_indexes"])
            text["mrope_section"] = tuple(text["mrope_section"])
            rest = {k: v for k, v in data.items() if k not in ("vision", "text")}
            rest["eos_token_ids"] = tuple(rest["eos_token_ids"])
            return cls(vision=VisionSpec(**vision), text=TextSpec(**text), **rest)
        except (KeyError, TypeError, ValueError, CheckpointError) as error:
            raise EngineError(
                f"the architecture block of the engine manifest cannot be read ({error}); "
                "export the engine again with this version."
            ) from error


def _require(divides: bool, what: str, by: str) -> None:
    if not divides:
        raise CheckpointError(
            f"{what} in config.json is not a multiple of {by}; correct config.json."
        )


def canonical_name(name: str) -> str:
    """The classic hub name of a tensor, from either naming (the newer one nests both towers)."""
    for new, classic in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(new):
            return classic + name[len(new) :]
    return name


def decoder_linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """``[N, K]`` of every linear inside the decoder layers: the ones quantization applies to."""
    text = spec.text
    per_layer = {
        "self_attn.q_proj": (text.q_size, text.hidden_size),
        "self_attn.k_proj": (text.kv_size, text.hidden_size),
        "self_attn.v_proj": (text.kv_size, text.hidden_size),
        "self_attn.o_proj": (text.hidden_size, text.q_size),
        "mlp.gate_proj": (text.intermediate_size, text.hidden_size),
        "mlp.up_proj": (text.intermediate_size, text.hidden_size),
        "mlp.down_proj": (text.hidden_size, text.intermediate_size),
    }
    return {
        f"model.layers.{i}.{name}": shape
        for i in range(text.num_layers)
        for name, shape in per_layer.items()
    }


def vision_linear_shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """``[N, K]`` of every linear of the vision tower; the patch embedding is a convolution."""
    vision = spec.vision
    size, inner, merged = vision.hidden_size, vision.intermediate_size, vision.merge_unit
    per_block = {
        "attn.qkv": (3 * size, size),
        "attn.proj": (size, size),
        "mlp.gate_proj": (inner, size),
        "mlp.up_proj": (inner, size),
        "mlp.down_proj": (size, inner),
    }
    shapes = {
        f"visual.blocks.{i}.{name}": shape
        for i in range(vision.depth)
        for name, shape in per_block.items()
    }
    shapes["visual.merger.mlp.0"] = (merged * size, merged * size)
    shapes["visual.merger.mlp.2"] = (vision.out_hidden_size, merged * size)
    return shapes


def linear_shapes(
    spec: ModelSpec, formats: Mapping[str, Format] | None = None
) -> dict[str, tuple[int, int]]:
    """``[N, K]`` of every Linear by canonical name, as it is stored with ``formats``.

    A tied ``lm_head`` is a Linear of its own only when it has a format. The MLP of a vision block
    that is quantized is padded (see :func:`pad_vision`). Raises :class:`EngineError` for a format
    of a linear that is not there, and for an MLP of the tower that is quantized in part.
    """
    formats = formats or {}
    shapes = vision_linear_shapes(spec) | decoder_linear_shapes(spec)
    if not spec.text.tie_word_embeddings or "lm_head" in formats:
        shapes["lm_head"] = spec.text.vocab_size, spec.text.hidden_size
    if unknown := [name for name in formats if name not in shapes]:
        raise EngineError(
            f"a storage format is given for {_some(unknown)}, which this model does not have; "
            "export the engine again."
        )
    for i in range(spec.vision.depth):
        block = f"visual.blocks.{i}.mlp."
        mlp = [f"{block}{part}_proj" for part in ("gate", "up", "down")]
        if 0 < sum(name in formats for name in mlp) < len(mlp):
            raise EngineError(
                f"the linears of {block}* are quantized in part, but share a padded size; export "
                "the engine with all three of them quantized, or none."
            )
        if mlp[0] in formats:
            size, inner = spec.vision.hidden_size, spec.vision.padded_intermediate
            shapes |= {mlp[0]: (inner, size), mlp[1]: (inner, size), mlp[2]: (size, inner)}
    return shapes


def pad_vision(name: str, tensor: Tensor, spec: ModelSpec) -> Tensor:
    """A dense tensor of the tower as it is before its linear is quantized.

    ``name`` is that of a tensor of a block that is quantized: gate and up get rows of zeros (weight
    [I, hidden] and bias [I]) and down gets columns of zeros ([hidden, I]) until I is
    ``padded_intermediate``; the product is unchanged. Other tensors are returned as they are.
    """
    missing = spec.vision.padded_intermediate - spec.vision.intermediate_size
    parts = name.split(".")
    if parts[:2] != ["visual", "blocks"] or "mlp" not in parts:
        return tensor
    if "down_proj" in parts:
        return pad(tensor, (0, missing)) if parts[-1] == "weight" else tensor
    return pad(tensor, (0, missing) if tensor.ndim == 1 else (0, 0, 0, missing))


def linear_names(spec: ModelSpec) -> list[str]:
    """Canonical names, without a suffix, of every Linear (see :func:`linear_shapes`)."""
    return list(linear_shapes(spec))


def has_bias(linear: str) -> bool:
    """Whether a linear of this architecture has a bias: all of vision, and q, k, v."""
    return linear.startswith("visual.") or linear.endswith(("q_proj", "k_proj", "v_proj"))


def tensor_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor of a dense checkpoint, by canonical name."""
    return stored_shapes(spec, {})


def stored_shapes(spec: ModelSpec, formats: Mapping[str, Format]) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor; see :func:`stored_tensors`."""
    return {name: shape for name, (shape, _) in stored_tensors(spec, formats).items()}


def stored_tensors(
    spec: ModelSpec, formats: Mapping[str, Format]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every stored tensor when ``formats`` says how linears are kept.

    A linear that ``formats`` leaves out is dense; dense tensors are bf16 in an engine. Raises
    :class:`EngineError` for an unknown linear and for a format that does not fit its linear.
    """
    vision, text = spec.vision, spec.text
    frame = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    shapes: dict[str, tuple[int, ...]] = {
        "visual.patch_embed.proj.weight": (vision.hidden_size, vision.in_channels, *frame),
        "visual.merger.ln_q.weight": (vision.hidden_size,),
        "model.embed_tokens.weight": (text.vocab_size, text.hidden_size),
        "model.norm.weight": (text.hidden_size,),
    }
    for i in range(vision.depth):
        for norm in ("norm1", "norm2"):
            shapes[f"visual.blocks.{i}.{norm}.weight"] = (vision.hidden_size,)
    for i in range(text.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{i}.{norm}.weight"] = (text.hidden_size,)
    stored = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    for name, (rows, columns) in linear_shapes(spec, formats).items():
        stored |= _linear_tensors(name, rows, columns, formats.get(name))
    return stored


def _linear_tensors(
    name: str, rows: int, columns: int, format: Format | None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    if format is None:
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight": ((rows, columns), torch.bfloat16)
        }
    elif format.group_size and name.startswith("visual."):
        raise EngineError(
            f"{name} is stored as {format.name}, but the vision tower takes no groups; export the "
            "engine with int8, fp8 or bf16 for it."
        )
    else:
        try:
            tensors = format.tensors(rows, columns)
        except ValueError as error:
            raise EngineError(
                f"{name} cannot be stored as {format.name}: {error} Export the engine with another "
                "group size."
            ) from error
    if has_bias(name):
        tensors["bias"] = ((rows,), torch.bfloat16)
    return {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}


def parameter_count(spec: ModelSpec) -> int:
    """Number of weights of the dense model (a tied head counts once)."""
    return sum(prod(shape) for shape in tensor_shapes(spec).values())


def check_names(
    spec: ModelSpec, available: Iterable[str], formats: Mapping[str, Format] | None = None
) -> None:
    """Raises :class:`CheckpointError` naming tensors that are missing from or left over in
    ``available`` (canonical names) for a model whose linears are stored as ``formats`` says.
    """
    expected, found = set(stored_shapes(spec, formats or {})), set(available)
    if missing := expected - found:
        raise CheckpointError(
            f"the weights lack {_some(missing)}; download or export every file again."
        )
    if left_over := found - expected:
        raise CheckpointError(
            f"the weights hold {_some(left_over)}, which this Qwen2.5-VL does not have; check that "
            "config.json belongs to these files."
        )


def _some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names in order, and how many more there are."""
    ordered = sorted(names)
    rest = len(ordered) - limit
    return ", ".join(ordered[:limit]) + (f" and {rest} more" if rest > 0 else "")
