"""The page images: rows of a parquet file, or of several in the order of their names.

A page is found by its row: ``page_indices`` of the annotations counts rows through all files, and
nothing else identifies a page (``passage_id`` does not). Only the images that are asked for are
kept. The table is read forwards in small batches, so that a file of gigabytes needs no more memory
than one of its data pages (about a thousand images as pyarrow writes them), even where it is a
single row group; going back opens the row group again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mmr5_bench.mmdocir.annotations import DOWNLOAD, Annotations

if TYPE_CHECKING:
    import pyarrow.parquet

NAME, IMAGE = "doc_name", "image_binary"
BATCH_ROWS = 32  # of about 120 kB each


@dataclass(frozen=True)
class RowGroup:
    """Row group ``index`` of file ``shard``: ``count`` rows of the table from ``first`` on."""

    shard: int
    index: int
    first: int
    count: int


class PageTable:
    """The pages table; usable as a context manager.

    Not thread-safe: it remembers where it was, so that reading forwards is one pass.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Opens ``paths`` and checks their columns; ValueError naming the file and the remedy."""
        self._paths = tuple(paths)
        self._files: list[pyarrow.parquet.ParquetFile] = []
        self._groups: list[RowGroup] = []
        self._group: RowGroup | None = None
        self._batches: Iterator[Any] = iter(())
        self._images: Sequence[Any] = ()  # of the rows from _first on
        self._first = 0
        rows = 0
        try:
            for shard, path in enumerate(paths):
                file = _open(path)
                self._files.append(file)
                for index in range(file.metadata.num_row_groups):
                    count = file.metadata.row_group(index).num_rows
                    self._groups.append(RowGroup(shard, index, rows, count))
                    rows += count
        except BaseException:
            self.close()
            raise
        self.num_rows = rows

    @classmethod
    def open(cls, folder: Path) -> PageTable:
        """The files of ``folder`` that :func:`find_shards` finds."""
        return cls(find_shards(folder))

    def check(self, annotations: Annotations) -> None:
        """ValueError unless every row that ``annotations`` give a document carries its name.

        The annotations write ``name.pdf`` where the table may write ``name``; both are taken.
        """
        if self.num_rows < annotations.num_rows:
            raise ValueError(
                f"{self._described()} has {self.num_rows:,} rows, but the annotations reach row "
                f"{annotations.num_rows - 1:,}; a part is missing, {DOWNLOAD}"
            )
        names = [_stem(name) for index in range(len(self._files)) for name in self._names(index)]
        for document in annotations.documents:
            for row in range(document.first, document.last + 1):
                if names[row] != _stem(document.name):
                    raise ValueError(
                        f"row {row:,} of {self._described()} is a page of {names[row]!r}, but the "
                        f"annotations place {document.name!r} there; these are not the pages of "
                        f"this annotation file: {DOWNLOAD}"
                    )

    def read(self, rows: Iterable[int]) -> dict[int, bytes | None]:
        """Image files by row, as they lie in the table; None for a row without one.

        ValueError for a row outside of the table, and for a file that is damaged there.
        """
        found: dict[int, bytes | None] = {}
        for row in sorted(set(rows)):
            if not 0 <= row < self.num_rows:
                raise ValueError(f"row {row} is outside of the {self.num_rows:,} of the table")
            found[row] = self._image(row)
        return found

    def _image(self, row: int) -> bytes | None:
        group = self._group
        if group is None or not self._first <= row < group.first + group.count:
            self._start(next(g for g in self._groups if g.first <= row < g.first + g.count))
        while row >= self._first + len(self._images):
            self._advance()
        image: bytes | None = self._images[row - self._first].as_py()
        return image

    def _start(self, group: RowGroup) -> None:
        self._group, self._first, self._images = group, group.first, ()
        self._batches = self._files[group.shard].iter_batches(
            batch_size=BATCH_ROWS, row_groups=[group.index], columns=[IMAGE]
        )

    def _advance(self) -> None:
        assert self._group is not None
        path = self._paths[self._group.shard]
        try:
            batch = next(self._batches, None)
        except (OSError, ValueError) as error:  # pyarrow's own errors derive from ValueError
            self._group = None
            raise ValueError(f"{path} is damaged ({_line(error)}); download it again") from error
        if batch is None or not batch.num_rows:
            self._group = None
            raise ValueError(f"{path} ends before the rows it promises; download it again")
        self._first += len(self._images)
        self._images = batch.column(0)

    def _names(self, shard: int) -> list[str | None]:
        try:
            names: list[str | None] = self._files[shard].read(columns=[NAME]).column(0).to_pylist()
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{self._paths[shard]} is damaged ({_line(error)}); download it again"
            ) from error
        return names

    def _described(self) -> str:
        first = str(self._paths[0])
        return first if len(self._paths) == 1 else f"{first} and {len(self._paths) - 1} more"

    def close(self) -> None:
        """Closes every file; nothing can be read any more."""
        self._batches, self._images, self._group = iter(()), (), None
        for file in self._files:
            file.close(force=True)

    def __enter__(self) -> PageTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def find_shards(folder: Path) -> list[Path]:
    """The parquet files of pages in ``folder``, by name.

    Those with ``pages`` in their name, or else all that are not of layouts, which lie beside them.
    ValueError when there is none, and for numbers that names do not sort by (``-2`` and ``-10``).
    """
    if not folder.is_dir():
        raise ValueError(f"there is no data folder {folder}; {DOWNLOAD}")
    files = [path for path in sorted(folder.glob("*.parquet")) if "layout" not in path.name.lower()]
    found = [path for path in files if "pages" in path.name.lower()] or files
    if not found:
        raise ValueError(f"{folder} has no parquet file of pages; {DOWNLOAD}")
    if found != sorted(found, key=_by_number):
        raise ValueError(
            f"the parts of {folder} sort otherwise by name than by number ({found[1].name} comes "
            "before those with smaller numbers); fill their numbers up with zeros"
        )
    return found


def _by_number(path: Path) -> list[tuple[int, str]]:
    pieces = re.split(r"(\d+)", path.name)
    return [(int(p), "") if p.isdigit() and p.isascii() else (-1, p) for p in pieces]


def _open(path: Path) -> pyarrow.parquet.ParquetFile:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            "reading parquet files takes pyarrow: pip install 'mmr5-runtime[bench]'"
        ) from error
    try:
        # Mapped and not buffered beforehand: a column chunk may have all of the file's gigabytes.
        file = pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(
            f"{path} is no parquet file ({_line(error)}); download it again"
        ) from error
    schema = file.schema_arrow
    text = (pyarrow.types.is_string, pyarrow.types.is_large_string)
    binary = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    for column, kinds, wanted in ((NAME, text, "text"), (IMAGE, binary, "bytes")):
        if column not in schema.names:
            file.close(force=True)
            raise ValueError(
                f"{path} has no column {column!r} (it has {', '.join(schema.names)}); it is not "
                f"the pages table, {DOWNLOAD}"
            )
        kind = schema.field(column).type
        if not any(holds(kind) for holds in kinds):
            file.close(force=True)
            raise ValueError(
                f"column {column!r} of {path} holds {kind} and no {wanted}; take the file as it "
                f"was published: {DOWNLOAD}"
            )
    return file


def _line(error: Exception) -> str:
    """Its text on one line, which pyarrow's is not always."""
    return " ".join(str(error).split())


def _stem(name: str | None) -> str | None:
    return name[:-4] if name is not None and name.lower().endswith(".pdf") else name
