"""Answers for calibration: those of the engine, generated once, kept across interruptions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.pictures import noise
from mmr5_export import export
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.generator import Generator, weights_sha256
from mmr5_export.options import ExportOptions
from mmr5_export.response_cache import Response, ResponseCache
from mmr5_export.responses import missing_answers, respond
from mmr5_export.samples import DataError, Sample
from mmr5_runtime import Reranker
from mmr5_runtime.image import PixelBudget
from mmr5_runtime.types import ExportError

BUDGET = PixelBudget(3136, 28 * 28 * 6)


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that penalises repetition, as Qwen2.5-VL's config does."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.3}))
    return folder


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    pages = [tmp_path / f"{number}.png" for number in range(4)]
    for number, page in enumerate(pages):
        noise(40 + 30 * number, 90, seed=number).save(page)
    return [
        Sample(f"line {number}", f"Which page has {number}?", tuple(pages[number : number + 2]))
        for number in range(3)
    ]


def generator(checkpoint: Path, **options: object) -> Generator:
    base = Generator(open_checkpoint(checkpoint), "hash", BUDGET, dtype="float32")
    return replace(base, **{"max_new_tokens": 20, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("quant", ["bf16", "int8-weight-only"])
def test_answers_are_those_of_the_exported_engine(
    quant: str, checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    export(checkpoint, quant, tmp_path / "engine", ExportOptions(verify=False))
    made = respond(samples, generator(checkpoint, quant=quant))
    with Reranker.load(tmp_path / "engine", "cpu", max_pixels=BUDGET.max_pixels) as reranker:
        for sample, response in zip(samples, made, strict=True):
            result = reranker.rerank(
                sample.query, sample.pages, max_new_tokens=20, stop="eos", constrain=False
            )
            assert (response.text, response.order, response.status, response.stop_reason) == (
                result.text,
                result.order,
                result.status,
                result.stop_reason,
            )
            assert len(response.token_ids) == result.usage.completion_tokens


def test_the_end_token_is_kept(checkpoint: Path, samples: list[Sample]) -> None:
    (cut,) = respond(samples[:1], generator(checkpoint))
    assert cut.stop_reason == "max_tokens" and len(cut.token_ids) == 20
    # The same answer again, with its tenth token declared to be an end token.
    tenth = cut.token_ids[9]
    assert tenth not in cut.token_ids[:9]
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, tenth]}))
    (ended,) = respond(samples[:1], generator(checkpoint))
    assert ended.stop_reason == "eos"
    assert ended.token_ids == cut.token_ids[:10]


@pytest.fixture
def without_weights(checkpoint: Path) -> Callable[[], None]:
    """Removes the weights, after which nothing can be generated any more."""
    return lambda: (checkpoint / "model.safetensors").unlink()


def test_cached_answers_need_no_model(
    checkpoint: Path, samples: list[Sample], tmp_path: Path, without_weights: Callable[[], None]
) -> None:
    cache, calls = tmp_path / "new" / "cache.jsonl", []
    asked = generator(checkpoint)
    made = respond(samples, asked, cache, lambda *progress: calls.append(progress))
    assert calls[0] == ("respond", 0, 3) and calls[-1] == ("respond", 3, 3)
    without_weights()
    renamed = [replace(sample, name="moved") for sample in samples]
    assert respond(renamed[::-1], asked, cache) == made[::-1]
    with pytest.raises(Exception, match=r"model\.safetensors"):
        respond([replace(samples[0], query="another question")], asked, cache)


def test_answers_that_are_there_are_not_missing(
    checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    cache, asked = tmp_path / "cache.jsonl", generator(checkpoint)
    given = replace(samples[2], response="<answer>[1, 2]</answer>")
    assert missing_answers([*samples, given], asked) == 3
    respond(samples[:2], asked, cache)
    assert missing_answers([*samples, given], asked, cache) == 1
    assert missing_answers(samples, replace(asked, quant="int8-weight-only"), cache) == 3
    assert missing_answers([given], asked, cache) == 0
    samples[0].pages[0].unlink()
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        missing_answers(samples, asked, cache)


def test_whatever_decides_an_answer_is_in_its_key(
    checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    cache, asked = tmp_path / "cache.jsonl", generator(checkpoint)
    variants = [
        (asked, samples[0]),
        (replace(asked, weights_sha256="other"), samples[0]),
        (replace(asked, budget=PixelBudget(3136, 28 * 28 * 5)), samples[0]),
        (replace(asked, max_new_tokens=19), samples[0]),
        (replace(asked, dtype="bfloat16"), samples[0]),
        (replace(asked, quant="int8-weight-only"), samples[0]),
        (asked, replace(samples[0], query="another question")),
        (asked, replace(samples[0], pages=samples[0].pages[::-1])),
    ]
    for count, (variant, sample) in enumerate(variants, start=1):
        respond([sample], variant, cache)
        assert len(cache.read_text().splitlines()) == count
    noise(40, 90, seed=9).save(samples[0].pages[0])
    respond(samples[:1], asked, cache)
    assert len(cache.read_text().splitlines()) == len(variants) + 1


def test_a_torn_last_line_is_generated_again(
    checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    cache, asked = tmp_path / "cache.jsonl", generator(checkpoint)
    made = respond(samples, asked, cache)
    whole = cache.read_bytes()
    for lost in (1, 2, 40):
        cache.write_bytes(whole[:-lost])
        assert respond(samples, asked, cache) == made
        assert cache.read_bytes() == whole


@pytest.mark.parametrize("line", ["{}", "[]", "nonsense", '{"key": "k", "text": "t"}'])
def test_a_foreign_file_is_no_cache(line: str, tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    ResponseCache(path).put("k", Response((1, 2), "t", "eos", (0,), "ok"))
    assert ResponseCache(path).get("k") == Response((1, 2), "t", "eos", (0,), "ok")
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ExportError, match="line 2 of .* holds no cached response"):
        ResponseCache(path)
    with pytest.raises(ExportError, match="cannot be used"):
        ResponseCache(tmp_path)


def test_given_answers_are_taken_as_they_are(
    checkpoint: Path, samples: list[Sample], tmp_path: Path, without_weights: Callable[[], None]
) -> None:
    asked = generator(checkpoint)
    tokenizer_text = "<think>because</think><answer>[2, 1]</answer>"
    given = replace(samples[0], response=tokenizer_text)
    tokenizer = asked.load().tokenizer
    without_weights()
    cache = tmp_path / "cache.jsonl"
    (response,) = respond([given], asked, cache)
    assert response.token_ids[-1] == asked.checkpoint.spec.eos_token_ids[0]
    assert tokenizer.decode(response.token_ids[:-1], skip_special=False) == tokenizer_text
    assert (response.order, response.status, response.stop_reason) == ((1, 0), "ok", "eos")
    assert not cache.exists()
    reserved = replace(given, response=f"{tokenizer_text}<|im_end|>")
    with pytest.raises(DataError, match=r"line 0: the response contains .* <\|im_end\|>"):
        respond([reserved], asked)


def test_bad_input_names_the_sample(checkpoint: Path, samples: list[Sample]) -> None:
    asked = generator(checkpoint)
    samples[1].pages[1].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"line 1: .*2\.png.*no known image format"):
        respond(samples, asked)
    limit = 28 * 28 * 40_000
    with pytest.raises(DataError, match="line 0: the prompt needs .* tokens"):
        respond(samples, replace(asked, budget=PixelBudget(limit, limit)))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"quant": "int4"}, "'int4'; use bf16 or int8-weight-only"), ({"max_new_tokens": 0}, "0 tok")],
)
def test_bad_options(options: dict[str, object], words: str, checkpoint: Path) -> None:
    with pytest.raises(ExportError, match=words):
        generator(checkpoint, **options)


def test_one_hash_for_all_weight_files() -> None:
    one = weights_sha256({"a": "1", "b": "2"})
    assert one == weights_sha256({"b": "2", "a": "1"}) != weights_sha256({"a": "2", "b": "1"})
