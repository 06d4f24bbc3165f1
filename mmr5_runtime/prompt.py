"""Question and pages to token ids, exactly as the public MM-R5 reranker script builds them.

The wording is data (`templates/*.json`, one profile each), and the hash of an engine's profile lies
in its manifest: one changed byte changes every token id after it. Pure text work, no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from mmr5_runtime.types import EngineError, RequestError

DEFAULT_PROFILE = "mm-r5"


@dataclass(frozen=True)
class Template:
    """The fixed text around a question and its pages.

    ``question`` stands before the pages and ``instruction`` after them; both may have the fields
    ``{question}`` and ``{num_pages}``. ``page_label`` has ``{number}`` (1-based), ``message_start``
    has ``{role}``. ``yes`` and ``no`` are the two answers of a prompt that judges one page by
    itself, empty elsewhere. The rest is literal.
    """

    name: str
    system: str
    question: str
    message_start: str
    message_end: str
    page_label: str
    vision_start: str
    image_pad: str
    vision_end: str
    instruction: str = ""
    yes: str = ""
    no: str = ""

    @property
    def sha256(self) -> str:
        """Hash of the content: sorted keys, no white space, so reformatting the file is free.

        Fields at their default are left out: a field that a profile does not use can be added
        without invalidating the engines that carry the profile's hash.
        """
        used = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }
        canonical = json.dumps(used, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

    @property
    def profile(self) -> str:
        """The name as a user writes it, such as ``mm-r5``."""
        return self.name.replace("_", "-")

    @property
    def pointwise(self) -> bool:
        """Whether it judges one page by itself, with ``yes`` or ``no``."""
        return bool(self.yes)

    def head(self, query: str, num_pages: int) -> str:
        """Everything before the first image, including the label of page 1.

        ``str.format`` does not look into what it inserts, so braces in ``query`` stay as they are.
        """
        question = self.question.format(question=query, num_pages=num_pages)
        return (
            f"{self.message_start.format(role='system')}{self.system}{self.message_end}"
            f"{self.message_start.format(role='user')}{question}{self.label(1)}"
        )

    def label(self, number: int) -> str:
        """The text before the image of page ``number`` (1-based)."""
        return self.page_label.format(number=number)

    def image(self, num_tokens: int) -> str:
        """The markup of one page that fills ``num_tokens`` positions."""
        return f"{self.vision_start}{self.image_pad * num_tokens}{self.vision_end}"

    def tail(self, query: str, num_pages: int) -> str:
        """Everything after the last image: closes the user's message, opens the assistant's."""
        instruction = self.instruction.format(question=query, num_pages=num_pages)
        return f"{instruction}{self.message_end}{self.message_start.format(role='assistant')}"


def profile_names() -> tuple[str, ...]:
    """Names of the profiles that ship with the package, sorted."""
    folder = resources.files("mmr5_runtime") / "templates"
    stems = (file.name.removesuffix(".json") for file in folder.iterdir())
    return tuple(sorted(stem.replace("_", "-") for stem in stems))


def load_template(name: str = DEFAULT_PROFILE) -> Template:
    """Read a profile that ships with the package; ``mm-r5`` and ``mm_r5`` name the same.

    Raises EngineError listing the profiles if there is none of that name.
    """
    profile = name.replace("_", "-")
    if profile not in profile_names():
        raise EngineError(
            f"there is no prompt template {name!r} ({', '.join(profile_names())} are there); "
            "update mmr5-runtime"
        )
    file = resources.files("mmr5_runtime") / "templates" / f"{profile.replace('-', '_')}.json"
    return Template(**json.loads(file.read_text(encoding="utf-8")))


def template_sha256(name: str = DEFAULT_PROFILE) -> str:
    """Hash of a shipped profile, as written to and compared with the engine manifest."""
    return load_template(name).sha256


def check_query(query: str) -> None:
    """Raise RequestError unless ``query`` is text that can be tokenized and is not blank."""
    if not isinstance(query, str):
        raise RequestError(f"the question must be text, not {type(query).__name__}; pass a str")
    if not query.strip():
        raise RequestError("the question is blank; ask something the pages can answer")
    try:
        query.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(
            "the question contains half of a surrogate pair; decode it as UTF-8 again"
        ) from None


def render(query: str, num_pages: int, template: Template | None = None) -> str:
    """The whole prompt as text, with one image pad per page.

    Raises RequestError for a blank question, no pages, and several in a profile for one.
    """
    template = template or load_template()
    check_query(query)
    _check_pages(num_pages, template)
    pages = "".join(
        (template.label(number) if number > 1 else "") + template.image(1)
        for number in range(1, num_pages + 1)
    )
    return template.head(query, num_pages) + pages + template.tail(query, num_pages)


def _check_pages(num_pages: int, template: Template) -> None:
    if num_pages < 1:
        raise RequestError("there are no pages to rank; pass at least one")
    if template.pointwise and num_pages > 1:
        raise RequestError(
            f"profile {template.profile} judges one page at a time and was given {num_pages}; pass "
            "each page by itself, or use a listwise profile"
        )


@dataclass(frozen=True)
class Segments:
    """Token ids of a prompt, cut where every cut lies against a special token.

    ``head`` ends with the label of page 1: the template's ``:\\n`` and the ``\\n`` that opens this
    label merge into one token, so a cut between them would change the ids. From page 2 on a page
    is label, vision start, pads, vision end. ``tail`` is what follows the last image, with the
    question where a profile asks it there: head and pages of such a profile do not depend on it.
    """

    head: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    tail: tuple[int, ...]

    @classmethod
    def cut(cls, token_ids: Sequence[int], image_pad_id: int) -> Segments:
        """The segments of a prompt that is known by its ids: those that joined up to them."""
        pads = [index for index, token in enumerate(token_ids) if token == image_pad_id]
        if not pads:
            return cls(tuple(token_ids), (), ())
        # A page ends with the marker behind its last pad; the first begins with one before it.
        ends = [a + 2 for a, b in zip(pads, pads[1:], strict=False) if b > a + 1] + [pads[-1] + 2]
        cuts = [pads[0] - 1, *ends]
        pages = (tuple(token_ids[a:b]) for a, b in zip(cuts, cuts[1:], strict=False))
        return cls(tuple(token_ids[: cuts[0]]), tuple(pages), tuple(token_ids[cuts[-1] :]))

    @cached_property
    def ids(self) -> list[int]:
        """Head, pages and tail joined: the prompt's token ids."""
        return [*self.head, *(token for page in self.pages for token in page), *self.tail]


class PromptTokenizer:
    """A checkpoint's ``tokenizer.json`` together with the prompt template."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None = None) -> None:
        """Raises EngineError when the tokenizer lacks a special token of the template."""
        self.template = template or load_template()
        self.tokenizer = tokenizer
        # Fine-tuning tools leave these behind in tokenizer.json; a prompt is never cut or filled.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self._vision_start = self._marker(self.template.vision_start)
        self.image_pad_id = self._marker(self.template.image_pad)
        self._vision_end = self._marker(self.template.vision_end)
        # Text may be tokenized piece by piece only because every piece begins or ends with one.
        self._marker(self.template.message_start.partition("{")[0])
        self._marker(self.template.message_end.strip())

    def with_template(self, template: Template) -> PromptTokenizer:
        """The same tokenizer with another profile; raises as the constructor does."""
        return PromptTokenizer(self.tokenizer, template)

    @classmethod
    def from_file(cls, path: Path, template: Template | None = None) -> PromptTokenizer:
        """Load ``tokenizer.json``; EngineError when it is missing or cannot be read."""
        if not path.is_file():
            raise EngineError(f"{path} is missing; copy it from the checkpoint or export again")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust side raises plain Exception
            raise EngineError(
                f"{path} is not a readable tokenizer ({error}); copy it from the checkpoint again"
            ) from error
        return cls(tokenizer, template)

    def _marker(self, content: str) -> int:
        if content not in self._special:
            raise EngineError(
                f"tokenizer.json has no special token {content}; "
                "use the tokenizer of a Qwen2.5-VL checkpoint"
            )
        return self._special[content]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of any text, no special tokens added."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def segments(self, query: str, tokens_per_page: Sequence[int]) -> Segments:
        """Tokenize a question over pages of ``tokens_per_page`` merged patches each.

        Raises RequestError for a blank question, one that contains a special token of the
        checkpoint (it would be read as markup), for no pages, and for several in a profile that
        judges one.
        """
        check_query(query)
        for token in self._special:
            if token in query:
                raise RequestError(
                    f"the question contains the reserved token {token}; remove it or respell it"
                )
        template = self.template
        _check_pages(len(tokens_per_page), template)
        pages = []
        for number, count in enumerate(tokens_per_page, start=1):
            label = self.text_ids(template.label(number)) if number > 1 else []
            pads = [self.image_pad_id] * count
            pages.append((*label, self._vision_start, *pads, self._vision_end))
        head = self.text_ids(template.head(query, len(pages)))
        tail = self.text_ids(template.tail(query, len(pages)))
        return Segments(tuple(head), tuple(pages), tuple(tail))

    def encode(self, query: str, tokens_per_page: Sequence[int]) -> list[int]:
        """Token ids of the whole prompt; see :meth:`segments` for arguments and errors."""
        return self.segments(query, tokens_per_page).ids

    @cached_property
    def verdict_ids(self) -> tuple[int, int]:
        """First token of the template's ``yes`` and of its ``no``, the two to compare.

        Raises EngineError when the words begin with the same token, or the template has none.
        """
        yes, no = self.text_ids(self.template.yes)[:1], self.text_ids(self.template.no)[:1]
        if not yes or not no or yes == no:
            raise EngineError(
                f"profile {self.template.profile} has no two answers that this tokenizer tells "
                "apart by their first token; use profile pointwise and the checkpoint's tokenizer"
            )
        return yes[0], no[0]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of generated ``ids``; bytes that are not UTF-8 become U+FFFD."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder to be fed token by token."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Decodes token by token without ever giving out part of a character.

    The joined pieces of all ``feed`` calls and the final ``flush`` equal ``decode`` of all ids.
    """

    def __init__(self, tokenizer: PromptTokenizer, skip_special: bool = True) -> None:
        self.tokenizer = tokenizer
        self._skip_special = skip_special
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        """Text that ``token_id`` completes, possibly empty."""
        self._held.append(token_id)
        text = self.tokenizer.decode(self._held, self._skip_special)
        # Byte-level BPE splits characters: an unfinished one decodes to U+FFFD at the very end.
        if text.endswith("\ufffd"):
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is still held back, an unfinished character shown as U+FFFD."""
        text = self.tokenizer.decode(self._held, self._skip_special)
        self._held.clear()
        return text
