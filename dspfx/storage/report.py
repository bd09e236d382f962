"""What writing a compressed file tells: where its bytes went."""

from __future__ import annotations

from dataclasses import dataclass

from tabulate import tabulate

from dspfx.storage.blockcode import Counts


@dataclass(frozen=True)
class CompressedRow:
    """One stream of the file.

    Attributes:
        name: of its weight; for several tensors together how many of what they are.
        shape: of the weight; () for several tensors.
        coding: "plain", "half", "free", or layout and shape of the blocks, such as "planes 4x4".
        counts: blocks of each class and dead weights; None where there are none to tell.
        dense_bytes: in memory.
        size: bytes on disk.
        error: the distance between what was written and what is read, to the length of the former; 0 is exact.
    """

    name: str
    shape: tuple[int, ...]
    coding: str
    counts: Counts | None
    dense_bytes: int
    size: int
    error: float


@dataclass(frozen=True)
class CompressedReport:
    """What `dspfx.write_compressed` wrote.

    Attributes:
        path: the file.
        size: its bytes on disk, all of them.
        dense_bytes: of the same state_dict, each tensor once, uncompressed and without any header.
        rows: one for each stream; what is left of `size` is header and index.
    """

    path: str
    size: int
    dense_bytes: int
    rows: tuple[CompressedRow, ...]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.dense_bytes / self.size

    def __str__(self) -> str:
        header = ("tensor", "shape", "coding", "free", "unified", "pruned", "dead", "dense", "bytes", "ratio", "error")
        table = [self._line(row) for row in self.rows]
        table.append(["header and index", *[""] * 7, f"{self.size - sum(row.size for row in self.rows):,}", "", ""])
        table.append(["total", *[""] * 6, f"{self.dense_bytes:,}", f"{self.size:,}", f"{self.ratio:.2f}", ""])
        align = ("left",) * 3 + ("right",) * 8
        return tabulate(table, header, colalign=align, disable_numparse=True)

    def _line(self, row: CompressedRow) -> list[str]:
        counts = row.counts and (row.counts.free, row.counts.unified, row.counts.pruned, row.counts.dead)
        return [
            row.name,
            "x".join(map(str, row.shape)),
            row.coding,
            *([f"{n:,}" for n in counts] if counts else [""] * 4),
            f"{row.dense_bytes:,}",
            f"{row.size:,}",
            f"{row.dense_bytes / row.size:.2f}",
            f"{row.error:.2%}" if row.error else "exact",
        ]
