"""The arguments of TensorRT-LLM's LLM API for one engine, as YAML files it reads itself.

``trtllm-serve FOLDER OPTION llm_args-VERSION.yaml`` takes such a file, OPTION being what the
version calls it; so does ``LLM(model=FOLDER, **yaml)``. All versions refuse a key they do not know;
the keys written here are few, old, and were found in the sources of all three, at commits near the
releases. What belongs to a request instead, such as the text at which to stop, is in
``sampling_params.json``, for those who ask without our ``Reranker``: keyword arguments of
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

_BARE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INDENT = "  "


def file_name(version: Version) -> str:
    """Name of the version's file."""
    return f"llm_args-{version.name}.yaml"


def llm_args(limits: Limits) -> dict[str, Any]:
    """The arguments, which are the same for every version that is known.

    Blocks of keys and values are reused: the versions written for hash the content of a picture
    into the key of its blocks. Prompts are not cut into pieces, so a pass holds a whole one.
    """
    return {
        "dtype": "bfloat16",
        "max_batch_size": limits.max_batch_size,
        "max_input_len": limits.max_input_len,
        "max_seq_len": limits.max_seq_len,
        "max_num_tokens": limits.max_num_tokens,
        "enable_chunked_prefill": False,
        "kv_cache_config": {"enable_block_reuse": True, "enable_partial_reuse": True},
    }


def sampling_params(limits: Limits, stop: Sequence[str], end_ids: Sequence[int]) -> dict[str, Any]:
    """Keyword arguments of ``SamplingParams`` for a ranking: greedy, up to the closing tag.

    ``stop`` are the texts that the tokenizer's ways of writing the tag are tokenized from: see
    :mod:`mmr5_runtime.trtllm.stops`. ``end_ids`` are all tokens that end an answer.
    """
    return {
        "max_tokens": limits.max_seq_len - limits.max_input_len,
        "top_k": 1,
        "stop": list(stop),
        "stop_token_ids": list(end_ids),
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
