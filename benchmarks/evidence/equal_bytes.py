"""Methods at equal bytes: what each scores on a subject at its tuned learning rate and step, and who is better.

A file's bytes are those of its factors at two bytes a number; the header, some kilobytes in all of them, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence.comparison import ALLOCATED, RESIZED, UNIT, Config, Tuned, job, score, usable
from benchmarks.evidence.experiment import mean
from benchmarks.evidence.personal import FIXED, PAPER, SETTLING
from benchmarks.evidence.pool import Record

BYTES = 2
"""Of a number in a file, by default."""


@dataclass(frozen=True)
class Point:
    """A config on a subject: means over the seeds. before: the base's loss and drift. losses: by seed.

    tuned: the loss of the config on the subjects that settings are tuned on.
    """

    loss: float
    drift: float
    parameters: float
    before: float
    drift_before: float
    losses: tuple[float, ...]
    tuned: float = math.nan


Points = Mapping[tuple[str, Config], Point]


def points(
    records: Mapping[str, Record], tuned: Tuned, names: Iterable[str], seeds: Sequence[int]
) -> dict[tuple[str, Config], Point]:
    """Every subject and config of which there is at least one seed that did not diverge."""
    found = {}
    for name in names:
        for config, choice in tuned.items():
            runs = [records.get(job(config, name, choice.rate, seed).key) for seed in seeds]
            if at := point(config, choice.step, [run for run in runs if run]):
                found[name, config] = replace(at, tuned=choice.loss)
    return found


def point(config: Config, step: int, runs: Sequence[Record]) -> Point | None:
    """The means over these runs at a step; None where there is none, or one of them diverged."""
    at: list[dict[str, Any]] = []
    for run in runs:
        at += [score(mark, config) for mark in usable(run) if mark["step"] == step]
    if not at or len(at) < len(runs):
        return None
    before = [run["before"] for run in runs]
    return Point(
        mean(a["loss"] for a in at), mean(a["drift"] for a in at), mean(a["parameters"] for a in at),
        mean(b["loss"] for b in before), mean(b["drift"] for b in before), tuple(a["loss"] for a in at),
    )  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """Ours beside another method on a subject at the size of a uniform rank. difference: of losses, as a share of the other's."""

    subject: str
    rank: int
    ours: Point
    other: Point

    @property
    def difference(self) -> float:
        return self.ours.loss / self.other.loss - 1

    @property
    def better(self) -> bool:
        """Or equal."""
        return self.ours.loss <= self.other.loss


def ours_within(found: Points, subject: str, parameters: float, count: int) -> Point | None:
    """Of ours whose files are no larger than this, the one with the target that did best on the tuning subjects."""
    own = (
        at for (name, config), at in found.items() if name == subject and (config[0], config[2]) == (SETTLING, count)
    )
    return min((at for at in own if at.parameters <= parameters), key=lambda at: at.tuned, default=None)


def pairs(found: Points, method: str, count: int) -> list[Pair]:
    """Ours beside a method, on every subject and at every size of it.

    The size is that of a uniform rank, r · UNIT parameters: fixed ranks have it exactly, files that are cut have at most that.
    The paper's form has the size that its ranks end at, and ours is no larger than it.
    """
    result = []
    for (subject, config), other in found.items():
        if config[0] != method or config[2] != count:
            continue
        limit = other.parameters if method == PAPER else config[1] * UNIT
        if ours := ours_within(found, subject, limit, count):
            result.append(Pair(subject, config[1], ours, other))
    return result


def same_target(found: Points, method: str, count: int) -> list[Pair]:
    """Ours with the same target as the other's rank beside it, for what has its size by a rank; ours is no larger."""
    result = []
    for (subject, config), other in found.items():
        ours = found.get((subject, (SETTLING, config[1], count)))
        if config[0] == method and config[2] == count and ours and ours.parameters <= config[1] * UNIT:
            result.append(Pair(subject, config[1], ours, other))
    return result


def beaten(compared: Sequence[Pair]) -> dict[str, bool]:
    """By subject: whether ours is better or equal at every size."""
    return {
        name: all(p.better for p in compared if p.subject == name)
        for name in dict.fromkeys(p.subject for p in compared)
    }


SURE = 2.0
"""Standard errors from 0 at which a pair is said to differ."""


def pair_error(compared: Sequence[Pair]) -> float:
    """The standard error of a pair's difference in the mean over seeds, with one variance for all pairs.

    A seed decides the start, the order of pictures and the noise alike for both; the subject's held-out pictures are the same.
    """
    variances, seeds = [], 0
    for pair in compared:
        each = [ours / other - 1 for ours, other in zip(pair.ours.losses, pair.other.losses, strict=True)]
        seeds = len(each)
        if seeds > 1:
            variances.append(sum((d - mean(each)) ** 2 for d in each) / (seeds - 1))
    return math.sqrt(mean(variances) / seeds) if variances else math.nan


def surely_worse(compared: Sequence[Pair]) -> list[Pair]:
    """Pairs in which ours is worse by more than SURE standard errors of a pair."""
    error = pair_error(compared)
    return [pair for pair in compared if pair.difference > SURE * error]


def surely_better(compared: Sequence[Pair]) -> list[Pair]:
    """Pairs in which ours is better by more than that."""
    error = pair_error(compared)
    return [pair for pair in compared if pair.difference < -SURE * error]


def tally(compared: Sequence[Pair]) -> dict[str, Any]:
    """Subjects that are beaten, the share of pairs in which ours is better, the mean and the worst difference."""
    return {
        "subjects": len(beaten(compared)),
        "beaten": sum(beaten(compared).values()),
        "share": mean(p.better for p in compared),
        "difference": mean(p.difference for p in compared),
        "worst": max((p.difference for p in compared), default=math.nan),
    }


METHODS = {FIXED: "fixed rank", RESIZED: "64, resized", ALLOCATED: "64, cut by energy", PAPER: "paper's form"}
"""What ours is compared with, in words."""
