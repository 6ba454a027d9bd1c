"""The heads of a student: which sequences an encoder reads, and how its outputs become K logits.

    joint       the paper's: one sequence per (question, order) with the options as shown, and a K-way head over label
                *positions*. Not order-equivariant: it has to learn to bind letters to options.
    per_option  each option in a sequence of its own, one score each, softmax over the options. No sequence depends on the
                order, so the student is exactly order-equivariant, and an option that occurs in many questions (one summary
                in many pairs) is scored once.
    bi_encoder  question and options each in a sequence of their own, the cosine of their embeddings times a scale as logit.
                Exactly order-equivariant too, and the only head that starts from what a sentence encoder already knows.

Sources: Liusie, Fathullah and Gales, Findings of ACL 2024, arXiv 2403.13590 (joint head; the others are ours);
Reimers and Gurevych, "Sentence-BERT", EMNLP 2019 (mean pooling and cosine).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers import AutoModel, AutoModelForMultipleChoice, AutoModelForSequenceClassification, PreTrainedModel

from permdistill.questions import Question

LABELS = "ABCDEF"
Row = dict[str, np.ndarray]  # one tokenised sequence: input_ids and, where the encoder has them, token_type_ids


class Text(NamedTuple):
    """One input sequence: the text pair (context + question, second), or one of the two alone."""

    context: str
    question: str
    second: str

    @property
    def first(self) -> str:
        return f"{self.context} {self.question}" if self.context else self.question


class Head:
    """What is particular to a head.

    model        the class of transformers that holds the encoder and what stands on it
    equivariant  whether no sequence depends on the order: then logits go by option, else by position
    scaled       whether logits are multiplied by the student's scale
    """

    model: Any
    equivariant, scaled = True, False

    def settings(self, k: int) -> dict[str, Any]:
        """What the model's configuration has to say."""
        return {}

    def texts(self, question: Question, order: Sequence[int], decision: int | None = None) -> list[Text]:
        """The sequences of one question in one order. ``decision`` is the index of the option that the teacher chose in this
        order, None for inputs without one."""
        raise NotImplementedError

    def width(self, k: int) -> tuple[int, ...]:
        """The axes that the sequences of one question in one order have in an index."""
        return (k,)

    def columns(self, texts: Sequence[Text]) -> tuple[list[str], ...]:
        """What the tokenizer takes."""
        return [text.first for text in texts], [text.second for text in texts]

    def forward(self, once: Callable[[Sequence[Row]], torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
        """The outputs for some sequences, by one forward pass (``once``) or several."""
        return once(rows)

    def outputs(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One forward pass over padded sequences (sequence, token)."""
        return model(**inputs).logits.float()

    def logits(self, outputs: torch.Tensor, scale: float) -> torch.Tensor:
        """Outputs in the shape of an index -> logits (item, order, position or option)."""
        return outputs


class Joint(Head):
    """One sequence with all options as shown: outputs (sequence, K) are logits by position."""

    model = AutoModelForSequenceClassification
    equivariant = False

    def settings(self, k: int) -> dict[str, Any]:
        return {"id2label": dict(enumerate(LABELS[:k])), "label2id": {label: i for i, label in enumerate(LABELS[:k])}}

    def texts(self, question: Question, order: Sequence[int], decision: int | None = None) -> list[Text]:
        shown = [question.options[o] for o in order]
        second = " ".join(f"{label}) {option}" for label, option in zip(LABELS, shown, strict=False))
        if decision is not None:
            second += f" Prediction: {LABELS[list(order).index(decision)]}"
        return [Text(question.context, question.question, second)]

    def width(self, k: int) -> tuple[int, ...]:
        return ()


def _marked(question: Question, decision: int | None) -> list[str]:
    """The options, each with a mark that says whether the teacher chose it."""
    if decision is None:
        return list(question.options)
    return [text + (" (chosen)" if o == decision else " (not chosen)") for o, text in enumerate(question.options)]


class PerOption(Head):
    """A sequence per *option*, whatever the order: outputs (sequence, 1)."""

    model = AutoModelForMultipleChoice

    def texts(self, question: Question, order: Sequence[int], decision: int | None = None) -> list[Text]:
        return [Text(question.context, question.question, option) for option in _marked(question, decision)]

    def outputs(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().outputs(model, {name: value[:, None] for name, value in inputs.items()})  # choices = 1

    def logits(self, outputs: torch.Tensor, scale: float) -> torch.Tensor:
        return outputs[..., 0]


class BiEncoder(Head):
    """The question's sequence and one per option: outputs are embeddings of length 1, (sequence, hidden)."""

    model = AutoModel
    scaled = True

    def texts(self, question: Question, order: Sequence[int], decision: int | None = None) -> list[Text]:
        options = [Text("", "", option) for option in _marked(question, decision)]
        return [Text(question.context, question.question, ""), *options]

    def width(self, k: int) -> tuple[int, ...]:
        return (1 + k,)

    def columns(self, texts: Sequence[Text]) -> tuple[list[str], ...]:
        return ([text.first or text.second for text in texts],)

    def forward(self, once: Callable[[Sequence[Row]], torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
        """Two passes where questions are long and options short, so that these are not padded to the length of those."""
        lengths = np.array([len(row["input_ids"]) for row in rows])
        order, n = np.argsort(lengths, kind="stable"), np.arange(len(rows))
        # Tokens, padding included, when the n shortest sequences have a pass of their own.
        tokens = n * np.r_[0, lengths[order][:-1]] + (len(rows) - n) * lengths.max()
        parts = np.split(order, [tokens.argmin()] if tokens.min() < 0.8 * tokens[0] else [])
        outputs = torch.cat([once([rows[i] for i in part]) for part in parts])
        return outputs[np.argsort(order)]

    def outputs(self, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        states, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"][..., None]
        return normalize((states * mask).sum(dim=1), dim=-1)  # the mean over the tokens, but for its length

    def logits(self, outputs: torch.Tensor, scale: float) -> torch.Tensor:
        return scale * (outputs[..., :1, :] * outputs[..., 1:, :]).sum(dim=-1)


HEADS: dict[str, Head] = {"joint": Joint(), "per_option": PerOption(), "bi_encoder": BiEncoder()}  # as in configs.HEADS
