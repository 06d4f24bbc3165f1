"""Question and pages to token ids, exactly as the public MM-R5 reranker script builds them.

The wording is data (`templates/mm_r5.json`), hashed into every engine manifest: one changed byte
changes every token id after it. Pure text work, no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from tokenizers import Tokenizer

from mmr5_runtime.types import EngineError, RequestError


@dataclass(frozen=True)
class Template:
    """The fixed text around a question and its pages.

    ``question`` has the fields ``{question}`` and ``{num_pages}``, ``page_label`` has ``{number}``
    (1-based), ``message_start`` has ``{role}``; the rest is literal.
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

    @property
    def sha256(self) -> str:
        """Hash of the content: sorted keys, no white space, so reformatting the file is free."""
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()

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

    @property
    def tail(self) -> str:
        """Closes the user's message and opens the assistant's."""
        return f"{self.message_end}{self.message_start.format(role='assistant')}"


def load_template(name: str = "mm_r5") -> Template:
    """Read a template that ships with the package; EngineError if there is none of that name."""
    path = resources.files("mmr5_runtime") / "templates" / f"{name}.json"
    if not path.is_file():
        raise EngineError(f"there is no prompt template {name!r}; update mmr5-runtime")
    return Template(**json.loads(path.read_text(encoding="utf-8")))


def template_sha256(name: str = "mm_r5") -> str:
    """Hash of a shipped template, as written to and compared with the engine manifest."""
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

    Raises RequestError for a blank question or no pages.
    """
    template = template or load_template()
    check_query(query)
    if num_pages < 1:
        raise RequestError("there are no pages to rank; pass at least one")
    pages = "".join(
        (template.label(number) if number > 1 else "") + template.image(1)
        for number in range(1, num_pages + 1)
    )
    return template.head(query, num_pages) + pages + template.tail


@dataclass(frozen=True)
class Segments:
    """Token ids of a prompt, cut where every cut lies against a special token.

    ``head`` ends with the label of page 1: the template's ``:\\n`` and the ``\\n`` that opens this
    label merge into one token, so a cut between them would change the ids. From page 2 on a page
    is label, vision start, pads, vision end.
    """

    head: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    tail: tuple[int, ...]

    @cached_property
    def ids(self) -> list[int]:
        """Head, pages and tail joined: the prompt's token ids."""
        return [*self.head, *(token for page in self.pages for token in page), *self.tail]


class PromptTokenizer:
    """A checkpoint's ``tokenizer.json`` together with the prompt template."""

    def __init__(self, tokenizer: Tokenizer, template: Template | None = None) -> None:
        """Raises EngineError when the tokenizer lacks a special token of the template."""
        self.template = template or load_template()
        self._tokenizer = tokenizer
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

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def segments(self, query: str, tokens_per_page: Sequence[int]) -> Segments:
        """Tokenize a question over pages of ``tokens_per_page`` merged patches each.

        Raises RequestError for a blank question, one that contains a special token of the
        checkpoint (it would be read as markup), and for no pages.
        """
        check_query(query)
        for token in self._special:
            if token in query:
                raise RequestError(
                    f"the question contains the reserved token {token}; remove it or respell it"
                )
        if not tokens_per_page:
            raise RequestError("there are no pages to rank; pass at least one")
        template = self.template
        pages = []
        for number, count in enumerate(tokens_per_page, start=1):
            label = self._ids(template.label(number)) if number > 1 else []
            pads = [self.image_pad_id] * count
            pages.append((*label, self._vision_start, *pads, self._vision_end))
        head = self._ids(template.head(query, len(pages)))
        return Segments(tuple(head), tuple(pages), tuple(self._ids(template.tail)))

    def encode(self, query: str, tokens_per_page: Sequence[int]) -> list[int]:
        """Token ids of the whole prompt; see :meth:`segments` for arguments and errors."""
        return self.segments(query, tokens_per_page).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of generated ``ids``; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special)
        return text

    def stream(self, skip_special: bool = True) -> StreamDecoder:
        """A decoder to be fed token by token."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Decodes token by token without ever giving out part of a character.

    The joined pieces of all ``feed`` calls and the final ``flush`` equal ``decode`` of all ids.
    """

    def __init__(self, tokenizer: PromptTokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._held: list[int] = []

    def feed(self, token_id: int) -> str:
        """Text that ``token_id`` completes, possibly empty."""
        self._held.append(token_id)
        text = self._tokenizer.decode(self._held, self._skip_special)
        # Byte-level BPE splits characters: an unfinished one decodes to U+FFFD at the very end.
        if text.endswith("\ufffd"):
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        """What is still held back, an unfinished character shown as U+FFFD."""
        text = self._tokenizer.decode(self._held, self._skip_special)
        self._held.clear()
        return text
