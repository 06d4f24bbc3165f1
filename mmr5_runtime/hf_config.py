"""Reads a Hugging Face ``config.json`` of Qwen2.5-VL into the plain fields of a spec.

Two layouts are in use. The hub's original one is flat: the language model's fields sit at the top
level beside a ``vision_config`` block. Newer saves nest them in ``text_config`` and write
``rope_parameters`` where the flat one wrote ``rope_theta`` and ``rope_scaling``. A field is looked
up in ``text_config`` first, then at the top level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmr5_runtime.types import CheckpointError

_MODEL_TYPE = "qwen2_5_vl"

# What the format means when a save leaves the field out (early hub configs leave out most of the
# vision block). Sizes that differ between the published models have no default and must be there.
_VISION_DEFAULTS: dict[str, Any] = {
    "depth": 32,
    "num_heads": 16,
    "intermediate_size": 3420,
    "out_hidden_size": 3584,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "window_size": 112,
}
_FULL_ATTENTION_BLOCKS = (7, 15, 23, 31)
_VISION_ROPE_THETA = 10000.0
_TEXT_ROPE_THETA = 1e6
_RMS_NORM_EPS = 1e-5
_MAX_POSITIONS = 32768
_MROPE_SECTION = (16, 24, 24)
_TOKEN_DEFAULTS = {
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_EOS_DEFAULT = 151645


def require_qwen2_5_vl(config: Mapping[str, Any]) -> None:
    """Raises :class:`CheckpointError` unless ``config`` describes a Qwen2.5-VL."""
    if not isinstance(config, Mapping) or config.get("model_type") != _MODEL_TYPE:
        found = config.get("model_type") if isinstance(config, Mapping) else config
        raise CheckpointError(
            f"the checkpoint has model_type {found!r} but only {_MODEL_TYPE!r} can be run; choose "
            "a Qwen2.5-VL checkpoint such as i2vec/MM-R5."
        )


def parse_vision(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``VisionSpec``."""
    block = config.get("vision_config")
    if not isinstance(block, Mapping):
        raise CheckpointError(
            "config.json has no vision_config; use a complete Qwen2.5-VL checkpoint."
        )
    _require_silu("vision_config", block)
    rope = block.get("rope_parameters") or {}
    _require_rope("vision_config", rope, ("axial", "default"))
    blocks = block.get("fullatt_block_indexes", _FULL_ATTENTION_BLOCKS)
    return {
        **{key: _integer(block, key, default) for key, default in _VISION_DEFAULTS.items()},
        "hidden_size": _integer(block, "hidden_size"),
        "in_channels": _integer(block, "in_channels", block.get("in_chans", 3)),
        "fullatt_block_indexes": tuple(int(index) for index in blocks),
        "rope_theta": float(rope.get("rope_theta", _VISION_ROPE_THETA)),
    }


def parse_text(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of ``TextSpec``."""
    fields = _text_fields(config)
    _require_silu("the language model", fields)
    if fields.get("use_sliding_window"):
        raise CheckpointError(
            "config.json sets use_sliding_window, which is not computed here; use a checkpoint "
            "with full attention in every layer."
        )
    rope = {**(fields.get("rope_scaling") or {}), **(fields.get("rope_parameters") or {})}
    _require_rope("the language model", rope, ("default", "mrope"))
    hidden, heads = _integer(fields, "hidden_size"), _integer(fields, "num_attention_heads")
    theta = rope.get("rope_theta", fields.get("rope_theta", _TEXT_ROPE_THETA))
    tied = config.get("tie_word_embeddings") or fields.get("tie_word_embeddings")
    return {
        "vocab_size": _integer(fields, "vocab_size"),
        "hidden_size": hidden,
        "num_layers": _integer(fields, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": _integer(fields, "num_key_value_heads", heads),
        "head_dim": _integer(fields, "head_dim", hidden // heads),
        "intermediate_size": _integer(fields, "intermediate_size"),
        "rms_norm_eps": float(fields.get("rms_norm_eps", _RMS_NORM_EPS)),
        "rope_theta": float(theta),
        "mrope_section": _sections(rope.get("mrope_section", _MROPE_SECTION)),
        "max_position_embeddings": _integer(fields, "max_position_embeddings", _MAX_POSITIONS),
        "tie_word_embeddings": bool(tied),
    }


def parse_tokens(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """Special token ids; ``generation_config.json`` decides the stop ids when it names any."""
    fields = _text_fields(config)
    eos = generation.get("eos_token_id") or fields.get("eos_token_id") or _EOS_DEFAULT
    stops = tuple(int(token) for token in (eos if isinstance(eos, list | tuple) else (eos,)))
    pad = generation.get("pad_token_id")
    pad = fields.get("pad_token_id") if pad is None else pad
    return {
        **{key: _integer(fields, key, default) for key, default in _TOKEN_DEFAULTS.items()},
        "eos_token_ids": stops,
        "pad_token_id": stops[0] if pad is None else int(pad),
    }


def _text_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields of either layout; a nested null does not hide a flat value."""
    nested = config.get("text_config") or {}
    return {**config, **{key: value for key, value in nested.items() if value is not None}}


def _integer(fields: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = fields.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CheckpointError(
            f"config.json gives {key} = {value!r} where a whole number is needed; restore the "
            "checkpoint's own config.json."
        )
    return value


def _sections(value: Any) -> tuple[int, int, int]:
    sizes = tuple(int(size) for size in value)
    if len(sizes) != 3:
        raise CheckpointError(
            f"config.json gives mrope_section {list(sizes)} but three sections (time, row, column) "
            "are needed; restore the checkpoint's own config.json."
        )
    return sizes


def _require_silu(where: str, fields: Mapping[str, Any]) -> None:
    activation = fields.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(
            f"{where} uses hidden_act {activation!r} but only 'silu' is computed here; choose a "
            "Qwen2.5-VL checkpoint."
        )


def _require_rope(where: str, rope: Mapping[str, Any], known: tuple[str, str]) -> None:
    # Old saves write `type`, new ones `rope_type`, some both.
    for key in ("rope_type", "type"):
        kind = rope.get(key) or known[0]
        if kind not in known:
            raise CheckpointError(
                f"{where} scales rotary positions with {kind!r} but only {' and '.join(known)} are "
                "computed here; remove the scaling from config.json or choose another checkpoint."
            )
