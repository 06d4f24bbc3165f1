"""Question and pages to the work that every peer is given, and back to what one of them reads.

The prompt is rendered and tokenized by the runtime, whose ids and pixels are those of the public
MM-R5 script; peers that take messages get the same text in parts, an image between each two.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from mmr5_bench.peers.base import ListWork, PeerError, Reading, Shape
from mmr5_bench.random_weights.shapes import PREPROCESSOR, first_special_id
from mmr5_bench.random_weights.tokens import WHOLE_WORDS, padded_tokenizer_json
from mmr5_export.checkpoint import read_spec
from mmr5_export.processor import image_settings, pixel_budget, read_processor
from mmr5_runtime.image import PatchedPage, PixelBudget, planned_sizes, preprocess
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.pages import open_page
from mmr5_runtime.prompt import PromptTokenizer, load_template
from mmr5_runtime.rope import Grid


@dataclass(frozen=True)
class PromptReader:
    """Tokenizer, prompts and pixel budget of a model: what decides the prompt of a list.

    ``image_settings`` are keyword arguments of :func:`mmr5_runtime.image.preprocess`.
    """

    tokenizer: PromptTokenizer
    budget: PixelBudget
    image_settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_checkpoint(cls, folder: Path) -> PromptReader:
        """Of a Hugging Face folder; CheckpointError when it is none."""
        _, spec = read_spec(folder)
        config = read_processor(folder)
        budget = pixel_budget(config)
        settings = image_settings(config, spec.vision)
        return cls(
            PromptTokenizer.from_file(folder / "tokenizer.json"),
            PixelBudget(budget.min_pixels, budget.max_pixels),
            {**asdict(settings), "mean": settings.mean, "std": settings.std},
        )

    @classmethod
    def from_random(cls, shape: Shape) -> PromptReader:
        """Of the random model of ``shape``."""
        loaded_from = padded_tokenizer_json(first_special_id(shape), WHOLE_WORDS)
        sizes = ("patch_size", "merge_size", "temporal_patch_size")
        return cls(
            PromptTokenizer(Tokenizer.from_str(loaded_from)),
            PixelBudget(PREPROCESSOR["min_pixels"], PREPROCESSOR["max_pixels"]),
            {
                **{key: PREPROCESSOR[key] for key in sizes},
                "mean": tuple(PREPROCESSOR["image_mean"]),
                "std": tuple(PREPROCESSOR["image_std"]),
            },
        )

    @classmethod
    def from_loaded(cls, loaded: LoadedEngine) -> PromptReader:
        """Of an engine in memory."""
        return cls(loaded.tokenizer, loaded.budget, loaded.image_settings)

    def work(
        self,
        question: str,
        pages: Sequence[bytes],
        max_new_tokens: int,
        *,
        forced: bool = False,
        gold: Sequence[int] = (),
        domain: str = "",
    ) -> ListWork:
        """The work of one list; RequestError (PageError) for a question or page that is none."""
        grids = tuple(self._grid(page) for page in pages)
        return ListWork(
            question=question,
            pages=tuple(pages),
            prompt_ids=self._ids(question, grids),
            grids=grids,
            budget=self.budget,
            max_new_tokens=max_new_tokens,
            image_tokens=sum(self._tokens(grids)),
            forced=forced,
            gold=tuple(gold),
            domain=domain,
        )

    def reading(self, work: ListWork, *, pixels: bool) -> Reading:
        """What this tokenizer and budget make of the question and bytes of ``work``."""
        grids = tuple(self._grid(page) for page in work.pages)
        ids = self._ids(work.question, grids)
        return Reading(len(ids), ids, grids, self.pixels(work) if pixels else None)

    def pixels(self, work: ListWork) -> str:
        """SHA-256 of the float32 pixel values of all pages in order."""
        return hash_pixels(self._patched(page).pixel_values for page in work.pages)

    def _ids(self, question: str, grids: Sequence[Grid]) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(question, self._tokens(grids)))

    def _tokens(self, grids: Sequence[Grid]) -> list[int]:
        """Visual tokens of pages: a square of patches each."""
        unit = int(self.image_settings.get("merge_size", 2)) ** 2
        return [rows * columns // unit for _, rows, columns in grids]

    def _grid(self, page: bytes) -> Grid:
        width, height = open_page(page).size
        patch = int(self.image_settings.get("patch_size", 14))
        merge = int(self.image_settings.get("merge_size", 2))
        final = planned_sizes(width, height, self.budget, patch_size=patch, merge_size=merge)[1]
        return 1, final[1] // patch, final[0] // patch

    def _patched(self, page: bytes) -> PatchedPage:
        return preprocess(open_page(page), self.budget, **self.image_settings)


def hash_pixels(pages: Iterable[Tensor]) -> str:
    """SHA-256 over ``pixel_values`` [P, patch_dim] float32 on the CPU, one after the other."""
    digest = hashlib.sha256()
    for page in pages:
        digest.update(page.contiguous().numpy().tobytes())
    return digest.hexdigest()


def message_parts(question: str, num_pages: int) -> tuple[str, list[str]]:
    """The system message, and the user's texts: one before every page.

    Raises PeerError for a profile with text behind the pages, which no peer here is asked with.
    """
    template = load_template()
    if template.instruction:
        raise PeerError(
            f"profile {template.profile} has text behind its pages; compare with profile mm-r5."
        )
    labels = [template.label(number) for number in range(1, num_pages + 1)]
    first = template.question.format(question=question, num_pages=num_pages) + labels[0]
    return template.system, [first, *labels[1:]]


def encode_png(image: Image.Image) -> bytes:
    """An image file of ``image``, without loss."""
    held = io.BytesIO()
    image.save(held, format="PNG")
    return held.getvalue()
