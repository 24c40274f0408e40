"""What a run measures, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from bench.operations import READS

__all__ = ["DUELS_WITH", "Plan", "full", "quick"]

DUELS_WITH = ("lmdb", "base-manager", "redis")
"""The contenders that shmelim is held against in one process, besides dict."""


@dataclass(frozen=True)
class Plan:
    """What a run measures, and for how long.

    Attributes
    ----------
    sizes
        Numbers of records.
    readers
        Numbers of reader processes.
    main_seconds
        For an operation with one reader.
    crowd_seconds
        For an operation with several.
    duel_seconds
        For a duel.
    scaling_rounds
        How often one reader alone and two together are measured in turn.
    rounds
        How often each operation is measured, in turn with the others; how far these differ is its spread.
    changed
        Numbers of records of which is measured what changes cost.
    fill_seconds
        A contender that takes longer to be filled is skipped, and so is one whose readers take longer to be ready.

    """

    sizes: tuple[int, ...]
    readers: tuple[int, ...]
    main_seconds: float
    crowd_seconds: float
    duel_seconds: float
    scaling_rounds: int
    rounds: int
    changed: tuple[int, ...]
    fill_seconds: float = 120.0

    def operations(self, readers: int) -> tuple[str, ...]:
        """Return what is measured with so many readers: all records only with one."""
        return READS if readers == 1 else READS[:-1]

    def reader_counts(self, size: int, *, own_copies: bool) -> tuple[int, ...]:
        """Return the numbers of readers for a contender."""
        if own_copies and size >= 1_000_000:
            return self.readers[:1]
        return self.readers


full = Plan(
    sizes=(256, 10_000, 1_000_000),
    readers=(1, 2, 4),
    main_seconds=0.2,
    crowd_seconds=0.1,
    duel_seconds=0.6,
    scaling_rounds=9,
    rounds=3,
    changed=(100, 10_000, 200_000),
)

quick = Plan(
    sizes=(256,),
    readers=(1, 2),
    main_seconds=0.04,
    crowd_seconds=0.03,
    duel_seconds=0.06,
    scaling_rounds=3,
    rounds=2,
    changed=(100,),
)
