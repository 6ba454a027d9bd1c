"""The report of ``permdistill measure`` as one HTML file: offline, printable, for people who did not run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from permdistill import debias, fewcalls
from permdistill.files import sha256_of
from permdistill.measure import evaluate
from permdistill.measure.page import Cells, Shown, embedded, filled, table
from permdistill.measure.pairs import FAILED, TIE, rates, verdicts
from permdistill.measure.report import Report, percent
from permdistill.measure.rows import Problems, rows
from permdistill.measure.tally import mean_of
from permdistill.orders import LETTERS

ITEMS, BYTES = 20, 200_000  # items shown, and what their data may take: orders of six options fill it sooner
LONGEST = 1_200  # characters of a text that is shown
# The six rows that are shown unfolded: the first six of these that the records allow, cheapest first.
FIRST = (
    debias.BIASED, debias.DEBIASED, debias.PRIOR_MATCHING, debias.CYCLIC, fewcalls.BATCH_CALIBRATION,
    fewcalls.REVERSE_PAIR, debias.MAJORITY, fewcalls.GEOMETRIC,
)  # fmt: skip

# Of the light: flips in at most this share of cases, shares of a position at most so far from even, interval and all.
GREEN, RED = (0.10, 0.05), (0.20, 0.10)
RULE = (
    "Green: the flip rate's interval lies below 10%, and that of every position within 5 points of even. Red: the flip "
    "rate's lies above 20%, or a position's more than 10 points from even. Amber: all else."
)

DEFINITIONS = {
    "accuracy": "Share of the verdicts that are the gold answer; a tie shares the credit, a failure has none.",
    "accuracy of the mean over orders": "The same of each item's probabilities, averaged over its orders.",
    "gain of the mean over orders": "What that average adds to the accuracy of the verdicts it averages, item by item.",
    "first position": "Share of the decided verdicts that go to what stands first.",
    "flip rate": "Share of an item's other orders that decide otherwise than its first one.",
    "consistency": "Share of the pairs of an item's orders that decide for the same option.",
    "verdict agreement": "The same, where a tie is a verdict of its own.",
    "ps (TV)": "Permutation sensitivity: mean total variation between the answers in two orders; 0: no order matters.",
    "tied": "Share of the verdicts in which two or more options are equally probable.",
    "failed": "Share of the verdicts that could not be read.",
    "repeats that differ": "Share of the pairs of repeated calls in one order that decide otherwise: noise, not the order.",
    "label mass": "Probability that the labels got together; other tokens got the rest.",
    "consistent (MT-bench)": "Pairs with the same verdict in both orders (Zheng et al., NeurIPS 2023).",
    "biased toward first (MT-bench)": "Pairs whose two verdicts differ and lean to the first position.",
    "biased toward second (MT-bench)": "Pairs whose two verdicts differ and lean to the second position.",
    "error (MT-bench)": "Pairs with a verdict that could not be read.",
    "equal (LLMBar)": "Pairs with the same verdict, failures included (Zeng et al., ICLR 2024).",
    "correct_average (LLMBar)": "Mean share of a pair's two verdicts that are right; a tie is not.",
    "correct_both (LLMBar)": "Pairs that are right in both orders.",
    "accuracy (JudgeBench)": "Pairs whose verdicts count more for the gold answer than against it (Tan et al., ICLR 2025).",
    "gain over biased": "Accuracy over that of the verdicts as they are, paired item by item.",
    "difference": "Accuracy over that of another system, paired item by item.",
    "ps (KL, nats)": "Permutation sensitivity with the Kullback-Leibler divergence in place of total variation.",
    "pb (TV)": "Positional bias: distance of the positions' mean probabilities from equal shares.",
    "pb per item (TV)": "The same of each item on its own, averaged: items do not cancel.",
    "consistency rate": "Share of the pairs of an item's orders that decide for the same option.",
    "fluctuation rate": "Share of the items whose decision changes when the first order is reversed (Wei et al., 2024).",
    "PPA": "Share of an item's orders that decide for its most frequent option (Robinson et al., ICLR 2023).",
    "PBM": "Variance of an option's probability over the orders, averaged over options.",
    "CircularEval": "Share of the items that are right in every rotation of the first order (Liu et al., ECCV 2024).",
    "adversarial accuracy": "Share of the items that are right in every order given (Zong et al., ICML 2024).",
    "RStd": "Standard deviation over positions of the recall of gold answers that stand there (Zheng et al., ICLR 2024).",
    "Cramer's V": "Association between the gold answer's position and being right: 0 none, 1 complete.",
    "CKLD (nats)": "KL divergence between where gold answers stand and where decisions go (Choi et al., ACL 2025).",
    "ECE": "Expected calibration error: mean distance between confidence and accuracy, in ten bins of confidence.",
    "Brier": "Squared distance of the probabilities from the gold answer's 1, summed over options: 0 to 2.",
    "NLL (nats)": "Minus the logarithm of the gold answer's probability: 0 where it is sure and right.",
}  # fmt: skip


def _value(interval: Sequence[float]) -> str:
    return "" if interval[0] != interval[0] else f'<span class="value">{percent(interval)}</span>'


def light(report: Report) -> str:
    """Whether one order will do, in words: green, amber or red, as :data:`RULE` says; or that it cannot be said."""
    flips = next((line.interval for line in report.lines if line.name == "flip rate"), None)
    frame = report.positions
    if flips is None or flips.low != flips.low or "share" not in frame:
        return "No light: too few verdicts in two orders"
    off = np.maximum(frame.share_high - frame.even, frame.even - frame.share_low).max()
    surely = np.maximum(frame.share_low - frame.even, frame.even - frame.share_high).max()
    if flips.high < GREEN[0] and off < GREEN[1]:
        return "Green: the order hardly matters"
    if flips.low > RED[0] or surely > RED[1]:
        return "Red: do not trust a single order"
    return "Amber: the order matters, ask in more than one"


# --------------------------------------------------------------------------------------------------------------------
# Drawings


def _reach(low: float, high: float, value: float, y: float) -> str:
    if low != low:
        low = high = value
    line = f'<line class="reach" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
    return f'{line}<circle class="dot" cx="{value:.1f}" cy="{y}" r="3.5"/>'


def _positions(report: Report) -> str:
    """A bar a position, for each number of options."""
    frame, parts = report.positions, []
    if "share" not in frame:
        return "<p>No verdict is decided.</p>"
    frame = frame[frame.share.notna()]
    for k, own in frame.groupby("K"):
        x, marks = lambda share: 30 + 250 * share, []
        for place, row in enumerate(own.itertuples()):
            y, share = 20 + 26 * place, (row.share, row.share_low, row.share_high)
            marks.append(f'<text x="18" y="{y + 4}" text-anchor="end">{row.label}</text>')
            marks.append(f'<rect class="bar" x="30" y="{y - 9}" width="{250 * row.share:.1f}" height="18"/>')
            marks.append(_reach(x(row.share_low), x(row.share_high), x(row.share), y))
            marks.append(f'<text x="290" y="{y + 4}">{percent(share)}</text>')
        height = 34 + 26 * len(own)
        even = f'<line class="even" x1="{x(1 / k)}" x2="{x(1 / k)}" y1="8" y2="{height - 20}"/>'
        even += f'<text x="{x(1 / k)}" y="{height - 6}" text-anchor="middle">even: {100 / k:.1f}</text>'
        said = f"share of the decided verdicts by position, {k} options"
        svg = f'<svg viewBox="0 0 430 {height}" width="430" role="img" aria-label="{said}">{"".join(marks)}{even}</svg>'
        parts.append(f'<p class="quiet">{said}; intervals hold for all {k} together</p>{svg}')
    return "".join(parts)


def _pairs(report: Report) -> str:
    """The 2 x 2 table of pairs judged in both orders, "" where there are none."""
    first, second = verdicts(report.records)[0].T
    n = len(first)
    if not n:
        return ""

    def cell(said: str, mask: np.ndarray) -> str:
        return f"<td><b>{int(mask.sum())}</b> ({100 * mask.mean():.0f}%)<br>{said}</td>"

    # In the order A, B answer A stands first; in the order B, A it is answer B.
    decided = (first < TIE) & (second < TIE)
    failed = (first == FAILED) | (second == FAILED)
    head = '<th scope="col">B, A: the first wins</th><th scope="col">B, A: the second wins</th>'
    body = (
        f'<tr><th scope="row">A, B: the first wins</th>{cell("always the first", (first == 0) & (second == 1))}'
        f"{cell('consistently A', (first == 0) & (second == 0))}</tr>"
        f'<tr><th scope="row">A, B: the second wins</th>{cell("consistently B", (first == 1) & (second == 1))}'
        f"{cell('always the second', (first == 1) & (second == 0))}</tr>"
    )
    rest = f"{n} pairs; {int((~decided & ~failed).sum())} with a tie, {int(failed.sum())} with a failed verdict"
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    square = f'<table class="square"><caption>{rest}</caption>{head}<tbody>{body}</tbody></table>'
    return f'<section><h2>Pairs in both orders</h2><div class="scroll">{square}</div></section>'


# --------------------------------------------------------------------------------------------------------------------
# Debiasers


def _fitted(frame: pd.DataFrame) -> pd.Series:
    return frame.ps.notna() if "ps" in frame else pd.Series(False, index=frame.index)


def _debiasers(report: Report) -> str:
    """Six rows with a plot for the commonest number of options; everything else folded, with reasons."""
    whole = report.table if "K" in report.table else report.table.assign(K=int(report.records.options[0]))
    common = pd.Series(report.records.options).value_counts().index.tolist()
    own = whole[(whole.K == common[0]) & _fitted(whole)].set_index("debiaser")
    same = (debias.CYCLIC,) if common[0] == 2 else ()  # of two options the rotations are all orders
    names = [name for name in FIRST if name in own.index and name not in same][:6]
    parts = []
    if names:
        parts.append(_plotted(own.loc[names].sort_values("calls", kind="stable"), common[0]))
    for k in common[:3]:  # of more, the file would grow without end: --csv has them
        frame = whole[whole.K == k]
        shown = evaluate.in_points(frame)
        lines = [
            [row.debiaser, f"{row.calls:g}", *(values[i] for values in shown.values()), row.note]
            for i, row in enumerate(frame.itertuples())
        ]
        left = int((~_fitted(frame)).sum())
        said = f"All {len(frame)} debiasers and every metric, K = {k}" + (
            f"; {left} not on these records, and why" if left else ""
        )
        inner = table(["debiaser", "calls", *shown, "note"], lines)
        parts.append(f'<details class="folded"><summary>{escape(said)}</summary>{inner}</details>')
    return "".join(parts)


def _plotted(own: pd.DataFrame, k: int) -> str:
    """Rows of debiasers: calls, accuracy (or, without gold answers, ps) as a dot with its interval, gain and ps."""
    name = "accuracy" if "accuracy" in own and own.accuracy.notna().all() else "ps"
    title, columns = evaluate.METRICS[name].title, [name, f"{name}_low", f"{name}_high"]
    low, high = float(np.nanmin(own[columns])), float(np.nanmax(own[columns]))
    wide = max(high - low, 0.02)

    def x(value: float) -> float:
        return 8 + 204 * (value - low) / wide

    lines, start = [], x(own[name].iloc[0])
    for row in own.itertuples():
        value, *reach = (getattr(row, column) for column in columns)
        marks = f'<line class="even" x1="{start:.1f}" x2="{start:.1f}" y1="0" y2="22"/>'
        marks += _reach(x(reach[0]), x(reach[1]), x(value), 11)
        svg = f'<svg viewBox="0 0 220 22" width="220" height="22" aria-hidden="true">{marks}</svg>'
        cells = [escape(str(row.Index)), f"{row.calls:g}"]
        if name == "accuracy":
            gain = [getattr(row, f"gain{end}", np.nan) for end in ("", "_low", "_high")]
            cells += [_value([value, *reach]), svg, _value(gain)]
        ps = _value([row.ps, row.ps_low, row.ps_high])
        lines.append([*cells, ps] if name == "accuracy" else [*cells, ps, svg])
    plot = f"{title}, from {100 * low:.0f} to {100 * high:.0f}"
    head = ["accuracy", plot, "gain over biased", "ps (TV)"] if name == "accuracy" else ["ps (TV)", plot]
    some = f"{int(own.n.max())} items" if name == "accuracy" else ""
    note = next((row.note for row in own.itertuples() if row.note), "")
    said = "; ".join(
        filter(None, [f"K = {k}, {some}".strip(", "), note, "calls: of the model, for one item; dashed: biased"])
    )
    return table(["debiaser", "calls", *head], lines, said, plain=False)


# --------------------------------------------------------------------------------------------------------------------
# Items, measures, provenance


def texts_of(paths: Iterable[str | Path], ids: set[str]) -> dict[str, Shown]:
    """{id: what the files say of it} in the fields context, question and options, of records or questions."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        for _, row in rows(path, Problems(Path(path))):
            if isinstance(row, Mapping) and (name := str(row.get("id"))) in ids:
                own = {field: row[field] for field in ("context", "question") if isinstance(row.get(field), str)}
                options = row.get("options")
                if isinstance(options, list) and all(isinstance(text, str) for text in options):
                    own["texts"] = options
                found.setdefault(name, {}).update(own)
    return {name: Shown(name, **own) for name, own in found.items()}


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} .."


def _cut(shown: Shown, k: int) -> Shown:
    """Without what is too long to show, or not of ``k`` options."""
    options = [_short(text) for text in shown.texts] if len(shown.texts) == k else []
    return Shown(_short(shown.id), _short(shown.question), options, _short(shown.context))


def _items(report: Report, sources: Sequence[str | Path]) -> tuple[dict[str, Any], str]:
    """The most sensitive items as the grid's data, as many as fit, and a line about them."""
    records, ps = report.records, report.tally.ps
    some = [int(i) for i in np.argsort(np.where(np.isnan(ps), -1, -ps), kind="stable") if ps[i] == ps[i]][:ITEMS]
    told = texts_of(sources, {records.ids[i] for i in some})
    blocks = {}
    chosen = np.isin(records.item, some)
    places = np.unique(records.item[chosen])  # where() numbers its items anew
    for block in records.where(chosen).blocks() if some else ():
        for row, item in enumerate(places[block.items].tolist()):
            blocks[item] = type(block)(*(values[row : row + 1] for values in vars(block).values()))
    cells, left = Cells(), BYTES
    for item in some:
        one, name = Cells(), records.ids[item]
        about = _cut(told.get(name, Shown(name)), int(records.options[item]))
        one.add(blocks[item], [about])
        left -= len(embedded([one.sets, one.items]).encode())
        if left < 0:
            break
        cells.add(blocks[item], [about])
        cells.items[-1]["ps"] = float(ps[item])  # over different orders alone
    n = len(cells.items)
    of = f"{n} of {len(records.ids)} items, by permutation sensitivity." if n else "No item has verdicts in two orders."
    return {"labels": list(LETTERS), "sets": cells.sets, "items": cells.items}, of


def _measures(report: Report) -> str:
    """Every measure of the records, and of the biased judge, with what it means."""
    lines = [[line.name, str(line).split("   ")[0]] for line in report.lines]
    if report.gain.value == report.gain.value:
        lines.append(["gain of the mean over orders", percent(report.gain)])
    lines += [[name, percent(mean_of(values)[0])] for name, values in rates(report.records).items()]
    biased = report.table[(report.table.debiaser == debias.BIASED) & _fitted(report.table)]
    known = {name for name, _ in lines}
    for title, values in evaluate.in_points(biased).items():
        if title not in known:
            ks = biased.K.tolist() if "K" in biased and len(biased) > 1 else [""] * len(biased)
            lines.append(
                [
                    title,
                    "; ".join(f"{value} (K = {k})" if k else value for value, k in zip(values, ks, strict=True) if value),
                ]
            )
    body = [
        [escape(name), f'<span class="value">{escape(value)}</span>', escape(DEFINITIONS.get(name, ""))]
        for name, value in lines
    ]
    said = "In points of 100 unless nats, a variance or Cramer's V; in brackets 95% intervals over items."
    return (
        table(["measure", "value", "what it is"], body, said, plain=False)
        + f'<p class="quiet">The light. {escape(RULE)}</p>'
    )


def _provenance(sources: Sequence[str | Path], command: str) -> str:
    try:
        own = version("permdistill")
    except PackageNotFoundError:  # a checkout that is not installed
        own = "not installed"
    lines = [("permdistill", own), ("date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"))]
    lines += [("command", command)] if command else []
    lines += [(Path(path).name, f"sha256 {sha256_of(Path(path))}") for path in sources]
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>' for name, value in lines)}</dl>"


def document(report: Report, sources: Sequence[str | Path] = (), command: str = "") -> str:
    """The report as a page of HTML that loads nothing, under 500 kB whatever the number of items.

    sources  the files that it comes from: their hashes are shown, and the texts of items that they hold
    command  what was run
    """
    data, chosen = _items(report, sources)
    named = f"Does the order decide? {', '.join(Path(path).name for path in sources[:1])}".strip()
    return filled(
        "report.html",
        title=escape(named),
        header=escape(report.header),
        light=escape(light(report)),
        verdict=escape(report.verdict),
        hints="".join(f'<p class="quiet">{escape(hint)}</p>' for hint in report.hints),
        positions=_positions(report),
        pairs=_pairs(report),
        debiasers=_debiasers(report),
        chosen=escape(chosen),
        measures=_measures(report),
        provenance=_provenance(sources, command),
        data=embedded(data),
    )
