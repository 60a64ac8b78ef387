"""A rank report as Markdown; every word that comes from a file is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..util.text import escape_markdown, format_size
from .layer_rank import LayerRank, grouped, mean_rank, range_words, stored_rank, used_rank
from .ranks import RankReport

_MAX_ROWS = 160
_MAX_COLUMNS = 16


def markdown(report: RankReport) -> str:
    """Summary, rank per block and projection, and the size against uniform ranks."""
    notes = [escape_markdown(note, 300) for note in report.notes]
    return "\n\n".join([_summary(report), *notes, *_rank_tables(report), _size_table(report)]) + "\n"


def _summary(report: RankReport) -> str:
    rows = [
        ("layers", str(len(report.layers))),
        ("rank", f"{report.mean_rank:.1f} on average, {report.min_rank} to {report.max_rank}"),
        ("size", f"{format_size(report.bytes)}, {report.dtype}"),
    ]
    if report.mean_energy_rank is not None:
        rows.insert(2, ("rank in use", f"{report.mean_energy_rank:.1f} on average hold 99 % of the energy"))
    if report.other_tensors:
        words = f"{report.other_tensors} of {format_size(report.other_bytes)}, no plain LoRA pairs"
        rows.append(("other tensors", words))
    lines = [f"## {escape_markdown(report.title)}", "", _row(["", ""]), _row(["---", "---"])]
    return "\n".join(lines + [_row(row) for row in [*rows, *report.facts]])


def _rank_tables(report: RankReport) -> Iterator[str]:
    """One table per part, and one of the ranks in use where they were measured."""
    for part, layers in grouped(report.layers, lambda layer: layer.part).items():
        yield _rank_table(part or "Ranks", layers, stored_rank)
        if report.mean_energy_rank is not None:
            yield _rank_table(f"{part}, rank in use" if part else "Ranks in use", layers, used_rank)


def _rank_table(title: str, layers: list[LayerRank], value: Callable[[LayerRank], int]) -> str:
    """A row per block, a column per projection."""
    order = {layer.projection: layer.layer_name.row_order for layer in layers}
    columns = sorted(order, key=lambda projection: order[projection])
    displayed = columns[:_MAX_COLUMNS]
    blocks = grouped(layers, lambda layer: layer.block)
    lines = [f"### {escape_markdown(title)}", "", _row(["block", *displayed, "mean"])]
    lines.append(_row(["---", *["---:"] * (len(displayed) + 1)]))
    for block, members in list(blocks.items())[:_MAX_ROWS]:
        cells = grouped(members, lambda layer: layer.projection)
        ranks = [range_words([value(layer) for layer in cells.get(column, [])]) for column in displayed]
        lines.append(_row([block, *ranks, f"{mean_rank(members, value):.1f}"]))
    if len(blocks) > _MAX_ROWS or len(columns) > _MAX_COLUMNS:
        lines.append(f"\nOf {len(blocks)} blocks and {len(columns)} projections; the data lists every layer.")
    return "\n".join(lines)


def _size_table(report: RankReport) -> str:
    rows = [(number, f"every layer at rank {rank}") for rank, number in report.uniform_bytes.items()]
    rows.append((report.bytes, "this LoRA"))
    lines = ["### Size against one rank for every layer", "", _row(["ranks", "size"]), _row(["---", "---:"])]
    return "\n".join(lines + [_row([words, format_size(number)]) for number, words in sorted(rows)])


def _row(cells: Sequence[str]) -> str:
    """One row of a table; dashes, which make its rule, pass as they are."""
    escaped = (cell if set(cell) <= set("-:") else escape_markdown(cell) for cell in cells)
    return f"| {' | '.join(escaped)} |"
