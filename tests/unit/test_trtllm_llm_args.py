"""Arguments of the LLM API per version, and the YAML they are written as."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr5_export.options import OptionError
from mmr5_export.trtllm.llm_args import file_name, llm_args, sampling_params, to_yaml
from mmr5_export.trtllm.refusals import Limits
from mmr5_export.trtllm.versions import ENGINE_VERSION, VERSIONS, known_version

yaml: Any = pytest.importorskip("yaml")
LIMITS = Limits(2, 20_000, 22_048, 39_000, 980)
GOLDEN = """\
# LLM arguments of TensorRT-LLM 1.2.1
dtype: "bfloat16"
max_batch_size: 2
max_input_len: 20000
max_seq_len: 22048
max_num_tokens: 20000
enable_chunked_prefill: false
kv_cache_config:
  enable_block_reuse: true
  enable_partial_reuse: true
"""


def test_the_versions_and_what_they_are_known_by() -> None:
    assert list(VERSIONS) == ["1.2.1", "1.3.0rc22", "1.4.0rc1"]
    assert [version.engines for version in VERSIONS.values()] == [True, False, False]
    options = [version.config_option for version in VERSIONS.values()]
    assert options == ["--extra_llm_api_options", "--config", "--config"]
    assert VERSIONS[ENGINE_VERSION].engines
    with pytest.raises(OptionError, match=r"give one of 1\.2\.1, 1\.3\.0rc22, 1\.4\.0rc1\.$"):
        known_version("1.1.0")


@pytest.mark.parametrize("name", VERSIONS)
def test_the_file_of_a_version(name: str) -> None:
    version = VERSIONS[name]
    arguments = llm_args(LIMITS)
    text = to_yaml(arguments, f"LLM arguments of TensorRT-LLM {name}")
    assert text == GOLDEN.replace("1.2.1", name)
    assert yaml.safe_load(text) == arguments
    assert file_name(version) == f"llm_args-{name}.yaml"


def test_a_short_prompt_still_gets_a_pass_of_the_usual_size() -> None:
    small = Limits(1, 1500, 3000, 1000, 48)
    assert llm_args(small)["max_num_tokens"] == 8192


def test_a_request_stops_at_the_closing_tag_and_keeps_it() -> None:
    assert sampling_params(LIMITS, ("</answer>", "]</answer>"), (7, 9)) == {
        "max_tokens": 2048,
        "top_k": 1,
        "stop": ["</answer>", "]</answer>"],
        "stop_token_ids": [7, 9],
        "include_stop_str_in_output": True,
    }


text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | text
)
documents = st.recursive(
    st.dictionaries(text, scalars | st.lists(scalars), min_size=1, max_size=4),
    lambda inner: st.dictionaries(text, scalars | inner, min_size=1, max_size=4),
    max_leaves=8,
)


@given(documents)
def test_yaml_reads_back_as_it_was(document: dict[str, Any]) -> None:
    assert yaml.safe_load(to_yaml(document)) == document


@pytest.mark.parametrize("value", ["ümlaut", "two\nlines", float("nan"), float("inf"), {}, {1, 2}])
def test_what_has_no_place_in_the_file(value: object) -> None:
    with pytest.raises(ValueError):
        to_yaml({"key": value})
