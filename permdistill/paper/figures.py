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

from permdistill import debias, fewcalls
from permdistill.measure import metrics
from permdistill.orders import to_positions
from permdistill.paper import tasks as registry
from permdistill.paper.experiments import Scored
from permdistill.paper.systems import BIASED as BIASED_TEACHER
from permdistill.paper.systems import TWO_ORDERS, UNTRAINED, described, head_title, title
from permdistill.paper.tables import BIASED, DEBIASED

COLOURS = dict(zip(("teacher", "debiased", "copy", "student"), sns.color_palette("colorblind"), strict=False))
NAMES = {"teacher": "biased teacher", "debiased": "all-orders average", "copy": "copied decision", "student": "student"}


def _style() -> None:
    sns.set_theme(context="paper", style="whitegrid", palette="colorblind", rc={"figure.dpi": 110, "savefig.dpi": 200})


def _label(task: str) -> str:
    return "all tasks" if task == "all" else registry.title(task).replace("all of", "all tasks of")


def _interval(ax: Axes, frame: pd.DataFrame, name: str, y: np.ndarray, **style: Any) -> None:
    """Points with 95% intervals, in points of 100, at heights y."""
    value, low, high = (100 * frame[c].to_numpy() for c in (name, f"{name}_low", f"{name}_high"))
    ax.errorbar(
        value, y, xerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)], fmt="o", capsize=2, lw=1, ms=4, **style
    )


def sensitivity_and_gain(table: pd.DataFrame) -> Figure:
    """T1 as a picture, a column a teacher. Above: permutation sensitivity by task. Below, where there are gold answers:
    accuracy, biased and debiased."""
    _style()
    teachers, tasks = list(dict.fromkeys(table.teacher)), list(dict.fromkeys(table.task))
    n_rows = 2 if "accuracy" in table else 1
    figure, axes = plt.subplots(
        n_rows,
        len(teachers),
        figsize=(2.2 + 2.6 * len(teachers), 1 + 0.23 * n_rows * len(tasks)),
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
            _interval(ax, debiased, "accuracy", y - 0.15, color=COLOURS["debiased"], label="all-orders average")
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
    _style()
    P, k = scored.P[int(np.argmax(metrics.permutation_sensitivity(scored.P)))], scored.task.k
    letters, options = [label.strip() for label in scored.task.template.labels[:k]], [str(i + 1) for i in range(k)]
    panels = (
        ("by position", "label", to_positions(P, scored.orders), letters),
        ("by option", "option", P, options),
        ("average over all orders", "option", P.mean(axis=0)[None], options),
    )
    figure, axes = plt.subplots(1, 3, figsize=(6.8, 3), layout="constrained")
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
    _style()
    rows = [
        {"teacher": s.teacher, "task": s.task.name, "position": label.strip(), "share": 100 * share}
        for s in scored
        for label, share in zip(s.task.template.labels, metrics.position_marginals(s.P, s.orders).mean(axis=0), strict=False)
    ]
    frame = pd.DataFrame(rows)
    tasks = list(dict.fromkeys(frame.task))
    columns = min(4, len(tasks))
    size = (2.6 * columns, 1.9 * -(-len(tasks) // columns) + 0.4)
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


FAMILIES = {  # of debiasers, and their markers
    debias.BIASED: "o",
    debias.BLACK_BOX_FAMILY: "x",
    debias.RANDOM_FAMILY: "v",
    debias.CYCLIC: "^",
    debias.DEBIASED: "s",
    debias.MAJORITY: "P",
    debias.PRIOR_MATCHING: "D",
    debias.CONTEXT_PRIOR_MATCHING: "d",
    debias.PRIDE: "*",
    debias.CALIBRATION: "h",
    fewcalls.REVERSE_PAIR: "<",
    fewcalls.WILLIAMS: ">",
    fewcalls.ADAPTIVE_FAMILY: "p",
    fewcalls.GEOMETRIC: "H",
    fewcalls.BATCH_CALIBRATION: "X",
}


def cost_and_accuracy(table: pd.DataFrame, kinds: dict[str, Sequence[str]]) -> Figure:
    """Every debiaser: teacher calls a question against accuracy (above) and permutation sensitivity (below).

    table  :func:`permdistill.paper.tables.debiasers` of one teacher
    kinds  {title: tasks}: a column each, with the mean over its tasks and the interval of that mean, the tasks' own
           intervals taken as independent
    """
    _style()
    size = (2.2 * len(kinds) + 0.6, 5.4)
    figure, axes = plt.subplots(2, len(kinds), figsize=size, sharex="col", squeeze=False, layout="constrained")
    palette = dict(zip(FAMILIES, sns.color_palette("colorblind", len(FAMILIES)), strict=True))
    for (above, below), (kind, tasks) in zip(axes.T, kinds.items(), strict=True):
        part = table[table.task.isin(list(tasks))]
        for number, (family, marker) in enumerate(FAMILIES.items()):
            own = part[part.family == family]
            for ax, name in ((above, "accuracy"), (below, "ps")):
                points = [
                    (group.calls.iloc[0], group[name].mean(), _half(group, name))
                    for _, group in own.groupby("debiaser", sort=False)
                ]
                if points:
                    x, y, half = 100 * np.array(points).T
                    style = {"fmt": marker, "ms": 5, "lw": 0.8, "capsize": 1.5, "alpha": 0.85, "label": family}
                    aside = 1.02 ** (number - len(FAMILIES) // 2)  # what costs the same stands side by side
                    ax.errorbar(aside * x / 100, y, yerr=half, color=palette[family], **style)
        above.set(title=kind, xscale="log")
        below.set(xlabel="teacher calls a question", ylim=(-1, None))
    axes[0, 0].set_ylabel("accuracy (%)")
    axes[1, 0].set_ylabel("ps (TV x 100)")
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    return figure


def _half(group: pd.DataFrame, name: str) -> float:
    halves = (group[f"{name}_high"] - group[f"{name}_low"]) / 2
    return float(np.sqrt((halves**2).sum()) / len(group))


def students(table: pd.DataFrame) -> Figure:
    """T2 or T3 as a picture: accuracy of every system on every task, the biased teacher's as a line."""
    _style()
    table = table.assign(system=[title(what) for what in described(table)])
    tasks, systems = list(dict.fromkeys(table.task)), list(dict.fromkeys(table.system))
    y = np.arange(len(systems))[::-1]
    figure, axes = plt.subplots(
        1,
        len(tasks),
        figsize=(2.6 + 2.1 * len(tasks), 1 + 0.3 * len(systems)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, task in zip(axes[0], tasks, strict=True):
        part = table[table.task == task].set_index("system").reindex(systems)
        for kind, colour in COLOURS.items():
            mine = (part.kind == kind).to_numpy()
            if mine.any():
                _interval(ax, part[mine], "accuracy", y[mine], color=colour)
        ax.axvline(100 * part.accuracy.iloc[0], color=COLOURS["teacher"], lw=1, ls="--")
        ax.set(title=_label(task), xlabel="accuracy (%)")
    axes[0, 0].set_yticks(y, systems)
    return figure


def sensitivity_against_accuracy(systems: pd.DataFrame) -> Figure:
    """F5: every system as a point per task, permutation sensitivity against accuracy. Up and to the left is better.

    ``systems`` has the columns of the students' tables (task, kind, head, accuracy, ps).
    """
    _style()
    tasks = list(dict.fromkeys(systems.task))
    columns = min(4, len(tasks))
    figure, axes = plt.subplots(
        -(-len(tasks) // columns),
        columns,
        figsize=(2.7 * columns, 2.7 * -(-len(tasks) // columns) + 0.5),
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(tasks) :]:
        ax.set_visible(False)
    for ax, task in zip(axes.flat, tasks, strict=False):
        part = systems[systems.task == task]
        for kind, colour in COLOURS.items():
            mine = part[part.kind == kind]
            joint = mine["head"] == "joint"
            for chosen, marker, suffix in ((~joint, "o", ""), (joint, "s", ", joint head")):
                if chosen.any():
                    ax.scatter(
                        100 * mine.ps[chosen],
                        100 * mine.accuracy[chosen],
                        color=colour,
                        marker=marker,
                        s=34,
                        alpha=0.85,
                        edgecolor="white",
                        linewidth=0.5,
                        label=NAMES[kind] + (suffix if kind == "student" else ""),
                    )
        ax.set(title=_label(task), xlabel="ps (TV x 100)", ylabel="accuracy (%)", xlim=(-3, None))
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
    return figure


def scoring_time(table: pd.DataFrame) -> Figure:
    """Time a question of every way to score all orders, in units of the trie's, and what share of the machine it uses.

    ``table`` is :func:`permdistill.paper.bench.table`'s.
    """
    _style()
    models, workloads, arms = (list(dict.fromkeys(table[name])) for name in ("model", "workload", "arm"))
    y = np.arange(len(arms))[::-1]
    size = (1.2 + 2.6 * len(workloads), 0.5 + 1.7 * len(models))
    figure, axes = plt.subplots(
        len(models), len(workloads), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for row, model in enumerate(models):
        for column, workload in enumerate(workloads):
            part = table[(table.model == model) & (table.workload == workload)].set_index("arm").loc[arms]
            ax, error = axes[row, column], [part.ratio - part.ratio_low, part.ratio_high - part.ratio]
            colours = [COLOURS["debiased"] if arm == "trie" else COLOURS["teacher"] for arm in arms]
            ax.barh(y, part.ratio, xerr=np.array(error), color=colours, capsize=2, error_kw={"lw": 1})
            for place, high, share in zip(y, part.ratio_high, part.share, strict=True):
                ax.text(high * 1.15, place, f"{share:.0%}", va="center", fontsize="small")
            ax.set(xscale="log", title=workload if row == 0 else "")
            ax.axvline(1, color="black", lw=1, ls="--")
            ax.grid(axis="y", visible=False)
        axes[row, 0].set_yticks(y, arms)
        axes[row, 0].set_ylabel(model)
    axes[0, 0].set_xlim(0.5 * table.ratio_low.min(), 3 * table.ratio_high.max())
    figure.supxlabel("time a question / the trie's time; percentages: share of the measured matmul peak", fontsize="small")
    return figure


def curve(table: pd.DataFrame, x: str, label: str, lines: dict[str, float]) -> Figure:
    """F2 and F3: a student's accuracy against a setting that doubles, with 95% intervals.

    table  :func:`permdistill.paper.ablations.effects` over ``x``, one teacher's
    lines  {name: accuracy} of systems that do not depend on it, drawn as lines
    """
    _style()
    figure, ax = plt.subplots(figsize=(4.6, 3.2), layout="constrained")
    rows = table.sort_values(x)
    y = 100 * rows.accuracy
    spread = [np.maximum(y - 100 * rows.accuracy_low, 0), np.maximum(100 * rows.accuracy_high - y, 0)]
    ax.errorbar(rows[x], y, yerr=spread, fmt="o-", capsize=2, lw=1, ms=4, color=COLOURS["student"], label="student")
    for (name, accuracy), style in zip(lines.items(), ("--", "-.", ":"), strict=False):
        ax.axhline(100 * accuracy, color="black", lw=1, ls=style, label=name)
    ax.set_xscale("log", base=2)
    ax.set_xticks(rows[x], [f"{value:g}" for value in rows[x]])
    ax.set(xlabel=label, ylabel="accuracy (%)")
    ax.legend()
    return figure


_SHORT = {
    BIASED_TEACHER: "biased",
    debias.PRIOR_MATCHING: "prior-matching",
    TWO_ORDERS: "2 orders",
    debias.CYCLIC: "{} orders",
    debias.DEBIASED: "all orders",
}


_UNTRAINED = "0.55"


def accuracy_and_cost(systems: pd.DataFrame) -> Figure:
    """Accuracy against what an answer costs, a panel a teacher: seconds a question on one machine, log scale. Up and to the
    left is better.

    systems  :func:`permdistill.paper.cost.of_systems`, over all tasks
    """
    _style()
    teachers = list(dict.fromkeys(systems.teacher))
    figure, axes = plt.subplots(
        1, len(teachers), figsize=(4.6 * len(teachers), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    markers = {"joint": "s", "per_option": "o", "bi_encoder": "D"}
    for ax, teacher in zip(axes[0], teachers, strict=True):
        for row in systems[systems.teacher == teacher].itertuples():
            student = row.kind == "student"
            large = student and row.parameters_millions > 50
            spread = [[100 * (row.accuracy - row.accuracy_low)], [100 * (row.accuracy_high - row.accuracy)]]
            colour = _UNTRAINED if row.method == UNTRAINED else COLOURS[row.kind]
            style = {"marker": markers.get(row.head, "o"), "ms": 8 if large else 5, "lw": 0.8, "capsize": 1.5}
            style |= {"color": colour, "mfc": "white" if student and row.calls else colour}
            ax.errorbar(row.seconds, 100 * row.accuracy, yerr=spread, ls="none", **style)
            # Students are told apart by the legend: their names would lie on top of each other.
            where, near = (row.seconds, 100 * row.accuracy), {"ha": "right", "fontsize": 7}
            ax.annotate(
                _SHORT.get(row.method, "").format(row.calls), where, xytext=(-6, 3), textcoords="offset points", **near
            )
        ax.set_xlim(systems.seconds.min() / 4, systems.seconds.max() * 2)
        ax.set(title=teacher, xscale="log", xlabel="seconds a question")
    axes[0, 0].set_ylabel("accuracy (%)")
    dot = partial(plt.Line2D, [], [], ls="none")
    shown = {k: NAMES[k] for k in COLOURS} | {"debiased": "debiased teacher"}
    kinds = [dot(marker="o", color=COLOURS[k], label=name) for k, name in shown.items()]
    kinds.append(dot(marker="o", color=_UNTRAINED, label="untrained student"))
    kinds += [dot(marker=marker, mfc="none", color="black", label=head_title(head)) for head, marker in markers.items()]
    kinds.append(dot(marker="o", ms=8, color="black", label="large: over 50M parameters"))
    kinds.append(dot(marker="o", mfc="white", color=COLOURS["student"], label="white: with a teacher's call"))
    figure.legend(handles=kinds, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def draws(table: pd.DataFrame) -> Figure:
    """F2 on a real server, from :func:`permdistill.paper.tables.draws`: KL of the histogram to the white-box average
    (where there is one) and accuracy (where there are gold answers) against the number of decisions."""
    _style()
    histograms, rest = table[table.draws.notna()], table[table.draws.isna()]
    kinds = [name for name in ("kl", "accuracy") if name in table]
    figure, axes = plt.subplots(1, len(kinds), figsize=(3.6 * len(kinds), 3.2), squeeze=False, layout="constrained")
    for ax, kind in zip(axes[0], kinds, strict=True):
        if kind == "kl":
            ax.plot(
                histograms.draws, histograms.kl, "o-", ms=4, lw=1, color=COLOURS["student"], label="the server's decisions"
            )
            own = histograms.kl_drawn_from_white_box
            ax.plot(histograms.draws, own, "--", lw=1, color="black", label="drawn from the white-box scores")
            ax.set(yscale="log", ylabel="KL(histogram || average), nats")
        else:
            y, low, high = (100 * histograms[c] for c in ("accuracy", "accuracy_low", "accuracy_high"))
            style = {"fmt": "o-", "ms": 4, "lw": 1, "capsize": 2, "color": COLOURS["student"], "label": "histogram"}
            ax.errorbar(histograms.draws, y, yerr=[np.maximum(y - low, 0), np.maximum(high - y, 0)], **style)
            for value in rest.accuracy:
                ax.axhline(100 * value, color="black", lw=1, ls="--", label="white-box average")
            ax.set(ylabel="accuracy (%)")
        ax.set_xscale("log", base=2)
        ax.set_xticks(histograms.draws, [f"{value:g}" for value in histograms.draws])
        ax.set(xlabel="decisions a question")
        ax.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1))  # above: error bars may be anywhere
    return figure


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write ``name.pdf`` and ``name.png`` into ``folder``/figures."""
    folder = Path(folder) / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    # No creation date inside: the same picture is the same file.
    figure.savefig(folder / f"{name}.pdf", metadata={"CreationDate": None})
    figure.savefig(folder / f"{name}.png")
    return folder / f"{name}.png"
