"""What a conversion did: for every tensor its format, bytes and error. Pure data; printing is someone else's."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor. sqnr_db: 10 log10(sum w^2 / sum error^2), None if it was kept exactly; nmse: its inverse,
    not in decibels. zero_rows: rows of nothing but zeros in the checkpoint. lost_rows: rows that became so, too
    small for the format. peak_to_rms: the largest magnitude over the root of the mean square, None where it was not
    looked at; a Gaussian matrix of a million values has about 5."""

    name: str
    part: str
    shape: tuple[int, ...]
    format: str
    bytes: int
    bits_per_weight: float
    sqnr_db: float | None
    nmse: float | None
    zero_rows: int
    lost_rows: int
    note: str
    peak_to_rms: float | None = None


def make_row(
    name: str,
    part: str,
    shape: tuple[int, ...],
    form: str,
    nbytes: int,
    signal: float,
    noise: float,
    zero_rows: int,
    lost_rows: int,
    note: str,
    peak: float = 0.0,
) -> Row:
    """A row from the sums of squares of the values and of their errors, and the largest magnitude."""
    exact = noise == 0.0
    nmse = None if exact else noise / signal if signal else math.inf
    sqnr = None if nmse is None else -10 * math.log10(nmse) if nmse < math.inf else -math.inf
    bits = nbytes * 8 / math.prod(shape)
    ratio = peak / math.sqrt(signal / math.prod(shape)) if signal else None
    return Row(name, part, shape, form, nbytes, bits, sqnr, nmse, zero_rows, lost_rows, note, ratio)


@dataclass(frozen=True)
class Report:
    """A conversion: rows in the order of the inventory; pack_bytes counts every file of the pack."""

    pack: str
    recipe: str
    rows: tuple[Row, ...]
    source_bytes: int
    pack_bytes: int
    seconds: float
    notes: tuple[str, ...]

    @property
    def warnings(self) -> list[str]:
        """What a person should look at: zero rows, and notes of single tensors."""
        out = [f"{row.name}: {row.lost_rows} rows became zeros in {row.format}" for row in self.rows if row.lost_rows]
        out += [f"{row.name}: {row.zero_rows} rows of zeros" for row in self.rows if row.zero_rows]
        return out + [f"{row.name}: {row.note}" for row in self.rows if row.note]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "pack": self.pack,
            "recipe": self.recipe,
            "source_bytes": self.source_bytes,
            "pack_bytes": self.pack_bytes,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "tensors": [asdict(row) for row in self.rows],
        }
