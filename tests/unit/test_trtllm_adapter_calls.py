"""Every keyword is one that TensorRT-LLM has, by the signatures read in its sources."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from helpers.trtllm_stand_in import bind, signatures
from helpers.trtllm_tiny import tiny_spec
from mmr5_export.trtllm.llm_args import llm_args, to_yaml
from mmr5_export.trtllm.refusals import Limits as Exported
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.trtllm import calls
from mmr5_runtime.trtllm.bundle import dtype_of
from mmr5_runtime.trtllm.inputs import EngineInputs
from mmr5_runtime.trtllm.prompt import Limits
from mmr5_runtime.trtllm.stops import StopWords
from mmr5_runtime.types import EngineError

GREEDY = SamplingParams(repetition_penalty=1.05)
DRAWN = SamplingParams(temperature=0.3, top_k=20, top_p=0.9, seed=7)
STOPS = StopWords(((1, 2), (3,)), ("</answer>",))
ENDS = calls.Ends(first=60, others=(61,), pad=62)
INPUTS = EngineInputs(
    torch.tensor([1, 2], dtype=torch.int32),
    [0, 9],
    torch.zeros(1, 1, 4),
    torch.zeros(1, 8),
    torch.zeros(1, 1, dtype=torch.int32),
)


def test_a_typo_would_be_noticed() -> None:
    with pytest.raises(TypeError):
        bind("ModelRunnerCpp.generate", {"batch_input_ids": [], "stop_word_list": []})
    with pytest.raises(TypeError):
        bind("ModelRunnerCpp.from_dir", {})


def test_every_signature_says_where_it_was_read() -> None:
    for name, found in signatures().items():
        assert found["file"].startswith("tensorrt_llm/"), name
        assert set(found["required"]) <= {*found["positional"], *found["keyword"]}


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("stops", [None, STOPS], ids=["eos", "tag"])
def test_keywords_bind(params: SamplingParams, stops: StopWords | None) -> None:
    bind("ModelRunnerCpp.from_dir", calls.from_dir("llm", True, 1))
    bind("MropeParams", calls.mrope(INPUTS))
    generate = calls.engine_generate(INPUTS, object(), 9, params, ENDS, stops)
    bind("ModelRunnerCpp.generate", generate)
    for version in ((1, 2, 1), (1, 4, 0)):
        ignores = calls.ignored(version)
        bind("SamplingParams", calls.llm_sampling(9, params, ENDS, stops, ignores))
    bind("LLM", calls.llm("folder", {"max_seq_len": 9, "kv_cache_config": {}}, object()))
    bind("LLM.generate", calls.llm_generate(object(), object()))


def test_greedy_is_a_choice_among_one_and_no_temperature() -> None:
    keywords = calls.engine_generate(INPUTS, None, 9, GREEDY, ENDS, STOPS)
    assert keywords["top_k"] == 1 and keywords["repetition_penalty"] == 1.05
    assert not {"temperature", "top_p", "random_seed"} & set(keywords)


def test_what_is_drawn_has_the_parameters_of_the_checkpoint() -> None:
    keywords = calls.engine_generate(INPUTS, None, 9, DRAWN, ENDS, STOPS)
    api = calls.llm_sampling(9, DRAWN, ENDS, STOPS)
    for found, seed in ((keywords, "random_seed"), (api, "seed")):
        assert (found["temperature"], found["top_k"], found["top_p"]) == (0.3, 20, 0.9)
        assert found[seed] == 7


def test_stop_words_and_other_end_tokens() -> None:
    def words(ends: calls.Ends, stops: StopWords | None) -> Any:
        return calls.engine_generate(INPUTS, None, 9, GREEDY, ends, stops)["stop_words_list"]

    one = calls.Ends(60, (), 62)
    assert words(ENDS, STOPS) == [[[1, 2], [3], [61]]]
    assert words(ENDS, None) == [[[61]]]
    assert words(one, STOPS) == [[[1, 2], [3]]]
    assert words(one, None) is None
    api = calls.llm_sampling(9, GREEDY, ENDS, STOPS)
    assert api["stop"] == ["</answer>"] and api["include_stop_str_in_output"] is True
    # With an end_id the package would never tokenize the texts.
    assert api["stop_token_ids"] == [60, 61] and not {"end_id", "pad_id"} & set(api)
    assert calls.llm_sampling(9, GREEDY, one, None)["stop_token_ids"] == [60]


def test_what_a_version_ignores_is_not_given_to_it() -> None:
    for version in ("1.2.1", "1.3.0rc22"):
        ignores = calls.ignored(calls.check_version(version, "llm-api"))
        given = calls.llm_sampling(9, DRAWN, ENDS, STOPS, ignores)
        assert not {"seed", "repetition_penalty"} & set(given) and given["temperature"] == 0.3
    ignores = calls.ignored(calls.check_version("1.4.0rc1", "llm-api"))
    given = calls.llm_sampling(9, DRAWN, ENDS, STOPS, ignores)
    assert given["seed"] == 7 and given["repetition_penalty"] == 1.0


def test_prompts_of_the_llm_api() -> None:
    found = calls.llm_inputs([5, 1, 6], [Image.new("RGB", (56, 56))], PixelBudget(784, 7840))
    bind("TokensPrompt", found)
    assert found["prompt_token_ids"] == [5, 1, 6]
    assert [page.size for page in found["multi_modal_data"]["image"]] == [(56, 56)]
    assert found["mm_processor_kwargs"] == {"min_pixels": 784, "max_pixels": 7840}


def test_arguments_of_an_exported_bundle_bind() -> None:
    yaml = pytest.importorskip("yaml")
    limits = Exported(
        max_batch_size=1,
        max_input_len=300,
        max_seq_len=400,
        max_multimodal_len=200,
        page_tokens=50,
    )
    arguments = yaml.safe_load(to_yaml(llm_args(limits)))
    bind("KvCacheConfig", arguments[calls.KV_CACHE])
    bind("LLM", calls.llm("folder", arguments, object()))
    assert calls.llm_limits(arguments) == Limits(sequence=400, prompt=300, images=300)
    assert dtype_of(arguments["dtype"]) == torch.bfloat16


@pytest.mark.parametrize(
    ("version", "target", "fits"),
    [
        ("1.2.1", "engine", True),
        ("1.2.0", "engine", False),
        ("1.3.0rc20", "engine", False),
        ("1.2.1", "llm-api", True),
        ("1.3.0rc22", "llm-api", True),
        ("1.4.0rc1", "llm-api", True),
        ("1.2.0", "llm-api", False),
        ("1.1.0", "llm-api", False),
        ("unknown", "llm-api", False),
    ],
)
def test_versions(version: str, target: str, fits: bool) -> None:
    if fits:
        calls.check_version(version, target)
        return
    with pytest.raises(EngineError, match=f"tensorrt_llm {version} is installed"):
        calls.check_version(version, target)


def test_the_first_end_token_is_the_engines_own() -> None:
    spec = tiny_spec(2)
    ends = calls.Ends.of(spec)
    assert (ends.first, *ends.others) == spec.eos_token_ids
    assert ends.ids == frozenset(spec.eos_token_ids)
