"""Small data sets in the files of MMDocIR: annotations, pages, first-stage scores."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.mmdocir.annotations import DOMAINS, FILE_NAME


@dataclass
class Paper:
    """A document: image files of its pages, and questions with their gold pages."""

    name: str
    domain: str
    pages: list[bytes | None]
    questions: list[tuple[str, list[int]]] = field(default_factory=list)


def jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    return file.getvalue()


def plain(number: int, width: int = 28, height: int = 28) -> bytes:
    """A page of one colour, which tells its number."""
    color = (number * 40 % 256, number // 6 * 40 % 256, 90)
    return jpeg(Image.new("RGB", (width, height), color))


def small_papers() -> list[Paper]:
    """Three documents of 4, 3 and 2 pages; the second question has two gold pages."""
    return [
        Paper("a.pdf", "News", [plain(n) for n in range(4)], [("Where?", [3])]),
        Paper("b.pdf", "Laws", [plain(n) for n in range(4, 7)], [("Who?", [0, 2]), ("Why?", [1])]),
        Paper("c.pdf", "Laws", [plain(n) for n in range(7, 9)], [("When?", [])]),
    ]


def drawn_papers(count: int, seed: int = 11) -> list[Paper]:
    """Documents of six drawn pages, going through the ten domains; the first has two questions."""
    cases = held_out_cases(2 * count, 3, seed)
    papers = []
    for index in range(count):
        two = cases[2 * index : 2 * index + 2]
        images = [jpeg(render_page(p.topic, p.kind, p.seed)) for case in two for p in case.pages]
        questions = [
            (case.question, [page + 3 * which for page in case.gold])
            for which, case in enumerate(two if index == 0 else two[:1])
        ]
        domain = DOMAINS[index % len(DOMAINS)]
        papers.append(Paper(f"paper{index}.pdf", domain, list(images), questions))
    return papers


def lines_of(papers: Sequence[Paper], rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """What stands in the annotation file; documents lie in the table in the order ``rows``."""
    firsts, first = {}, 0
    for index in rows if rows is not None else range(len(papers)):
        firsts[index] = first
        first += len(papers[index].pages)
    return [
        {
            "doc_name": paper.name,
            "domain": paper.domain,
            "page_indices": [firsts[index], firsts[index] + len(paper.pages) - 1],
            "layout_indinces": [0, 0],
            "questions": [
                {"Q": text, "A": "x", "page_id": gold, "type": "['Chart']", "layout_mapping": []}
                for text, gold in paper.questions
            ],
        }
        for index, paper in enumerate(papers)
    ]


def write_annotations(folder: Path, lines: Iterable[Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILE_NAME
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_pages(
    folder: Path,
    papers: Sequence[Paper],
    rows: Sequence[int] | None = None,
    *,
    shards: int = 1,
    group: int = 3,
    name: str = "MMDocIR_pages",
) -> list[Path]:
    """The pages table in ``shards`` files, ``group`` rows to a row group.

    ``doc_name`` is written without ``.pdf``, and ``passage_id`` misleads on purpose.
    """
    table = [
        {
            "doc_name": papers[index].name.removesuffix(".pdf"),
            "domain": papers[index].domain,
            "passage_id": str(1000 - number),
            "image_path": f"page_images/{number}.jpg",
            "image_binary": page,
            "ocr_text": "",
            "vlm_text": "",
        }
        for index in (rows if rows is not None else range(len(papers)))
        for number, page in enumerate(papers[index].pages)
    ]
    schema = pa.schema(
        [
            (key, pa.binary() if key == "image_binary" else pa.string())
            for key in ("doc_name", "domain", "passage_id", "image_path", "image_binary")
        ]
        + [("ocr_text", pa.string()), ("vlm_text", pa.string())]
    )
    size = -(-len(table) // shards)
    paths = []
    for shard in range(shards):
        suffix = f"-{shard:05}-of-{shards:05}" if shards > 1 else ""
        paths.append(folder / f"{name}{suffix}.parquet")
        part = pa.Table.from_pylist(table[shard * size : (shard + 1) * size], schema=schema)
        pq.write_table(part, paths[-1], row_group_size=group)
    return paths


def write_data(
    folder: Path, papers: Sequence[Paper], rows: Sequence[int] | None = None, **options: Any
) -> Path:
    """Annotations and pages of ``papers`` in ``folder``."""
    write_annotations(folder, lines_of(papers, rows))
    write_pages(folder, papers, rows, **options)
    return folder


def write_scores(path: Path, scores: Iterable[tuple[int, Sequence[float]]]) -> Path:
    lines = [{"question": question, "scores": list(row)} for question, row in scores]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path
