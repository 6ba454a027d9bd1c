"""The heads of a student: which sequences an encoder reads, and how its outputs become K logits.

    joint       the paper's: one sequence per (question, order) with the options as shown, and a K-way head over label
                *positions*. Not order-equivariant: it has to learn to bind letters to options.
    per_option  each option in a sequence of its own, one score each, softmax over the options. No sequence depends on the
                order, so the student is exactly order-equivariant, and an option that occurs in many questions (one summary
                in many pairs) is scored once.
    shared_prefix  as per_option, but context and question are read once for all options: they stand before the options of
                one sequence, and each option sees them and itself, not the other options; nor do they see an option. One
                score an option, the mean over its tokens. A fraction of the tokens where the context is long.
    cross_option  as shared_prefix, but the options of a question see each other: each the last token of every other, which
                has read its option. All begin at the same place, so that none is the first: order-equivariant, up to
                rounding. (An option that leaves less room for the context sees another beginning, and only the options that
                share it.)
    bi_encoder  question and options each in a sequence of their own, the cosine of their embeddings times a scale as logit.
                Exactly order-equivariant too, and the only head that starts from what a sentence encoder already knows.

Sources: Liusie, Fathullah and Gales, Findings of ACL 2024, arXiv 2403.13590 (joint head; the others are ours);
Reimers and Gurevych, "Sentence-BERT", EMNLP 2019 (mean pooling and cosine); Schlatt et al., "Set-Encoder", ECIR 2025, arXiv
2404.06912 (texts of a set that see one token of each other, at the same positions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModel,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from permdistill.orders import LETTERS
from permdistill.questions import Question

# One tokenised sequence: input_ids; token_type_ids where the encoder has them; for heads that pack "option", 1 from the
# first token of its second text on (2, 3, .. for second texts that see others than these).
Row = dict[str, np.ndarray]
OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "mpnet")  # their positions start after the padding index


class Text(NamedTuple):
    """One input sequence: the text pair (context + question, second), or one of the two alone. ``among``: the options of
    its question, sorted, where they see each other."""

    context: str
    question: str
    second: str
    among: tuple[str, ...] = ()

    @property
    def first(self) -> str:
        return f"{self.context} {self.question}" if self.context else self.question


@dataclass(frozen=True)
class Head:
    """What is particular to a head.

    model        the class of transformers that holds the encoder and what stands on it
    texts        (question, order, decision) -> the sequences of one question in one order; ``decision`` is the index of the
                 option that the teacher chose in this order, None for inputs without one
    width        K -> the axes that these sequences have in an index (:meth:`permdistill.students.Student.encode`)
    outputs      (model, inputs) -> what one forward pass gives for padded sequences (sequence, token)
    logits       (outputs in the shape of an index, scale) -> logits (item, order, position or option)
    equivariant  whether no sequence depends on the order: then logits go by option, else by position
    scaled       whether the logits are multiplied by the student's scale
    settings     K -> what the model's configuration has to say
    packs        whether rows say where their second text begins
    columns      texts -> what the tokenizer takes
    forward      (one forward pass, sequences) -> outputs, by that pass or by several, or of other sequences made of these
    """

    model: Any
    texts: Callable[[Question, Sequence[int], int | None], list[Text]]
    width: Callable[[int], tuple[int, ...]]
    outputs: Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor]
    logits: Callable[[torch.Tensor, float], torch.Tensor]
    equivariant: bool = True
    scaled: bool = False
    packs: bool = False
    settings: Callable[[int], dict[str, Any]] = lambda k: {}
    columns: Callable[[Sequence[Text]], tuple[list[str], ...]] = lambda texts: (
        [text.first for text in texts],
        [text.second for text in texts],
    )
    forward: Callable[[Callable[[Sequence[Row]], torch.Tensor], Sequence[Row]], torch.Tensor] = lambda once, rows: once(rows)


def _joint(question: Question, order: Sequence[int], decision: int | None) -> list[Text]:
    shown = [question.options[o] for o in order]
    second = " ".join(f"{label}) {option}" for label, option in zip(LETTERS, shown, strict=False))
    if decision is not None:
        second += f" Prediction: {LETTERS[list(order).index(decision)]}"
    return [Text(question.context, question.question, second)]


def _labels(k: int) -> dict[str, Any]:
    return {"id2label": dict(enumerate(LETTERS[:k])), "label2id": {label: i for i, label in enumerate(LETTERS[:k])}}


def _marked(question: Question, decision: int | None) -> list[str]:
    """The options, each with a mark that says whether the teacher chose it."""
    if decision is None:
        return list(question.options)
    return [text + (" (chosen)" if o == decision else " (not chosen)") for o, text in enumerate(question.options)]


def _per_option(question: Question, order: Sequence[int], decision: int | None) -> list[Text]:
    return [Text(question.context, question.question, option) for option in _marked(question, decision)]


def _among(question: Question, order: Sequence[int], decision: int | None) -> list[Text]:
    options = tuple(sorted(_marked(question, decision)))
    return [text._replace(among=options) for text in _per_option(question, order, decision)]


def _apart(question: Question, order: Sequence[int], decision: int | None) -> list[Text]:
    options = [Text("", "", option) for option in _marked(question, decision)]
    return [Text(question.context, question.question, ""), *options]


def _classified(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits.float()


def _embedded(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    states, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"][..., None]
    return normalize((states * mask).sum(dim=1), dim=-1)  # the mean over the tokens, but for its length


def _short_and_long(once: Callable[[Sequence[Row]], torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
    """Two passes where questions are long and options short, so that these are not padded to the length of those."""
    lengths = np.array([len(row["input_ids"]) for row in rows])
    order, n = np.argsort(lengths, kind="stable"), np.arange(len(rows))
    # Tokens, padding included, when the n shortest sequences have a pass of their own.
    tokens = n * np.r_[0, lengths[order][:-1]] + (len(rows) - n) * lengths.max()
    parts = np.split(order, [tokens.argmin()] if tokens.min() < 0.8 * tokens[0] else [])
    outputs = torch.cat([once([rows[i] for i in part]) for part in parts])
    return outputs[np.argsort(order)]


def alike(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the sequences that begin alike, up to their options, and see the same others: one list for each such."""
    found: dict[bytes, list[int]] = {}
    for i, row in enumerate(rows):
        begin, seen = row["input_ids"][row["option"] == 0], row["option"][-1:]
        found.setdefault(np.r_[seen, begin].tobytes(), []).append(i)
    return list(found.values())


def pack(rows: Sequence[Row]) -> tuple[list[Row], np.ndarray]:
    """Sequences that begin alike -> one each, with what is the same once and the options one after the other; and where
    each went: (row, 2), its packed sequence and the number that its tokens have there in "option" (0: the beginning).

    Positions ("place") go on from the beginning in each option, as if it stood there alone.
    """
    result, places = [], np.empty((len(rows), 2), dtype=np.int64)
    for number, members in enumerate(alike(rows)):
        places[members] = [(number, j + 1) for j in range(len(members))]
        first = rows[members[0]]
        n = int((first["option"] == 0).sum())
        whole = {name: [values[:n]] + [rows[i][name][n:] for i in members] for name, values in first.items()}
        whole["option"] = [np.full(len(part), j, dtype=np.int32) for j, part in enumerate(whole["option"])]
        whole["place"] = [np.arange(len(part), dtype=np.int32) + n * (j > 0) for j, part in enumerate(whole["option"])]
        result.append({name: np.concatenate(parts) for name, parts in whole.items()})
    return result, places


def _of_options(once: Callable[[Sequence[Row]], torch.Tensor], rows: Sequence[Row]) -> torch.Tensor:
    """The mean of the scores of each option's tokens, (sequence, 1), by one pass over packed sequences."""
    packed, places = pack(rows)
    scores = once(packed)  # (packed sequence, token)
    option = pad_sequence([torch.from_numpy(row["option"]) for row in packed], batch_first=True).to(scores.device)
    own = (option[places[:, 0]] == torch.from_numpy(places[:, 1:]).to(scores.device)).float()  # (sequence, token)
    return ((scores[places[:, 0]] * own).sum(dim=1) / own.sum(dim=1))[:, None]


def _scored(model: PreTrainedModel, inputs: dict[str, torch.Tensor], mutual: bool = False) -> torch.Tensor:
    """A score for each token of packed sequences. ``mutual``: options see the last token of each other."""
    option, place, there = inputs.pop("option"), inputs.pop("place"), inputs.pop("attention_mask").bool()
    allowed = (option[:, None] == 0) | (option[:, None] == option[:, :, None])  # (sequence, query, key)
    if mutual:
        last = (option > 0) & (option != torch.nn.functional.pad(option[:, 1:], (0, 1)))
        allowed = allowed | (last[:, None] & (option[:, :, None] > 0))
    # A padding token sees itself: softmax over nothing would be NaN.
    allowed = allowed & there[:, None] | torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
    mask = torch.zeros(allowed.shape).to(allowed.device).masked_fill(~allowed, torch.finfo(torch.bfloat16).min)
    if model.config.model_type in OFFSET_POSITIONS:
        place = place + model.config.pad_token_id + 1
    with _relative_to(model, place):
        return model(**inputs, attention_mask=mask[:, None], position_ids=place).logits[..., 0].float()


@contextmanager
def _relative_to(model: PreTrainedModel, place: torch.Tensor) -> Iterator[None]:
    """MPNet's bias by distance, with the distances of these places (sequence, token); it takes those of a plain sequence."""
    encoder: Any = getattr(model.base_model, "encoder", None)
    if not hasattr(encoder, "relative_attention_bias"):
        yield
        return

    def bias(states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        buckets = encoder.relative_position_bucket(place[:, None] - place[:, :, None])
        return encoder.relative_attention_bias(buckets).permute(0, 3, 1, 2)

    encoder.compute_position_bias = bias
    try:
        yield
    finally:
        del encoder.compute_position_bias


_SHARED_PREFIX = Head(
    model=AutoModelForTokenClassification,
    texts=_per_option,
    width=lambda k: (k,),
    outputs=_scored,  # (packed sequence, token)
    logits=lambda found, scale: found[..., 0],
    packs=True,
    settings=lambda k: {"num_labels": 1},
    forward=_of_options,
)
HEADS = {  # as in configs.HEADS
    "joint": Head(
        model=AutoModelForSequenceClassification,
        texts=_joint,
        width=lambda k: (),
        outputs=_classified,  # (sequence, K)
        logits=lambda found, scale: found,
        equivariant=False,
        settings=_labels,
    ),
    "per_option": Head(
        model=AutoModelForMultipleChoice,
        texts=_per_option,
        width=lambda k: (k,),
        outputs=lambda model, inputs: _classified(model, {name: v[:, None] for name, v in inputs.items()}),  # (sequence, 1)
        logits=lambda found, scale: found[..., 0],
    ),
    "shared_prefix": _SHARED_PREFIX,
    "cross_option": replace(_SHARED_PREFIX, texts=_among, outputs=partial(_scored, mutual=True)),
    "bi_encoder": Head(
        model=AutoModel,
        texts=_apart,
        width=lambda k: (1 + k,),
        outputs=_embedded,  # (sequence, hidden), of length 1
        logits=lambda found, scale: scale * (found[..., :1, :] * found[..., 1:, :]).sum(dim=-1),
        scaled=True,
        columns=lambda texts: ([text.first or text.second for text in texts],),
        forward=_short_and_long,
    ),
}
