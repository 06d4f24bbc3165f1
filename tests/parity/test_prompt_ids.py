"""Token ids equal those of transformers' Qwen2 tokenizer on the processor's expanded text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen2Tokenizer

from helpers.bpe import SPECIAL_TOKENS, qwen_like_tokenizer
from mmr5_runtime.prompt import PromptTokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "prompts.json"
CASES = json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint's tokenizer files."""
    path = tmp_path_factory.mktemp("checkpoint")
    qwen_like_tokenizer().save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{c['num_pages']}pages{i}" for i, c in enumerate(CASES)]
)
def test_ids_equal_transformers(folder: Path, case: dict[str, object]) -> None:
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    query, num_pages, text = case["query"], case["num_pages"], case["text"]
    assert isinstance(query, str) and isinstance(num_pages, int) and isinstance(text, str)
    sizes = [3 * number + 1 for number in range(num_pages)]
    # What Qwen2_5_VLProcessor does with a prompt; the class itself cannot be built without
    # torchvision, which only its video half uses.
    pieces = text.split("<|image_pad|>")
    expanded = pieces[0] + "".join(
        "<|image_pad|>" * size + piece for size, piece in zip(sizes, pieces[1:], strict=True)
    )
    ours = PromptTokenizer.from_file(folder / "tokenizer.json").encode(query, sizes)
    assert ours == theirs(expanded)["input_ids"]
    assert ours.count(theirs.convert_tokens_to_ids("<|image_pad|>")) == sum(sizes)


def test_decoded_text_equals_transformers(folder: Path) -> None:
    theirs = Qwen2Tokenizer.from_pretrained(folder)
    text = "<think>Größe 東京 😀 , it 's .</think><answer>[2, 1]</answer><|im_end|>"
    ids = theirs(text)["input_ids"]
    ours = PromptTokenizer.from_file(folder / "tokenizer.json").decode(ids)
    expected = theirs.batch_decode(
        [ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    assert [ours] == expected
