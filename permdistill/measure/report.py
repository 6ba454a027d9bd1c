"""What records say about a judge: which way it leans, how often the order decides, how often it is right; a gate for CI.

All of it for whatever orders there are, items with few or many options together; shares carry 95% intervals over items. A
verdict comes first, then six measures, then (``--all``) the others, each position, each debiaser and metric.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from permdistill import catalogue, debias
from permdistill.measure import calibration, evaluate
from permdistill.measure.formats import read
from permdistill.measure.metrics import Interval
from permdistill.measure.pairs import rates
from permdistill.measure.records import Block, Records, with_answers
from permdistill.measure.tally import RESAMPLED, Tally, mean_of, share_of
from permdistill.orders import LETTERS
from permdistill.prompts import LOW_MASS
from permdistill.questions import Question

MEAN, REPEATS = "accuracy of the mean over orders", "repeats that differ"
SHARPENED = "all-orders average, sharpened"
RANKED = 1_000  # systems that are ranked at most: it takes their square in memory
HEADLINE = ("first position", "flip rate", "consistency", "ps (TV)", "accuracy", MEAN, REPEATS)


@dataclass(frozen=True)
class Gate:
    """What a judge must keep to; None: anything.

    flip_rate            largest share of the other orders in which the verdict may change
    position_preference  how far a position's share of the decided verdicts may lie from even
    """

    flip_rate: float | None = None
    position_preference: float | None = None


def percent(interval: Iterable[float], unit: str = "", sign: str = "") -> str:
    """In points, "64.0 [54.7, 73.3]"; without an interval where there is none, "" without a value."""
    value, low, high = interval
    text = f"{100 * value:{sign}z.1f}{unit}" if value == value else ""
    return text if low != low else f"{text} [{100 * low:{sign}z.1f}, {100 * high:{sign}z.1f}]"


def _columns(name: str, interval: Interval) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), interval, strict=True))


@dataclass(frozen=True)
class Line:
    """One measure. ``even``: what it is without a preference for positions; ``n`` items."""

    name: str
    interval: Interval
    n: int
    even: float | None = None
    note: str = ""

    def __str__(self) -> str:
        text = percent(self.interval)
        if self.even is not None:
            text += f", {100 * (self.interval.value - self.even):+z.1f} over even"
        return text + (f"   {self.note}" if self.note else "")


# --------------------------------------------------------------------------------------------------------------------
# The report


@dataclass
class Report:
    """What :func:`measure` found. ``str`` is for a terminal, :meth:`table` for a CSV file.

    dropped  incomplete items that were left out
    """

    records: Records
    gate: Gate = field(default_factory=Gate)
    dropped: int = 0

    @cached_property
    def tally(self) -> Tally:
        return Tally(self.records)

    @cached_property
    def lines(self) -> list[Line]:
        """The measures that these records allow."""
        t, lines, records = self.tally, [], self.records
        labelled = records.answers >= 0

        def add(name: str, found: tuple[Interval, int], even: float | None = None, note: str = "") -> None:
            lines.append(Line(name, *found, even, note))

        if labelled.any():
            add("accuracy", share_of(t.right[labelled], t.n[labelled]), note="a tie shares, a failure has none")
            if (t.orders > 1).any():
                add(MEAN, mean_of(np.where(labelled & (t.n > t.failed), t.averaged, np.nan)))
        if t.decided.any():
            add("first position", *self._first())
        if (~np.isnan(t.ps)).any():
            add("flip rate", mean_of(t.flips), note="of the other orders decide otherwise than the first")
            add("consistency", mean_of(t.consistency), note="of the pairs of orders decide for the same option")
            add("verdict agreement", mean_of(t.agreement), note="the same, a tie being a verdict of its own")
            add("ps (TV)", mean_of(t.ps, counts=False))
        if (~np.isnan(t.repeats)).any():
            add(REPEATS, mean_of(t.repeats), note="of the pairs of calls in one order: noise, not the order")
        add("tied", share_of(t.tied, t.n))
        add("failed", share_of(t.failed, t.n))
        mass = ~np.isnan(records.mass)
        if mass.any():
            of = np.bincount(records.item, mass, minlength=len(t.n))
            got = np.bincount(records.item, np.where(mass, records.mass, 0.0), minlength=len(t.n))
            share, note = got.sum() / of.sum(), ""
            if share < LOW_MASS:
                note = "the judge wants to say something else: score with another template, --template-args or --variants"
            elif share < 0.95:
                note = "the rest went to other tokens and is shared out"
            add("label mass", share_of(got, of, counts=False), note=note)
        return lines

    def _first(self) -> tuple[tuple[Interval, int], float, str]:
        """The first position's share of the decided records, what is even, and a warning where orders are not balanced."""
        t, wins, even = self.tally, np.zeros(len(self.records.ids)), np.zeros(len(self.records.ids))
        for k, (at, own) in t.wins.items():
            wins[at], even[at] = own[:, 0], t.decided[at] / k
        odd = int((~t.balanced).sum())
        note = f"{odd} item{'s' * (odd != 1)} not in balanced orders: content counts too" if odd else ""
        return share_of(wins, t.decided), float(even.sum() / t.decided.sum()), note

    @cached_property
    def positions(self) -> pd.DataFrame:
        """Each position of each K: its share of the decided records, the preference for it (share less an even one), and the
        recall of gold answers that stand there."""
        rows = []
        for k, (at, wins) in sorted(self.tally.wins.items()):
            of = self.tally.decided[at]
            for position in range(k):
                row: dict[str, float | int | str] = {"K": k, "position": position, "label": LETTERS[position], "even": 1 / k}
                if of.any():
                    level = 1 - 0.05 / k if k > 2 else 0.95  # so that all K hold together; of 2, one says what the other is
                    share = share_of(wins[:, position], of, level)[0]
                    row |= _columns("share", share) | _columns("preference", Interval(*(v - 1 / k for v in share)))
                gold = self.tally.gold[k][:, position]
                if gold.any():
                    found = share_of(self.tally.recalled[k][:, position], gold)[0]
                    row |= _columns("recall", found)
                rows.append(row)
        return pd.DataFrame(rows)

    @property
    def leaning(self) -> pd.Series | None:
        """The position whose share lies furthest from even, None where nothing is decided."""
        frame = self.positions
        if "share" not in frame or frame.share.isna().all():
            return None
        return frame.loc[(frame.share - frame.even).abs().round(9).idxmax()]  # of two equally far ones the first

    @cached_property
    def gain(self) -> Interval:
        """What averaging adds to the accuracy of the verdicts averaged, paired; NaN where no item allows it."""
        t = self.tally
        some = (self.records.answers >= 0) & (t.orders > 1)
        return (
            mean_of(t.averaged[some] - t.right[some] / (t.n - t.failed)[some], counts=False)[0]
            if some.any()
            else Interval(*[np.nan] * 3)
        )

    @property
    def verdict(self) -> str:
        """Which way the judge leans, how often the order decides, and what averaging gains."""
        return " ".join(self.sentences)

    @property
    def sentences(self) -> list[str]:
        """Those of the verdict."""
        parts, lean = [], self.leaning
        if lean is None:
            parts.append("No verdict is decided.")
        else:
            where = {0: "the first answer", lean.K - 1: "the last answer"}.get(lean.position, f"position {lean.label}")
            share = percent((lean.share, lean.share_low, lean.share_high), "%")
            what = "pairs" if lean.K == 2 else f"questions with {lean.K:.0f} options"
            wins = f"wins {share} of decided {what}, {100 * (lean.share - lean.even):+z.1f} over even."
            up, down = lean.share_low > lean.even, lean.share_high < lean.even
            if not (up or down):
                parts.append(f"No clear preference for a position: {where} {wins}")
            elif self.tally.balanced.mean() > 0.8:
                parts.append(f"This judge {'prefers' if up else 'avoids'} {where}, which {wins}")
            else:  # what stands there more often may be better
                parts.append(f"This judge decides {'often' if up else 'seldom'} for {where}, which {wins}")
        flips = next((line for line in self.lines if line.name == "flip rate"), None)
        if flips is not None:
            parts.append(f"Another order changes the verdict in {percent(flips.interval, '%')} of cases.")
        if (gain := self.gain).value == gain.value:
            does = "gains" if gain.low > 0 else "changes accuracy by"
            left = " (failed verdicts left out)" if self.tally.failed.any() else ""
            parts.append(f"Averaging the orders {does} {percent(gain, ' points')}{left}.")
        return parts

    @property
    def header(self) -> str:
        """What was read, in a line."""
        r, t = self.records, self.tally
        ks, counts = sorted(set(r.options.tolist())), np.bincount(r.item[~r.repeated])
        orders = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        again = f" ({int(r.repeated.sum())} repeat an order)" if r.repeated.any() else ""
        left = f"; {self.dropped} incomplete item{'s' * (self.dropped != 1)} left out" if self.dropped else ""
        if n := int(r.incomplete.sum()):
            left = f"; {n} item{'s' * (n != 1)} incomplete (--complete leaves them out)"
        some = f"{int(t.decided.sum())} decided, {int(t.tied.sum())} tied, {int(t.failed.sum())} failed"
        return (
            f"{len(r.ids)} items, K = {', '.join(map(str, ks))}, {orders} orders; {len(r.k)} records{again}: {some}{left}; "
            "95% intervals over items"
        )

    @property
    def hints(self) -> list[str]:
        """What to add for measures that these records do not allow."""
        found = []
        if not (self.records.answers >= 0).any():
            found.append("no gold answers: --questions FILE (id, answer) adds how often the judge is right")
        if not (self.tally.orders > 1).any():
            found.append(
                "no item has verdicts in two orders: ask in a second order (the reverse) to see what the order changes"
            )
        found += [f"label mass {line}" for line in self.lines if line.name == "label mass" and line.note]
        return found

    def __str__(self) -> str:
        rows = self._rows(headline=True)
        return "\n".join([*self.sentences, "", self.header, "", *rows, *([""] + self.hints if self.hints else [])])

    def _rows(self, headline: bool) -> list[str]:
        width = max(len(line.name) for line in self.lines)
        return [f"{line.name:<{width}}  {line}" for line in self.lines if (line.name in HEADLINE) == headline]

    @property
    def rejected(self) -> list[str]:
        """Thresholds of the gate whose whole interval lies beyond them, or that have no interval to compare with. Raises
        ValueError where one cannot be measured."""
        found = []
        if self.gate.flip_rate is not None:
            flips = next((line.interval for line in self.lines if line.name == "flip rate"), None)
            if flips is None:
                raise ValueError("--max-flip-rate: no item has verdicts in two orders, give records of a second order")
            if not flips.low <= self.gate.flip_rate:  # of one item it is NaN: that is no proof
                found.append(f"flip rate {percent(flips)}: {_beyond(flips, 'above', self.gate.flip_rate)}")
        if (limit := self.gate.position_preference) is not None:
            frame = self.positions
            if "share" not in frame:
                raise ValueError("--max-position-preference: no record is decided")
            over, under = frame.share_low - frame.even, frame.even - frame.share_high
            for row, far in zip(frame.itertuples(), np.maximum(over, under), strict=True):
                if not far <= limit:
                    share = Interval(row.share, row.share_low, row.share_high)
                    text = (
                        f"position {row.label} of {row.K} wins {percent(share) or 'nothing'}, even is {100 * row.even:.1f}: "
                    )
                    found.append(text + _beyond(share, "further off than", limit))
        return found

    # ----------------------------------------------------------------------------------------------------------------
    # Everything

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row a debiaser and K, with every metric: plain numbers, intervals in ``.._low`` and ``.._high``. A debiaser that
        these records do not allow says why in ``note``. The biased judge's row holds the measures of :attr:`lines` too."""
        parts = []
        for k in sorted(set(self.records.options.tolist())):
            parts.append(_debiased(self.records, k))
        frame = pd.concat(parts, ignore_index=True)
        if len(parts) == 1:
            frame = frame.drop(columns="K")
        for line in self.lines:
            name = line.name.replace(" ", "_").replace("_(TV)", "")
            if name in frame:  # measured by the table itself, on items in the same orders
                continue
            own = frame.debiaser == debias.BIASED
            for suffix, value in zip(("", "_low", "_high"), line.interval, strict=True):
                frame.loc[own, name + suffix] = value
        return frame

    def everything(self) -> str:
        """What ``--all`` adds: the other measures, positions, and every debiaser and metric."""
        positions = self.positions.copy()
        for name, sign in (("share", ""), ("preference", "+"), ("recall", "")):
            if name in positions:
                low, high = positions.pop(f"{name}_low"), positions.pop(f"{name}_high")
                positions[name] = [percent(t, sign=sign) for t in zip(positions[name], low, high, strict=True)]
        positions["even"] = [f"{100 * even:.1f}" for even in positions.even]
        parts = ["\n".join(self._rows(headline=False)), f"by position\n{positions.to_string(index=False)}"]
        if pairs := rates(self.records):
            width = max(map(len, pairs))
            lines = [f"{name:<{width}}  {Line('', *mean_of(values))}" for name, values in pairs.items()]
            parts.append("\n".join(["pairs in both orders, as the benchmarks count them", *lines]))
        parts += [text for k in sorted(set(self.records.options.tolist())) if (text := _sure(self.records, k))]
        if (ranked := ranking(self.records)) is not None:
            parts.append(f"systems, ranked from their pairs\n{ranked.to_string(index=False, float_format='{:.2f}'.format)}")
            if len(ranked) > 2 and "gold" in ranked:
                found = calibration.rank_correlation(ranked["Bradley-Terry"].to_numpy(), ranked["gold"].to_numpy())
                parts[-1] += f"\nrank correlation with gold: Spearman {found.spearman:.2f}, Kendall {found.kendall:.2f}"
        elif (n := len({name for own in self.records.systems.values() for name in own})) > RANKED:
            parts.append(f"systems: {n:,} names, which are too many to rank (at most {RANKED:,})")
        return "\n\n".join([*parts, _long(self.table)])


def _beyond(interval: Interval, words: str, limit: float) -> str:
    return f"{words} {100 * limit:g}" if interval.low == interval.low else "too few items for an interval"


def _alike(records: Records, k: int) -> Block | None:
    """The items of ``k`` options that come in the same orders as most do, without failed verdicts, each order once; None
    without any."""
    best, n = None, 0
    own = (records.options == k) & (np.bincount(records.item, records.failed, minlength=len(records.ids)) == 0)
    for block in records.where(own[records.item] & ~records.repeated).blocks() if own.any() else ():
        keys, group, sizes = np.unique(
            block.orders.reshape(len(block.orders), -1), axis=0, return_inverse=True, return_counts=True
        )
        if sizes.max() > n:
            n, chosen = int(sizes.max()), group.reshape(-1) == sizes.argmax()
            best = Block(block.items[chosen], block.orders[chosen], block.P[chosen], block.answers[chosen])
    return best


COVERAGES = (1.0, 0.8, 0.6, 0.4, 0.2)
ERROR = 0.1  # that is guaranteed, with 95% confidence


def _sure(records: Records, k: int) -> str:
    """What answering only the surest questions brings, and how many can be answered at a guaranteed error: one threshold is
    fitted on every other item, and tried on the rest. "" without gold answers or probabilities."""
    block = None if records.hard.all() else _alike(records, k)
    if block is None or (block.answers >= 0).sum() < 2:
        return ""
    P, gold = block.P[block.answers >= 0], block.answers[block.answers >= 0]
    answers = {"first order": P[:, 0], "mean over orders": P.mean(axis=1)} if P.shape[1] > 1 else {"first order": P[:, 0]}
    head = "  ".join(f"{100 * coverage:3.0f}%" for coverage in COVERAGES)
    lines = [f"accuracy where only the surest questions are answered, K = {k}, and at most {100 * ERROR:.0f}% errors"]
    lines.append(f"{'':<16}  {head}")
    for name, Q in answers.items():
        accuracies = [100 * calibration.selective_accuracy(Q, gold, coverage) for coverage in COVERAGES]
        least = calibration.guaranteed_threshold(Q[::2], gold[::2], ERROR)
        text = "no threshold guarantees it"
        if least is not None:
            chosen = Q[1::2].max(axis=1) >= least
            wrong = 1 - evaluate.metrics.accuracy(Q[1::2][chosen][:, None], gold[1::2][chosen]).mean() if chosen.any() else 0
            text = f"from {least:.2f} on: {100 * chosen.mean():.1f}% answered, {100 * wrong:.1f}% of them wrong"
        lines.append(f"{name:<16}  {'  '.join(f'{value:4.1f}' for value in accuracies)}   {text}")
    return "\n".join(lines)


def ranking(records: Records) -> pd.DataFrame | None:
    """Systems ranked from the pairs in which they were compared, the mean over a pair's orders counting as the share of a
    win: strengths by Bradley-Terry and by the product of experts, and by Bradley-Terry from gold answers where all have one.
    None where no pair names its systems, or they name more than :data:`RANKED`."""
    if not records.systems or records.failed.all():
        return None
    pairs, wins, gold, verdicts = [], [], [], records.where(~records.failed)
    for block in verdicts.blocks():
        for item, P, answer in zip(block.items.tolist(), block.P, block.answers.tolist(), strict=True):
            if item in verdicts.systems and P.shape[1] == 2:
                pairs.append(verdicts.systems[item])
                wins.append(float(P[:, 0].mean()))
                gold.append(answer)
    if not pairs:
        return None
    systems = sorted({name for pair in pairs for name in pair})
    if len(systems) > RANKED:
        return None
    numbers = {name: number for number, name in enumerate(systems)}
    places = np.array([[numbers[name] for name in pair] for pair in pairs])
    share, n = np.array(wins), len(systems)
    won = np.bincount(places[:, 0], share, n) + np.bincount(places[:, 1], 1 - share, n)
    frame = pd.DataFrame({"system": systems, "pairs": np.bincount(places.ravel(), minlength=n), "won": won})
    frame["Bradley-Terry"] = calibration.bradley_terry(places, share, n)
    frame["product of experts"] = calibration.product_of_experts(places, share, n)
    if min(gold) >= 0:
        frame["gold"] = calibration.bradley_terry(places, 1.0 - np.array(gold), n)
    return frame.sort_values("Bradley-Terry", ascending=False, ignore_index=True)


def _debiased(records: Records, k: int) -> pd.DataFrame:
    """Every debiaser on the items of ``k`` options that come in the same orders as most do, without failed verdicts."""
    best, of_k = _alike(records, k), int((records.options == k).sum())
    n, soft = 0 if best is None else len(best.items), not records.hard.all()
    rows, methods = [], catalogue.debiasers(k)
    again = "each order's first call alone" if records.repeated.any() else ""
    if soft:
        methods.append(_sharpened(next(method for method in methods if method.name == debias.DEBIASED)))
    for method in methods:
        row = {"debiaser": method.name, "K": k, "calls": method.calls(k), "n": 0, "source": method.source, "note": again}
        if best is None or n < 2:
            row["note"] = "fewer than two items come in the same orders, all with verdicts"
        else:
            if n < of_k:
                some = f"on {n} of {of_k} items: those in the same orders, all with verdicts"
                row["note"] = "; ".join(filter(None, [some, again]))
            row |= _measured(method, best, soft)
        rows.append(row)
    return pd.DataFrame(rows)


def _sharpened(average: catalogue.Debiaser) -> catalogue.Debiaser:
    """The all-orders average, as sure as one order is: its decisions, with probabilities that can be trusted further."""

    def answer(P, orders, content_free, rng):
        return debias.broadcast(debias.sharpen(debias.permutation_average(P), calibration.fit_power(P)), len(orders))

    return replace(average, name=SHARPENED, source="power: Guo et al., ICML 2017; fitted without gold: here", answer=answer)


def _measured(method: catalogue.Debiaser, block: Block, soft: bool) -> dict[str, Any]:
    """The metrics of one debiaser, or a ``note`` that says why there are none. ``soft``: of probabilities, not decisions."""
    orders, answers = block.orders[0], block.answers
    if not method.fits(orders):
        return {"note": "needs other orders: all K!, or with each order its rotations or its reverse"}
    try:
        P = method.answer(block.P, orders, None, np.random.default_rng(0))
        before = method.answer(block.P, orders, None, np.random.default_rng(0)) if method.name == debias.BIASED else block.P
        questions = [Question(str(i), "", "", (), None if a < 0 else int(a)) for i, a in enumerate(answers)]
        groups = [int(i) % RESAMPLED for i in range(len(questions))]
        baseline = None if method.name == debias.BIASED else evaluate.correct(before, questions)
        names = list(evaluate.EVERY if soft else evaluate.METRICS)
        return dict(evaluate.measure(P, orders, questions, groups, baseline, names))
    except ValueError as error:
        return {"note": str(error)}


def _long(table: pd.DataFrame) -> str:
    """A metric after the other, a line a debiaser: what fits on a terminal. What could not be fitted stands last."""
    fitted = table[table.n.notna() & ~(table.drop(columns=["debiaser", "calls", "n", "source", "note"]).isna().all(axis=1))]
    shown = fitted.assign(**evaluate.in_points(fitted))
    keys = [c for c in ("debiaser", "K", "calls") if c in shown]
    columns = [metric.title for metric in evaluate.EVERY.values() if metric.title in shown]
    parts = [f"{c}\n" + shown[[*keys, c]].to_string(index=False, header=False) for c in columns]
    notes = [f"{row.debiaser}: {row.note}" for row in table.itertuples() if row.note]
    return "\n\n".join([*parts, *(["not fitted, or not on all items\n" + "\n".join(notes)] if notes else [])])


def measure(
    paths: str | Path | list[str],
    questions: str | Path | None = None,
    format: str | None = None,
    complete: bool = False,
    gate: Gate | None = None,
    columns: Mapping[str, str] | None = None,
) -> Report:
    """Read records and say what they show.

    paths      one file, or several (reruns in other orders)
    questions  file with gold answers, see :func:`permdistill.measure.records.with_answers`
    format     of :data:`permdistill.measure.formats.FORMATS`; None: as the content looks
    columns    {field: column} of ``questions``, see :mod:`permdistill.layouts`
    complete   leave out incomplete items, see :attr:`permdistill.measure.records.Records.incomplete`

    Raises BadRecords that names all bad records, and ValueError when nothing can be measured.
    """
    records = read(paths, format)
    if questions is not None:
        records = with_answers(records, questions, columns)
    dropped = int(records.incomplete.sum()) if complete else 0
    if dropped:
        records = records.where(~records.incomplete[records.item])
    if not len(records.ids) or records.failed.all():
        raise ValueError("no record has a verdict: give probabilities, log_probs or a decision for some of them")
    if len(records.ids) < 2 and len(records.k) < 2 and not (records.answers >= 0).any():
        raise ValueError("one record without a gold answer measures nothing: add items, its other orders, or --questions")
    return Report(records, gate or Gate(), dropped)
