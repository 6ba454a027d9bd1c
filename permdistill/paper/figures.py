"""The paper's figures, one function each: tables or scores -> a matplotlib Figure."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from permdistill import debias, fewcalls
from permdistill.files import replacing
from permdistill.measure import metrics
from permdistill.orders import to_positions
from permdistill.paper import tasks as registry
from permdistill.paper.experiments import Scored
from permdistill.paper.style import COLOURS, NAMES, NARROW, SHAPES, SMALL, WIDE, columns_style, logarithmic, write_names
from permdistill.paper.systems import BIASED as BIASED_TEACHER
from permdistill.paper.systems import (
    CORRECTION,
    DISTILLATION,
    TWO_ORDERS,
    UNTRAINED,
    WHITE_BOX,
    Description,
    described,
    head_title,
    title,
)
from permdistill.paper.tables import BIASED, DEBIASED


def _name(what: Description) -> str:
    """A system in few words, for a figure."""
    if what.kind != "student":
        orders = {debias.CYCLIC: f"{what.calls:g} orders", TWO_ORDERS: "2 orders", debias.DEBIASED: "all orders"}
        copies = f"copy{', greedy' if what.greedy else ''}"
        return orders.get(
            what.method, {BIASED_TEACHER: "biased", debias.PRIOR_MATCHING: "prior-matching"}.get(what.method, copies)
        )
    encoder = (what.encoder or "").replace("all-MiniLM-L6-v2", "MiniLM").replace("all-mpnet-base-v2", "mpnet")
    method = {DISTILLATION: "distilled", CORRECTION: "corrected", WHITE_BOX: "white-box"}.get(what.method, what.method)
    words = (encoder, (what.head or "").replace("_", "-"), f"{method}{' (greedy)' if what.greedy else ''}")
    return ", ".join(word for word in words if word)


def _label(task: str) -> str:
    return "all tasks" if task == "all" else registry.title(task).replace("all of", "all tasks of")


def _interval(ax: Axes, frame: pd.DataFrame, name: str, y: np.ndarray, **style: Any) -> None:
    """Points with 95% intervals, in points of 100, at heights y."""
    value, low, high = (100 * frame[c].to_numpy() for c in (name, f"{name}_low", f"{name}_high"))
    shown: dict[str, Any] = {"fmt": "o", "capsize": 1.5, "lw": 1, "ms": 3.5} | style
    ax.errorbar(value, y, xerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)], **shown)


def sensitivity_and_gain(table: pd.DataFrame) -> Figure:
    """T1 as a picture, a column a teacher. Above: permutation sensitivity by task. Below, where there are gold answers:
    accuracy, biased and debiased."""
    columns_style()
    teachers, tasks = list(dict.fromkeys(table.teacher)), list(dict.fromkeys(table.task))
    n_rows = 2 if "accuracy" in table else 1
    figure, axes = plt.subplots(
        n_rows,
        len(teachers),
        figsize=(WIDE, 1 + 0.16 * n_rows * len(tasks)),
        sharey=True,
        sharex="row",
        squeeze=False,
        layout="constrained",
    )
    y = np.arange(len(tasks))[::-1]
    for (above, *below), teacher in zip(axes.T, teachers, strict=True):
        by = table[table.teacher == teacher].set_index(["treatment", "task"])
        biased, debiased = (by.loc[treatment].reindex(tasks) for treatment in (BIASED, DEBIASED))
        _interval(above, biased, "ps", y, color=COLOURS["teacher"])
        above.set(title=teacher, xlabel="permutation sensitivity (TV x 100)")
        for ax in below:
            _interval(ax, biased, "accuracy", y + 0.15, color=COLOURS["teacher"], label="biased, mean over orders")
            style = {"color": COLOURS["debiased"], "fmt": SHAPES["debiased"], "label": "all-orders average"}
            _interval(ax, debiased, "accuracy", y - 0.15, **style)
            ax.set(xlabel="accuracy (%)")
    for ax in axes[:, 0]:
        ax.set_yticks(y, [_label(task) for task in tasks])
    axes[0, 0].set_xlim(0, None)  # after all are drawn: a limit stops the shared axis from growing
    if n_rows == 2:
        figure.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def one_question(scored: Scored) -> Figure:
    """F1: the question of a task whose answers depend most on the order, in all its orders (a row each; a dot marks the most
    probable answer).

    Left by label position: dark stripes are preferences for positions. In the middle the same numbers by option, which an
    unbiased teacher would give in all rows alike. Right their average, which no order changes.
    """
    columns_style()
    P, k = scored.P[int(np.argmax(metrics.permutation_sensitivity(scored.P)))], scored.task.k
    letters, options = [label.strip() for label in scored.task.template.labels[:k]], [str(i + 1) for i in range(k)]
    panels = (
        ("by position", "label", to_positions(P, scored.orders), letters),
        ("by option", "option", P, options),
        ("average over all orders", "option", P.mean(axis=0)[None], options),
    )
    figure, axes = plt.subplots(1, 3, figsize=(WIDE, 2.8), layout="constrained")
    for ax, (name, label, values, ticks) in zip(axes, panels, strict=True):
        extent = (-0.5, k - 0.5, len(P) - 0.5, -0.5)
        image = ax.imshow(100 * values, cmap="Blues", vmin=0, vmax=100, aspect="auto", extent=extent)
        if len(values) > 1:
            ax.plot(values.argmax(axis=1), np.arange(len(values)), "o", color="white", ms=2.5)
        else:
            for place, share in enumerate(values[0]):
                style = {"ha": "center", "va": "center", "color": "white" if share > 0.5 else "black"}
                ax.text(place, len(P) / 2 - 0.5, f"{share:.0%}", **style)
        ax.set_xticks(range(k), ticks)
        ax.set(title=name, xlabel=label, yticks=[])
        ax.grid(visible=False)
    axes[0].set_ylabel(f"{len(P)} orders of one question")
    figure.colorbar(image, ax=axes, label="probability (%)")
    return figure


def preferred_positions(scored: Sequence[Scored]) -> Figure:
    """Probability of each label position over all items and orders; an unbiased teacher gives 1/K to each (dashed)."""
    columns_style()
    rows = [
        {"teacher": s.teacher, "task": s.task.name, "position": label.strip(), "share": 100 * share}
        for s in scored
        for label, share in zip(s.task.template.labels, metrics.position_marginals(s.P, s.orders).mean(axis=0), strict=False)
    ]
    frame = pd.DataFrame(rows)
    tasks = list(dict.fromkeys(frame.task))
    columns = min(4, len(tasks))
    size = (WIDE, 1.35 * -(-len(tasks) // columns) + 0.4)
    figure, axes = plt.subplots(-(-len(tasks) // columns), columns, figsize=size, squeeze=False, layout="constrained")
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, tasks, strict=False):
        part = frame[frame.task == task]
        sns.barplot(part, x="position", y="share", hue="teacher", ax=ax, legend=ax is axes.flat[0])
        ax.axhline(100 / part.position.nunique(), color="black", lw=1, ls="--")
        ax.set(title=_label(task), xlabel="", ylabel="share (%)" if ax in axes[:, 0] else "")
    legend = axes.flat[0].get_legend()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    legend.remove()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


LINES = (debias.RANDOM_FAMILY, debias.BLACK_BOX_FAMILY)
FAMILIES = {  # of debiasers: in few words, and a shape for each kind
    debias.RANDOM_FAMILY: ("random orders", "v"),
    debias.BLACK_BOX_FAMILY: ("sampled decisions", "x"),
    debias.BIASED: ("biased", "o"),
    debias.PRIOR_MATCHING: ("prior-matching", "D"),
    fewcalls.BATCH_CALIBRATION: ("batch calibration", "D"),
    debias.CALIBRATION: ("contextual calibration", "D"),
    debias.PRIDE: ("PriDe", "D"),
    fewcalls.REVERSE_PAIR: ("reverse pair", "^"),
    debias.CYCLIC: ("cyclic", "^"),
    fewcalls.WILLIAMS: ("Williams", "^"),
    fewcalls.ADAPTIVE_FAMILY: ("adaptive", "P"),
    debias.DEBIASED: ("all orders", "s"),
    fewcalls.GEOMETRIC: ("geometric mean", "s"),
    debias.MAJORITY: ("majority vote", "s"),
    debias.CONTEXT_PRIOR_MATCHING: ("context prior-m.", "s"),
}


def cost_and_accuracy(table: pd.DataFrame, kinds: dict[str, Sequence[str]]) -> Figure:
    """D1: every debiaser, teacher calls a question against accuracy (above) and permutation sensitivity (below). Lines are
    what more of the same buys: random orders, and sampled decisions; all others stand by their names.

    table  :func:`permdistill.paper.tables.debiasers` of one teacher
    kinds  {title: tasks}: the kind with most tasks is drawn, the mean over its tasks with the interval of that mean, the
           tasks' own intervals taken as independent
    """
    columns_style()
    kind, tasks = max(kinds.items(), key=lambda item: len(item[1]))
    part = table[table.task.isin(list(tasks))]
    groups = [own for _, own in part.groupby("debiaser", sort=False)]
    families, calls = np.array([own.family.iloc[0] for own in groups]), np.array([own.calls.iloc[0] for own in groups])
    single = [i for i, family in enumerate(families) if family not in LINES]
    several = [f", {calls[i]:.2g} calls" if (families == families[i]).sum() > 1 else "" for i in single]
    names = [FAMILIES[families[i]][0] + more for i, more in zip(single, several, strict=True)]
    figure, axes = plt.subplots(2, 1, figsize=(WIDE, 5.2), sharex=True, layout="constrained")
    axes[0].set(title=f"{kind}: mean over {len(tasks)} tasks", ylabel="accuracy (%)", xlim=(0.6, 1.6 * calls.max()))
    axes[1].set(xlabel="teacher calls a question", ylabel="ps (TV x 100)")
    heights = []
    for ax, metric in zip(axes, ("accuracy", "ps"), strict=True):
        y = 100 * np.array([own[metric].mean() for own in groups])
        half = 100 * np.array([_half(own, metric) for own in groups])
        for family, colour in zip(LINES, ("0.35", COLOURS["copy"]), strict=True):
            called, shape = FAMILIES[family]
            at = np.flatnonzero(families == family)
            at = at[np.argsort(calls[at])]
            ax.errorbar(calls[at], y[at], half[at], fmt=f"{shape}-", ms=4, lw=1, capsize=1.5, color=colour, label=called)
        for i in single:
            style = {
                "fmt": FAMILIES[families[i]][1],
                "color": COLOURS["teacher" if families[i] == debias.BIASED else "debiased"],
            }
            ax.errorbar(calls[i], y[i], half[i], ms=4, lw=0.8, capsize=1.5, **style)
        logarithmic(ax)
        heights.append(y[single])
    axes[1].set_ylim(-1.5, None)
    axes[0].legend(loc="lower right")
    for ax, y in zip(axes, heights, strict=True):
        write_names(ax, calls[single], y, names)
    return figure


def _half(group: pd.DataFrame, name: str) -> float:
    halves = (group[f"{name}_high"] - group[f"{name}_low"]) / 2
    return float(np.sqrt((halves**2).sum()) / len(group))


def students(table: pd.DataFrame) -> Figure:
    """T2 or T3 as a picture: accuracy of every system on every task, the biased teacher's as a line."""
    columns_style()
    table = table.assign(system=[_name(what) if what.kind == "student" else title(what) for what in described(table)])
    tasks, systems = list(dict.fromkeys(table.task)), list(dict.fromkeys(table.system))
    y = np.arange(len(systems))[::-1]
    figure, axes = plt.subplots(
        1,
        len(tasks),
        figsize=(WIDE, 0.7 + 0.18 * len(systems)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        part = table[table.task == task].set_index("system").reindex(systems)
        for kind, colour in COLOURS.items():
            mine = (part.kind == kind).to_numpy()
            if mine.any():
                _interval(ax, part[mine], "accuracy", y[mine], color=colour, fmt=SHAPES[kind])
        ax.axvline(100 * part.accuracy.iloc[0], color=COLOURS["teacher"], lw=1, ls="--")
        ax.set(title=_label(task).replace(" ", "\n", 1), xlabel="accuracy (%)", ylim=(-0.7, len(systems) - 0.3))
    axes[0, 0].set_yticks(y, systems)
    return figure


def sensitivity_against_accuracy(systems: pd.DataFrame) -> Figure:
    """F5: every system over all tasks of a table, permutation sensitivity against accuracy with 95% intervals. Up and to the
    left is better.

    ``systems`` has the columns of the students' tables; of several together, "all" is called "all of <table>".
    """
    columns_style()
    wholes = [task for task in dict.fromkeys(systems.task) if str(task).startswith("all")]
    size = (WIDE if len(wholes) > 1 else NARROW, 3.4)
    figure, axes = plt.subplots(1, len(wholes), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    heads = {"joint": "s", "per_option": "^", "shared_prefix": "v", "cross_option": "P", "bi_encoder": "D"}
    for ax, task in zip(axes[0], wholes, strict=True):
        part = systems[systems.task == task]
        for row in part.to_dict("records"):
            x, y = 100 * row["ps"], 100 * row["accuracy"]
            halves = [(100 * row[f"{n}_low"], 100 * row[f"{n}_high"]) for n in ("accuracy", "ps")]
            spread = [np.maximum([[v - low], [high - v]], 0) for v, (low, high) in zip((y, x), halves, strict=True)]
            style = {"fmt": heads.get(row["head"], SHAPES[row["kind"]]), "ms": 4, "lw": 0.8, "capsize": 1.5}
            ax.errorbar(x, y, *spread, color=COLOURS[row["kind"]], **style)
        parts = {"all of T2": "multiple choice (T2)", "all of T3": "SummEval (T3)"}
        ax.set(title=parts.get(task, _label(task)), xlabel="ps (TV x 100)", xlim=(-4, None))
    axes[0, 0].set_ylabel("accuracy (%)")
    for ax, task in zip(axes[0], wholes, strict=True):
        part = systems[systems.task == task]
        names = [_name(what).removeprefix("MiniLM, ") for what in described(part)]
        write_names(ax, 100 * part.ps, 100 * part.accuracy, names)
    return figure


def scoring_time(table: pd.DataFrame) -> Figure:
    """P1: time a question of every way to score all orders, in units of the trie's, log scale; a panel a workload, a point a
    model, with the smallest and largest value over the rounds.

    ``table`` is :func:`permdistill.paper.bench.table`'s.
    """
    columns_style()
    models, workloads, arms = (list(dict.fromkeys(table[name])) for name in ("model", "workload", "arm"))
    rows = -(-len(workloads) // 4)
    columns = -(-len(workloads) // rows)
    size = (WIDE, 0.9 + rows * (0.3 + 0.13 * len(arms) * len(models)))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained")
    places = dict(zip(arms, np.arange(len(arms))[::-1], strict=True))
    styles = list(zip(("debiased", "teacher", "student", "copy"), ("s", "o", "^", "X"), strict=True))
    for ax, workload in zip(axes.flat, workloads, strict=False):
        for number, model in enumerate(models):
            part, (colour, shape) = table[(table.model == model) & (table.workload == workload)], styles[number % 4]
            y = np.array([places[arm] for arm in part.arm]) - 0.8 * ((number + 0.5) / len(models) - 0.5)
            spread = [part.ratio - part.ratio_low, part.ratio_high - part.ratio]
            style = {"fmt": shape, "ms": 3.5, "lw": 1, "capsize": 1.5, "color": COLOURS[colour], "label": model}
            ax.errorbar(part.ratio, y, xerr=spread, **style)
            for at, high, ratio in zip(y, part.ratio_high, part.ratio, strict=True):
                named: dict[str, Any] = {"va": "center", "fontsize": SMALL, "color": COLOURS[colour]}
                named["bbox"] = {"facecolor": "white", "lw": 0, "pad": 0.2}
                text = f"{float(f'{ratio:.2g}'):g}"
                ax.annotate(text, (high, at), xytext=(4, 0), textcoords="offset points", **named)
        ax.set(title=workload, ylim=(-0.6, len(arms) - 0.4))
        ax.axvline(1, color="black", lw=1, ls="--", zorder=0)
        ax.grid(axis="y", visible=False)
    for ax in axes.flat[len(workloads) :]:
        ax.remove()
    axes[0, 0].set_yticks(list(places.values()), arms)
    axes[0, 0].set_xlim(0.7 * table.ratio_low.min(), 4 * table.ratio_high.max())
    for ax in figure.axes:
        logarithmic(ax, (1,))
    figure.supxlabel("time a question / the trie's time", fontsize=SMALL)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(models), fontsize=SMALL)
    return figure


def curve(table: pd.DataFrame, x: str, label: str, lines: dict[str, float]) -> Figure:
    """F2 and F3: a student's accuracy against a setting that doubles, with 95% intervals.

    table  :func:`permdistill.paper.ablations.effects` over ``x``, one teacher's
    lines  {name: accuracy} of systems that do not depend on it, drawn as lines
    """
    columns_style()
    figure, ax = plt.subplots(figsize=(NARROW, 2.5), layout="constrained")
    rows = table.sort_values(x)
    y = 100 * rows.accuracy
    spread = [np.maximum(y - 100 * rows.accuracy_low, 0), np.maximum(100 * rows.accuracy_high - y, 0)]
    ax.errorbar(rows[x], y, yerr=spread, fmt="o-", capsize=2, lw=1, ms=4, color=COLOURS["student"], label="student")
    for (name, accuracy), style in zip(lines.items(), ("--", "-.", ":"), strict=False):
        ax.axhline(100 * accuracy, color="black", lw=1, ls=style, label=name)
    logarithmic(ax, rows[x], 2)
    ax.set(xlabel=label, ylabel="accuracy (%)")
    ax.legend(fontsize=SMALL, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    return figure


_UNTRAINED = "0.55"


def _front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points are the Pareto front: no other is at most as dear and more accurate. From cheap to dear."""
    order = np.lexsort((-y, x))
    return order[np.r_[True, y[order][1:] > np.maximum.accumulate(y[order])[:-1]]]


def accuracy_and_cost(systems: pd.DataFrame) -> Figure:
    """P2: accuracy against what an answer costs, a panel a teacher: seconds a question on one machine, log scale. Up and to
    the left is better. The line is what more orders of the teacher buy, the grey steps the Pareto front. Named are that
    ladder, prior-matching, and of each method the best student; the others are pale.

    systems  :func:`permdistill.paper.cost.of_systems`, over all tasks
    """
    columns_style()
    teachers = list(dict.fromkeys(systems.teacher))
    size = (WIDE if len(teachers) > 1 else NARROW, 3.6)
    figure, axes = plt.subplots(1, len(teachers), figsize=size, sharey=True, squeeze=False, layout="constrained")
    heads, labels = {"joint": "s", "per_option": "o", "shared_prefix": "v", "cross_option": "P", "bi_encoder": "D"}, []
    for ax, teacher in zip(axes[0], teachers, strict=True):
        own = systems[systems.teacher == teacher].reset_index(drop=True)
        x, y, student = own.seconds.to_numpy(), 100 * own.accuracy.to_numpy(), own.kind == "student"
        half = np.maximum([y - 100 * own.accuracy_low, 100 * own.accuracy_high - y], 0)
        ladder = np.flatnonzero(own.method.isin([BIASED_TEACHER, TWO_ORDERS, debias.CYCLIC, debias.DEBIASED]))
        best = own[student & (own.method != UNTRAINED)].groupby("method").accuracy.idxmax()
        named = [*ladder, *np.flatnonzero(own.method == debias.PRIOR_MATCHING), *best]
        front, steps = _front(x, y), ladder[np.argsort(x[ladder])]
        ax.step(x[front], y[front], where="post", color="0.8", lw=2.5, zorder=0)
        ax.plot(x[steps], y[steps], "-", lw=1, color=COLOURS["debiased"])
        for i, row in own.iterrows():
            colour = _UNTRAINED if row.method == UNTRAINED else COLOURS[row.kind]
            style = {"fmt": heads.get(row["head"], "o"), "ms": 4.5, "lw": 0.8, "capsize": 1.5, "color": colour}
            style |= {"mfc": "white" if student[i] and row.calls else colour, "alpha": 1 if i in named else 0.35}
            ax.errorbar(x[i], y[i], half[:, [i]], **style)
        labels.append((ax, x[named], y[named], [_name(what) for what in described(own.iloc[named])]))
        ax.set(title=teacher, xlabel="seconds a question", xlim=(systems.seconds.min() / 3, systems.seconds.max() * 8))
        logarithmic(ax, (1,))
    axes[0, 0].set_ylabel("accuracy (%)")
    dot = partial(plt.Line2D, [], [], ls="none")
    shown = {COLOURS[kind]: name for kind, name in (NAMES | {"debiased": "debiased teacher"}).items()}
    handles = [
        dot(marker="o", color=colour, label=name) for colour, name in {**shown, _UNTRAINED: "untrained student"}.items()
    ]
    handles += [dot(marker=shape, mfc="none", color="black", label=head_title(head)) for head, shape in heads.items()]
    handles.append(dot(marker="o", mfc="white", color=COLOURS["student"], label="white: with a teacher's call"))
    handles.append(plt.Line2D([], [], color=COLOURS["debiased"], label="the teacher, more orders"))
    handles.append(plt.Line2D([], [], color="0.8", lw=2.5, label="Pareto front"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=SMALL)
    for where in labels:
        write_names(*where)
    return figure


def draws(table: pd.DataFrame) -> Figure:
    """F2 on a real server, from :func:`permdistill.paper.tables.draws`: KL of the histogram to the white-box average
    (where there is one) and accuracy (where there are gold answers) against the number of decisions."""
    columns_style()
    histograms, rest = table[table.draws.notna()], table[table.draws.isna()]
    kinds = [name for name in ("kl", "accuracy") if name in table]
    figure, axes = plt.subplots(1, len(kinds), figsize=(NARROW * len(kinds), 2.7), squeeze=False, layout="constrained")
    for ax, kind in zip(axes[0], kinds, strict=True):
        if kind == "kl":
            ax.plot(
                histograms.draws, histograms.kl, "o-", ms=4, lw=1, color=COLOURS["student"], label="the server's decisions"
            )
            own = histograms.kl_drawn_from_white_box
            ax.plot(histograms.draws, own, "--", lw=1, color="black", label="drawn from the white-box scores")
            ax.set(yscale="log", ylabel="KL(histogram || average), nats")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            y, low, high = (100 * histograms[c] for c in ("accuracy", "accuracy_low", "accuracy_high"))
            style = {"fmt": "o-", "ms": 4, "lw": 1, "capsize": 2, "color": COLOURS["student"], "label": "histogram"}
            ax.errorbar(histograms.draws, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], **style)
            for value in rest.accuracy:
                ax.axhline(100 * value, color="black", lw=1, ls="--", label="white-box average")
            ax.set(ylabel="accuracy (%)")
        logarithmic(ax, histograms.draws, 2)
        ax.set(xlabel="decisions a question")
        ax.legend(fontsize=SMALL, loc="lower center", bbox_to_anchor=(0.5, 1))  # above: error bars may be anywhere
    return figure


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write ``name.pdf`` and ``name.png`` into ``folder``/figures."""
    folder = Path(folder) / "figures"
    # No creation date inside: the same picture is the same file.
    for kind, metadata in (("pdf", {"CreationDate": None}), ("png", None)):
        with replacing(folder / f"{name}.{kind}") as part:
            figure.savefig(part, format=kind, metadata=metadata)
    return folder / f"{name}.png"
