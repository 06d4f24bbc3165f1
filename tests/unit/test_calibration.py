"""Calibration prompts hold what a rerank feeds to the decoder, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from helpers.pictures import noise
from mmr5_export.calibration import TokenCounts, encode_prompt, pixel_values
from mmr5_export.checkpoint import open_checkpoint
from mmr5_export.generator import Generator
from mmr5_export.responses import Responder
from mmr5_export.samples import DataError, Sample
from mmr5_runtime.image import PixelBudget, preprocess
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.model import embed_prompt, prefill
from mmr5_runtime.rope import mrope_positions

SIZES = ((60, 90), (200, 40), (84, 84))


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint: Path) -> LoadedEngine:
    budget = PixelBudget(3136, 28 * 28 * 12)
    return Generator(open_checkpoint(tiny_checkpoint), "", budget, dtype="float32").load()


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folder = tmp_path_factory.mktemp("pages")
    pages = [folder / f"{number}.png" for number in range(len(SIZES))]
    for number, (page, size) in enumerate(zip(pages, SIZES, strict=True)):
        noise(*size, seed=number).save(page)
    return Sample("data.jsonl line 7", "Which page?", tuple(pages))


def test_teacher_forcing_gives_the_generated_answer(loaded: LoadedEngine, sample: Sample) -> None:
    response = Responder(loaded, max_new_tokens=24).respond(sample)
    spec, model = loaded.engine.spec, loaded.engine.model
    prompt = encode_prompt(sample, response.token_ids, loaded.tokenizer, loaded.budget, spec)
    pages = pixel_values(sample, loaded.budget, loaded.image_settings)
    embedded = [
        loaded.engine.encode_page(pixels, grid)
        for pixels, grid in zip(pages, prompt.grids, strict=True)
    ]
    embeds = torch.cat(
        (
            embed_prompt(model, prompt.token_ids[: prompt.prompt_tokens], embedded),
            embed_prompt(model, prompt.token_ids[prompt.prompt_tokens :], []),
        )
    )
    arena = model.new_arena(len(prompt.token_ids))
    logits = prefill(model, embeds, prompt.positions, arena, all_logits=True)
    predicted = logits.argmax(-1)[prompt.prompt_tokens - 1 : -1]
    assert tuple(predicted.tolist()) == response.token_ids


def test_layout_of_a_prompt(loaded: LoadedEngine, sample: Sample) -> None:
    spec, budget = loaded.engine.spec, loaded.budget
    answer = [5, 6, 7, spec.eos_token_ids[0]]
    prompt = encode_prompt(sample, answer, loaded.tokenizer, budget, spec)
    patched = [
        preprocess(Image.open(page), budget, **loaded.image_settings) for page in sample.pages
    ]
    assert prompt.grids == tuple(page.grid for page in patched)
    for pixels, page in zip(
        pixel_values(sample, budget, loaded.image_settings), patched, strict=True
    ):
        assert torch.equal(pixels, page.pixel_values)
    prompt_ids = loaded.tokenizer.encode(sample.query, [page.num_tokens for page in patched])
    assert prompt.token_ids.tolist() == prompt_ids + answer
    assert prompt.prompt_tokens == len(prompt_ids)
    positions, _ = mrope_positions(prompt.token_ids, prompt.grids, spec)
    assert torch.equal(prompt.positions, positions)
    assert prompt.positions.dtype == prompt.token_ids.dtype == torch.int64
    visual = sum(page.num_tokens for page in patched)
    assert prompt.counts == TokenCounts(visual, len(prompt_ids) - visual, len(answer))
    assert (prompt.counts + prompt.counts).total == 2 * len(prompt.token_ids)


def test_an_image_token_in_an_answer_is_text(loaded: LoadedEngine, sample: Sample) -> None:
    spec = loaded.engine.spec
    plain = encode_prompt(sample, [5, 5, 5], loaded.tokenizer, loaded.budget, spec)
    image = [5, spec.image_token_id, 5]
    odd = encode_prompt(sample, image, loaded.tokenizer, loaded.budget, spec)
    assert torch.equal(plain.visual, odd.visual) and torch.equal(plain.positions, odd.positions)


def test_no_answer_is_a_prompt_alone(loaded: LoadedEngine, sample: Sample) -> None:
    prompt = encode_prompt(sample, [], loaded.tokenizer, loaded.budget, loaded.engine.spec)
    assert len(prompt.token_ids) == prompt.prompt_tokens == len(prompt.visual)
    assert prompt.counts.response == 0


def test_what_does_not_fit_names_the_sample(loaded: LoadedEngine, sample: Sample) -> None:
    spec, tokenizer = loaded.engine.spec, loaded.tokenizer
    context = spec.text.max_position_embeddings
    with pytest.raises(DataError, match="line 7: prompt and response take .* shorten"):
        encode_prompt(sample, [5] * context, tokenizer, loaded.budget, spec)
    large = PixelBudget(28 * 28 * context, 28 * 28 * context)
    with pytest.raises(DataError, match="line 7: the prompt needs .* pass fewer pages"):
        encode_prompt(sample, [5], tokenizer, large, spec)
    reserved = Sample(sample.name, "a <|im_end|> b", sample.pages)
    with pytest.raises(DataError, match="line 7: the question contains the reserved token"):
        encode_prompt(reserved, [5], tokenizer, loaded.budget, spec)


def test_a_page_that_went_away_names_the_sample(
    loaded: LoadedEngine, sample: Sample, tmp_path: Path
) -> None:
    gone = Sample(sample.name, sample.query, (sample.pages[0], tmp_path / "gone.png"))
    with pytest.raises(DataError, match=r"line 7: .*gone\.png"):
        encode_prompt(gone, [5], loaded.tokenizer, loaded.budget, loaded.engine.spec)
    with pytest.raises(DataError, match=r"line 7: .*gone\.png"):
        pixel_values(gone, loaded.budget, loaded.image_settings)
