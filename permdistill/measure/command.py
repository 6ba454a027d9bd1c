"""``permdistill measure``: its options, and what it does. Loads neither pandas nor scipy until it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from permdistill.commands import add_map, printable
from permdistill.files import replacing, write_text

REJECTED = 3  # exit status when a gate's threshold is passed
# Of formats.FORMATS, for the help text: a test holds the two together.
FORMATS = ("records", "lm-eval", "inspect", "fastchat", "judgebench", "llmbar", "pandalm", "alpaca_eval", "pride")


def _share(text: str) -> float:
    """A threshold. Anything above 1, or NaN, would let everything pass."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text}: give a share, 0 to 1 (0.1 for 10%)")
    return float(text)


def add_options(command: argparse.ArgumentParser) -> None:
    """The options of ``permdistill measure``."""
    add = command.add_argument
    text = "JSONL, JSON, CSV or parquet, each also .gz: id, order, and probabilities, log_probs or a decision"
    add("records", nargs="+", help=text)
    add("--questions", help="file with id and answer (and k or options): adds how often the judge is right")
    add_map(command)
    add("--format", choices=FORMATS, help="whose files they are; records: the package's own (default: as the content looks)")
    add("--complete", action="store_true", help="leave out items with a failed verdict or a missing order")
    add("--all", action="store_true", help="every measure, each position, every debiaser and metric, too")
    add("--csv", help="write every debiaser and metric to this file")
    add("--html", help="write all of it to this file: one page, offline, printable")
    add("--max-flip-rate", type=_share, help=f"exit with status {REJECTED} when the interval lies above this share")
    text = f"exit with status {REJECTED} when a position's share lies further from even than this, interval and all"
    add("--max-position-preference", type=_share, help=text)


def run(args: argparse.Namespace) -> None:
    """Print the report; exit with :data:`REJECTED` when the gate does not let it pass."""
    from permdistill.measure.report import Gate, measure

    gate = Gate(args.max_flip_rate, args.max_position_preference)
    report = measure(args.records, args.questions, args.format, args.complete, gate, args.map)
    print(printable(str(report)))
    if args.all:
        print(printable(f"\n{report.everything()}"))
    if args.csv:
        with replacing(Path(args.csv)) as part:
            report.table.to_csv(part, index=False)
    if args.html:
        from permdistill.measure.document import document

        sources = [*args.records, *([args.questions] if args.questions else [])]
        page = document(report, sources, shlex.join(["permdistill", *args.typed]))
        write_text(Path(args.html), page)
    if rejected := report.rejected:
        print("\n".join(["", *(f"rejected: {reason}" for reason in rejected)]), file=sys.stderr)
        sys.exit(REJECTED)
