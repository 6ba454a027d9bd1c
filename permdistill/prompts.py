"""Question + order -> prompt text and label words. Templates are data: a template is a few strings, hashed into the
content key of every score that it produced.

Design decisions:

* The instruction stands *before* the options and nothing but the chat template's own suffix stands after them. What
  follows the options is different for each of the K! orders, so it is paid K! times by the shared-prefix engine.
* For summaries the attribute's question comes *after* both summaries, so that the four attributes of one pair share
  everything but a few tokens.
* " A" and "A" are different tokens. Which of them follows the prompt is decided by the chat template and by
  ``answer_prefix``; the labels here are the bare words, and :meth:`permdistill.teachers.CausalTeacher` checks that each
  of them is one token at that place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from permdistill.orders import LETTERS, apply
from permdistill.questions import Question


@dataclass(frozen=True)
class Template:
    """How one question in one order is written. ``str.format`` fields: context, question, label, option.

    name            short identifier, used in file names
    labels          the label words by position; see :meth:`words` for more options than there are here
    before          text before the options; ``before_no_context`` replaces it when the context is empty
    option          one option; repeated for every position
    after           text after the options
    answer_prefix   start of the assistant's turn; the next token is the label
    """

    name: str
    labels: tuple[str, ...]
    before: str
    before_no_context: str
    option: str
    after: str = ""
    answer_prefix: str = ""

    @cached_property
    def key(self) -> str:
        """sha256 over all fields, the name too."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def words(self, k: int) -> tuple[str, ...]:
        """The label words of ``k`` positions. Six letters go on to Z, in the same form (" F", " G"), so that
        more options change no key. Raises ValueError where the list ends."""
        listed = self.labels
        if k > len(listed) == 6 and [label[-1:] for label in listed] == list(LETTERS[: len(listed)]):
            listed = (*listed, *(f"{listed[0][:-1]}{letter}" for letter in LETTERS[len(listed) :]))
        if k > len(listed):
            raise ValueError(f"{k} options, template {self.name!r} only {len(listed)} labels")
        return listed[:k]

    def user_message(self, question: Question, order: Sequence[int]) -> str:
        """The user's turn for ``question`` with its options in ``order`` (see :mod:`permdistill.orders`)."""
        k = len(question.options)
        try:
            labels = self.words(k)
        except ValueError as error:
            raise ValueError(f"question {question.id!r} has {error}") from None
        before = self.before if question.context else self.before_no_context
        fields = {"context": question.context, "question": question.question}
        options = "".join(
            self.option.format(label=label, option=option)
            for label, option in zip(labels, apply(order, question.options), strict=False)
        )
        return before.format(**fields) + options + self.after.format(**fields)


# What labels get of the probability: below the first a teacher is refused, below the second it is told. Means of 8
# questions, drawn 2,000 times from each committed set of scores, are never below 0.52; before a thought it is near 0.
LEAST_MASS, LOW_MASS = 0.25, 0.5


def forms(label: str) -> tuple[str, ...]:
    """The ways in which one label word is written as the start of an answer, itself first: "A", " A", "(A", "a"."""
    bare = label.strip()
    return tuple(dict.fromkeys((label, bare, f" {bare}", f"({bare}", bare.lower())))


_MC = "Answer the multiple-choice question. Reply with the letter of the correct option only.\n\n"

TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="letters",
            labels=tuple("ABCDEF"),
            before=_MC + "{context}\n\nQuestion: {question}\n",
            before_no_context=_MC + "Question: {question}\n",
            option="{label}. {option}\n",
        ),
        Template(
            name="numbers",
            labels=tuple("123456"),
            before="Which option is correct? Reply with its number only.\n\n{context}\n\nQuestion: {question}\n",
            before_no_context="Which option is correct? Reply with its number only.\n\nQuestion: {question}\n",
            option="{label}: {option}\n",
        ),
        Template(
            name="brief",
            labels=tuple(f" {letter}" for letter in "ABCDEF"),
            before="{context}\n\n{question}\n",
            before_no_context="{question}\n",
            option="{label}) {option}\n",
            answer_prefix="Answer:",
        ),
        # For models without a chat template. Before the option and after "Answer:" stands one and the same token, " A".
        Template(
            name="plain",
            labels=tuple(f" {letter}" for letter in "ABCDEF"),
            before="{context}\n\nQuestion: {question}\n",
            before_no_context="Question: {question}\n",
            option="{label}. {option}\n",
            answer_prefix="Answer:",
        ),
        Template(
            name="summaries",
            labels=tuple("123456"),
            before="Compare the summaries of this article.\n\nArticle: {context}\n\n",
            before_no_context="Compare the summaries.\n\n",
            option="Summary {label}: {option}\n\n",
            after="{question} Reply with the number of the summary only.",
            answer_prefix="Summary ",
        ),
        Template(
            name="summaries_letters",
            labels=tuple(f" {letter}" for letter in "ABCDEF"),
            before="Article: {context}\n\n",
            before_no_context="",
            option="Summary{label}: {option}\n\n",
            after="{question} Reply with the letter of the summary only.",
            answer_prefix="Summary",
        ),
    )
}
