"""The arguments of TensorRT-LLM's LLM API for one engine, as YAML files it reads itself.

``trtllm-serve FOLDER OPTION llm_args-VERSION.yaml`` takes such a file, OPTION being what the
version calls it; so does ``LLM(model=FOLDER, **yaml)``. All versions refuse a key they do not know,
so each file holds only keys read in the sources of its version. What belongs to a request instead,
such as the text at which to stop, is in ``sampling_params.json``: keyword arguments of
``SamplingParams``, whose names are the same in all of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmr5_export.trtllm.refusals import Limits
from mmr5_export.trtllm.versions import Version

SAMPLING_NAME = "sampling_params.json"

# Top-level keys, read in llm_args.py of a commit near each release.
_BASE_KEYS = (
    "dtype", "max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens",
    "enable_chunked_prefill", "kv_cache_config",
)  # fmt: skip
KNOWN_KEYS = {"1.2.1": _BASE_KEYS, "1.3.0rc22": _BASE_KEYS, "1.4.0rc1": _BASE_KEYS}

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INDENT = "  "


def file_name(version: Version) -> str:
    """Name of the version's file."""
    return f"llm_args-{version.name}.yaml"


def llm_args(version: Version, limits: Limits) -> dict[str, Any]:
    """The arguments for ``version``; raises ``ValueError`` for a key that it does not know.

    Blocks of keys and values are reused: the versions written for hash the content of a picture
    into the key of its blocks. Prompts are not cut into pieces, so a pass holds a whole one.
    """
    found = {
        "dtype": "bfloat16",
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        "enable_chunked_prefill": False,
        "kv_cache_config": {"enable_block_reuse": True, "enable_partial_reuse": True},
    }
    if unknown := [key for key in found if key not in KNOWN_KEYS[version.name]]:
        raise ValueError(f"TensorRT-LLM {version.name} has no LLM argument {unknown[0]}.")
    return found


def sampling_params(limits: Limits, stop: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of ``SamplingParams`` for a ranking: greedy, up to the closing tag.

    ``stop`` are the texts that the tokenizer's ways of writing the tag are tokenized from: see
    :mod:`mmr5_runtime.trtllm.stops`.
    """
    return {
        "max_tokens": limits.max_seq_len - limits.max_input_len,
        "top_k": 1,
        "stop": list(stop),
        "include_stop_str_in_output": True,
    }


def to_yaml(document: Mapping[str, Any], comment: str = "") -> str:
    """``document`` as block YAML, keys in their order; ``comment`` becomes the first line.

    Mappings may nest and must not be empty; values are text, numbers, booleans, None or lists of
    these. Text is quoted and must be printable ASCII. Raises ``ValueError`` for anything else.
    """
    head = [f"# {comment}"] if comment else []
    return "\n".join([*head, *_lines(document, "")]) + "\n"


def _lines(document: Mapping[str, Any], indent: str) -> list[str]:
    if not document:
        raise ValueError("an empty mapping has no block form.")
    lines = []
    for key, value in document.items():
        name = key if _BARE.fullmatch(key) and key.lower() not in _WORDS else _scalar(key)
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + _INDENT)]
        elif isinstance(value, list):
            lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}  # not text when bare


def _scalar(value: object) -> str:
    """JSON scalars are YAML scalars, as long as text needs no escape that YAML lacks."""
    if isinstance(value, str):
        if not (value.isascii() and value.isprintable()):
            raise ValueError(f"{value!r} is not printable ASCII.")
        return json.dumps(value)
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float) and value == value and abs(value) != float("inf"):
        text = json.dumps(value)
        # YAML 1.1 takes 1e-05 for text: a number with an exponent needs a point and a sign.
        mantissa, _, exponent = text.partition("e")
        if not exponent:
            return text
        point = "" if "." in mantissa else ".0"
        sign = "" if exponent[0] in "+-" else "+"
        return f"{mantissa}{point}e{sign}{exponent}"
    raise ValueError(f"{value!r} has no place in these files.")
