"""The files of MMDocIR: what is read out of them, and every way in which they can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.mmdocir_files import (
    Paper,
    lines_of,
    plain,
    small_papers,
    write_annotations,
    write_data,
    write_pages,
)
from mmr5_bench.mmdocir.annotations import Annotations, find_annotations, read_annotations
from mmr5_bench.mmdocir.pages import PageTable, find_shards

Change = Callable[[list[dict[str, Any]]], None]
ROWS = (2, 0, 1)  # the first document of the file begins at row 2


def _annotations(folder: Path) -> Annotations:
    return read_annotations(find_annotations(write_data(folder, small_papers(), ROWS)))


def test_questions_count_in_file_order_and_rows_include_the_last(tmp_path: Path) -> None:
    found = _annotations(tmp_path)
    assert [(d.name, d.first, d.last, d.num_pages) for d in found.documents] == [
        ("a.pdf", 2, 5, 4),
        ("b.pdf", 6, 8, 3),
        ("c.pdf", 0, 1, 2),
    ]
    assert [(q.id, q.document, q.text, q.gold) for q in found.questions] == [
        (0, 0, "Where?", (3,)),  # the last page of its document
        (1, 1, "Who?", (0, 2)),
        (2, 1, "Why?", (1,)),
        (3, 2, "When?", ()),
    ]
    assert found.num_rows == 9
    assert not found.published


def test_f_page_ranges_are_inclusive(tmp_path: Path) -> None:
    line = lines_of([Paper("f.pdf", "News", [None] * 23, [("Q?", [22])])])[0]
    line["page_indices"] = [18196, 18218]
    found = read_annotations(write_annotations(tmp_path, [line]))
    assert found.documents[0].num_pages == 23
    assert found.questions[0].gold == (22,)
    line["questions"][0]["page_id"] = [23]
    with pytest.raises(ValueError, match="page_id 23 is outside of 0 to 22"):
        read_annotations(write_annotations(tmp_path, [line]))


def test_what_is_not_used_may_be_missing_or_strange(tmp_path: Path) -> None:
    lines = lines_of(small_papers(), ROWS)
    for line in lines:
        del line["layout_indinces"]
        line["layout_indices"] = "none"
        for question in line["questions"]:
            for key in ("A", "type", "layout_mapping"):
                del question[key]
    assert len(read_annotations(write_annotations(tmp_path, lines)).questions) == 4


def test_a_question_may_be_asked_twice_and_gold_may_repeat(tmp_path: Path) -> None:
    papers = [
        Paper("a.pdf", "News", [b"1", b"2"], [("Same?", [0]), ("Same?", [0]), ("B?", [1, 1])])
    ]
    found = read_annotations(write_annotations(tmp_path, lines_of(papers)))
    assert [(q.id, q.gold) for q in found.questions] == [(0, (0,)), (1, (0,)), (2, (1, 1))]


def _set(key: str, value: Any) -> Change:
    return lambda lines: lines[1].__setitem__(key, value)


def _drop(key: str) -> Change:
    return lambda lines: lines[1].__delitem__(key)


def _ask(key: str, value: Any) -> Change:
    return lambda lines: lines[1]["questions"][1].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("doc_name"), "line 2: it lacks 'doc_name'"),
        (_drop("domain"), "line 2: it lacks 'domain'"),
        (_drop("page_indices"), "line 2: it lacks 'page_indices'"),
        (_drop("questions"), "line 2: it lacks 'questions'"),
        (_set("doc_name", 7), "line 2: doc_name is 7 and no text"),
        (_set("domain", "laws"), "domain 'laws' is none of the ten .Research report"),
        (_set("page_indices", [6, 8, 9]), "no first and last row, both included"),
        (_set("page_indices", [8, 6]), "no first and last row, both included"),
        (_set("page_indices", [-1, 2]), "no first and last row, both included"),
        (_set("page_indices", [6, "8"]), "no list of whole numbers"),
        (_set("page_indices", [6.0, 8.0]), "no list of whole numbers"),
        (_set("page_indices", [True, 8]), "no list of whole numbers"),
        (_set("questions", {"Q": "?"}), "no list"),
        (_set("questions", ["Q?"]), "line 2: question 1: it is 'Q\\?' and no object"),
        (_ask("Q", None), "line 2: question 2: Q is None and no text"),
        (_ask("page_id", 1), "question 2: page_id is 1 and no list of whole numbers"),
        (_ask("page_id", ["1"]), "no list of whole numbers"),
        (_ask("page_id", [3]), "page_id 3 is outside of 0 to 2, the pages of b.pdf"),
        (_ask("page_id", [-1]), "page_id -1 is outside of 0 to 2"),
        # Ends that are not included, as a public script reads them:
        (_set("page_indices", [5, 8]), "lines 1 and 2 share row 5, but page_indices includes"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: Change, message: str) -> None:
    lines = lines_of(small_papers(), ROWS)
    change(lines)
    with pytest.raises(ValueError, match=message):
        read_annotations(write_annotations(tmp_path, lines))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no questions; download MMDocIR_pages.parquet from"),
        (b"\n", "line 1: it is no JSON"),
        (b"{", "line 1: it is no JSON"),
        (b"[]\n", "line 1: it holds \\[\\] and no object"),
        (b'{"doc_name": "\xff"}\n', "line 1: it is no JSON"),
        (b"[" * 100_000, "line 1: it is no JSON"),
    ],
)
def test_what_is_no_annotation_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "MMDocIR_annotations.jsonl"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_annotations(path)


def test_a_missing_download_says_what_to_download(tmp_path: Path) -> None:
    wanted = "MMDocIR/MMDocIR_Evaluation_Dataset.*github.com/MMDocRAG/MMDocIR.*CC BY-NC 4.0"
    with pytest.raises(ValueError, match=f"no data folder .*{wanted}"):
        find_annotations(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"has no MMDocIR_annotations.jsonl.*{wanted}"):
        find_annotations(tmp_path)
    with pytest.raises(ValueError, match=f"no data folder .*{wanted}"):
        find_shards(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"no parquet file of pages.*{wanted}"):
        find_shards(tmp_path)


@pytest.fixture(scope="module")
def rewritten(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any") / "given.jsonl"


@given(data=st.binary(max_size=200) | st.text(max_size=100).map(str.encode))
def test_any_bytes_give_one_clear_error(rewritten: Path, data: bytes) -> None:
    rewritten.write_bytes(data)
    with pytest.raises(ValueError, match="given.jsonl"):
        read_annotations(rewritten)


@pytest.mark.parametrize(("shards", "group"), [(1, 3), (1, 100), (3, 2), (9, 1)])
def test_pages_are_found_by_row(tmp_path: Path, shards: int, group: int) -> None:
    papers = small_papers()
    write_data(tmp_path, papers, ROWS, shards=shards, group=group)
    annotations = read_annotations(find_annotations(tmp_path))
    with PageTable.open(tmp_path) as table:
        assert table.num_rows == 9
        table.check(annotations)
        rows = [page for index in ROWS for page in papers[index].pages]
        assert table.read(range(9)) == dict(enumerate(rows))
        assert table.read([7, 1, 7]) == {1: rows[1], 7: rows[7]}  # forwards and back again
        for row in (8, 0, 8, 3, 2, 2, 5):
            assert table.read([row]) == {row: rows[row]}
        assert table.read([]) == {}
        with pytest.raises(ValueError, match="row 9 is outside"):
            table.read([9])


def test_layouts_beside_the_pages_are_left_alone(tmp_path: Path) -> None:
    papers = small_papers()
    write_pages(tmp_path, papers, name="MMDocIR_layouts")
    with pytest.raises(ValueError, match="no parquet file of pages"):
        find_shards(tmp_path)
    (wanted,) = write_pages(tmp_path, papers)
    write_pages(tmp_path, papers, name="embeddings")
    assert find_shards(tmp_path) == [wanted]


def test_parts_without_leading_zeros_are_refused(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        write_pages(tmp_path, small_papers(), name=f"pages-{number}")
    with pytest.raises(ValueError, match="fill their numbers up with zeros"):
        find_shards(tmp_path)


def test_a_large_row_group_is_never_held_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(20_000) for _ in range(600)]
    rows = pa.table({"doc_name": ["a"] * 600, "image_binary": images})
    # The data pages that are decompressed as one hold 8 images here, as published about 1,000.
    pq.write_table(rows, tmp_path / "pages.parquet", write_batch_size=8, use_dictionary=False)
    del rows
    assert pq.ParquetFile(tmp_path / "pages.parquet").num_row_groups == 1
    before = pa.total_allocated_bytes()
    with PageTable.open(tmp_path) as table:
        for row in (3, 250, 599):
            assert table.read([row]) == {row: images[row]}
            assert pa.total_allocated_bytes() - before < 3_000_000  # of 12 MB


def test_pages_of_other_documents_are_refused(tmp_path: Path) -> None:
    annotations = _annotations(tmp_path)
    papers = small_papers()
    write_pages(tmp_path, papers)  # the same files, the documents in another order
    with (
        PageTable.open(tmp_path) as table,
        pytest.raises(ValueError, match="row 4 of .* is a page of 'b', but .* place 'a.pdf' there"),
    ):
        table.check(annotations)
    papers[1].name = "other.pdf"
    write_pages(tmp_path, papers, ROWS)
    with (
        PageTable.open(tmp_path) as table,
        pytest.raises(ValueError, match="row 6 of .* is a page of 'other', but .* place 'b.pdf'"),
    ):
        table.check(annotations)


def test_names_with_and_without_pdf_are_the_same(tmp_path: Path) -> None:
    annotations = _annotations(tmp_path)
    papers = small_papers()
    papers[0].name = "a.pdf.pdf"  # written as a.pdf
    papers[1].name = "b"
    write_pages(tmp_path, papers, ROWS)
    with PageTable.open(tmp_path) as table:
        table.check(annotations)


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    papers = small_papers()
    write_annotations(tmp_path, lines_of(papers))
    papers[2].pages.pop()
    write_pages(tmp_path, papers)
    annotations = read_annotations(find_annotations(tmp_path))
    with (
        PageTable.open(tmp_path) as table,
        pytest.raises(ValueError, match="has 8 rows, but the annotations reach row 8; a part"),
    ):
        table.check(annotations)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"doc_name": ["a"]}, "no column 'image_binary' .it has doc_name"),
        ({"image_binary": [b"1"]}, "no column 'doc_name'"),
        ({"doc_name": [1], "image_binary": [b"1"]}, "column 'doc_name' of .* holds int64"),
        ({"doc_name": ["a"], "image_binary": ["1"]}, "column 'image_binary' of .* holds string"),
        (
            {"doc_name": ["a"], "image_binary": [{"bytes": b"1", "path": "a"}]},
            "column 'image_binary' of .* holds struct",
        ),
    ],
)
def test_wrong_columns_are_named(
    tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "pages.parquet")
    with pytest.raises(ValueError, match=message):
        PageTable.open(tmp_path)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    (path,) = write_pages(tmp_path, small_papers())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="MMDocIR_pages.parquet is no parquet file"):
        PageTable.open(tmp_path)


def test_a_file_that_is_damaged_inside_is_named(tmp_path: Path) -> None:
    images: list[bytes | None] = [b"image" * 4000 for _ in range(50)]
    (path,) = write_pages(tmp_path, [Paper("a.pdf", "News", images)], group=10)
    data = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(4)
    at = chunk.dictionary_page_offset or chunk.data_page_offset
    data[at : at + 16] = b"\xff" * 16
    path.write_bytes(data)
    with PageTable.open(tmp_path) as table:
        with pytest.raises(ValueError, match="is damaged .*download it again"):
            table.read([25])
        assert table.read([5]) == {5: images[5]}


def test_a_row_without_an_image_has_none(tmp_path: Path) -> None:
    write_pages(tmp_path, [Paper("a.pdf", "News", [plain(0), None])])
    with PageTable.open(tmp_path) as table:
        assert table.read([0, 1]) == {0: plain(0), 1: None}
