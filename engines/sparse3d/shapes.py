"""Block sizes of the kernels: what one program works on."""

from __future__ import annotations

from dataclasses import dataclass

MOST_BLOCKS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelShapes:
    """Rows, words or cells per program, powers of two.

    `conv_rows` is the block of rows that shares a tile list: the only one on which results and tile counts depend.
    """

    conv_rows: int
    entry_rows: int
    strided_rows: int
    book_blocks: int
    scan_words: int
    bev_cells: int

    def words(self, total: int) -> int:
        """Words per program of the scan, which sums up at most 1024 blocks."""
        block = self.scan_words
        while programs(total, block) > MOST_BLOCKS:
            block *= 2
        return block


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def programs(total: int, block: int) -> int:
    """Programs that cover `total` in blocks."""
    return -(-total // block)


DEVICE = KernelShapes(conv_rows=64, entry_rows=256, strided_rows=128, book_blocks=1, scan_words=4096, bev_cells=64)
# An interpreter pays per program and step, not per element.
WIDE = KernelShapes(conv_rows=64, entry_rows=8192, strided_rows=8192, book_blocks=64, scan_words=16384, bev_cells=4096)
