"""Teachers: questions and orders -> scores. A score array has the axes (item, order, option).

:class:`CausalTeacher` is the white-box teacher: a decoder-only language model behind its own chat template, whose
next-token probabilities of the K label words are read at the start of the assistant's turn. :class:`Seq2SeqTeacher` is an
encoder-decoder (FlanT5): they are read at the decoder's first step. :class:`PlantedTeacher` has a bias that is known in
closed form, for tests and for trying out one's own analysis.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from scipy.special import log_softmax
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from permdistill import sources
from permdistill.engine import forest, trie
from permdistill.engine.placement import has_bfloat16, placed, with_packed_linears
from permdistill.files import sha256_of
from permdistill.orders import all_orders, to_options
from permdistill.prompts import Template, forms
from permdistill.questions import Question


class Teacher(Protocol):
    """What the store needs of a teacher."""

    name: str
    model_key: str  # identifies weights and number format; part of the content key of every score

    def log_probs(self, questions: Sequence[Question], orders: np.ndarray, template: Template) -> np.ndarray:
        """Log-probabilities of the K label words, mapped back to options, before renormalisation: (item, order, option).

        The questions all have K options and should share their context, which is then paid once.
        """
        ...

    def check(self, questions: Sequence[Question], template: Template) -> None:
        """Raises ValueError, before any compute, when a question or the template does not suit the teacher."""
        ...


class Asked(NamedTuple):
    """A question, and the orders (order, K) in which it is asked."""

    question: Question
    orders: np.ndarray


def in_groups(
    teacher: Teacher, groups: Sequence[Sequence[Asked]], template: Template
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Log-probabilities (order, option) of questions, each in its orders, as they are ready: lists of (place among all
    questions, values). The questions of a group have one K and should share their context."""
    if isinstance(teacher, CausalTeacher):
        orders = [asked.orders for group in groups for asked in group]
        yield from teacher.stream([[asked.question for asked in group] for group in groups], template, orders)
        return
    first = 0
    for group in groups:
        alike: dict[bytes, list[int]] = {}  # questions in the same orders go together
        for place, asked in enumerate(group):
            alike.setdefault(asked.orders.tobytes(), []).append(place)
        for places in alike.values():
            values = teacher.log_probs([group[i].question for i in places], group[places[0]].orders, template)
            yield [(first + i, own) for i, own in zip(places, values, strict=True)]
        first += len(group)


_MESSAGE = "permdistill's message"  # no chat template changes it
PROBED = 8  # questions on which the label mass is tried
_THINKING = ("enable_thinking", "thinking")  # what chat templates call the switch of their thinking block


@dataclass
class CausalTeacher:
    """A decoder-only LM behind its chat template; without one, the prompt is the template's plain text.

    name           short name, used in file names and tables
    model_key      e.g. "sha256:<of the weights> bfloat16"
    max_tokens     tokens a forward pass, bounds the memory above the weights; None: what suits the machine
    template_args  further arguments of the chat template, e.g. {"enable_thinking": False}
    variants       whether the forms of a label ("A", " A", "(A", "a") count together, as far as each is one token
    least_mass     :meth:`check` refuses questions on which the labels get less of the probability than this
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_key: str
    max_tokens: int | None = None
    tokens_forwarded: int = 0
    template_args: Mapping[str, Any] = field(default_factory=dict)
    variants: bool = False
    least_mass: float = 0.0

    def prompt(self, question: Question, order: Sequence[int], template: Template) -> str:
        """The whole prompt as text, chat template included."""
        return self._chat(template.user_message(question, order)) + template.answer_prefix

    @property
    def bare(self) -> bool:
        """Whether there is no chat template."""
        return not self.tokenizer.chat_template

    def _chat(self, message: str) -> str:
        if self.bare:
            return self._start + message
        turns = [{"role": "user", "content": message}]
        settings = {"tokenize": False, "add_generation_prompt": True} | dict(self.template_args)
        return str(self.tokenizer.apply_chat_template(turns, **settings))

    @cached_property
    def _start(self) -> str:
        """The start of text, where the tokenizer puts one by itself: chat templates write it, plain prompts have to."""
        first = self.tokenizer.encode("a")[:1]
        return str(self.tokenizer.bos_token) if first and first == [self.tokenizer.bos_token_id] else ""

    def prompts(self, question: Question, orders: np.ndarray, template: Template) -> list[str]:
        """:meth:`prompt` in each order. The chat template is rendered once: what it puts around one message it puts around
        all, unless it does something else with this one."""
        messages = [template.user_message(question, order) for order in orders]
        first, (before, after) = self._chat(messages[0]), self._around
        if first == before + messages[0] + after:
            return [before + message + after + template.answer_prefix for message in messages]
        return [self._chat(message) + template.answer_prefix for message in messages]

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the chat template puts before and after a message."""
        before, _, after = self._chat(_MESSAGE).partition(_MESSAGE)
        return before, after

    def label_tokens(self, k: int, template: Template) -> list[int]:
        """Ids of the first K label words at the place where the answer starts.

        Raises ValueError when a label is not exactly one token there, or two labels start alike.
        """
        labels = template.words(k)
        prompt = self.prompt(Question("", "", "?", labels), range(k), template)
        stem = self.tokenizer.encode(prompt, add_special_tokens=False)
        tokens = []
        for label in labels:
            whole = self.tokenizer.encode(prompt + label, add_special_tokens=False)
            if whole[:-1] != stem:
                raise ValueError(
                    f"label {label!r} of template {template.name!r} is not one token of {self.name} after the prompt "
                    f"(it ends in token ids {whole[-3:]}, without the label in {stem[-2:]}): choose other labels or another "
                    "answer_prefix"
                )
            tokens.append(whole[-1])
        if len(set(tokens)) != k:
            raise ValueError(f"labels {template.words(k)} of template {template.name!r} share a token: {tokens}")
        return tokens

    def label_forms(self, k: int, template: Template) -> list[list[int]]:
        """Ids of the tokens that count as each of the first K labels, the label's own first: (label, form) lists of lists.
        More than one only with ``variants``. Raises ValueError as :meth:`label_tokens`."""
        own = self.label_tokens(k, template)
        if not self.variants:
            return [[token] for token in own]
        words = template.words(k)
        prompt = self.prompt(Question("", "", "?", words), range(k), template)
        found = [
            [own[i], *(t for form in forms(word) if (t := self._one_token(form, prompt)) is not None)]
            for i, word in enumerate(words)
        ]
        unknown = {self.tokenizer.unk_token_id, *own}
        return [[tokens[0], *(t for t in dict.fromkeys(tokens[1:]) if t not in unknown)] for tokens in found]

    def _one_token(self, word: str, prompt: str) -> int | None:
        """The token that ``word`` is after the prompt, None where it is none or several."""
        whole = self.tokenizer.encode(prompt + word, add_special_tokens=False)
        return whole[-1] if whole[:-1] == self.tokenizer.encode(prompt, add_special_tokens=False) else None

    def tokenize(self, questions: Sequence[Question], orders: np.ndarray, template: Template) -> list[list[int]]:
        """Token ids of the prompts, order by order of question after question: (item x order) lists."""
        texts = [text for q in questions for text in self.prompts(q, orders, template)]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        # The same ids for two thirds of the time, without Python's lock: beside a running pass that counts.
        backend.no_truncation()
        backend.no_padding()
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def check(self, questions: Sequence[Question], template: Template) -> None:
        for k in sorted({len(q.options) for q in questions}):
            self.label_tokens(k, template)
        self._check_lengths(questions, template)
        if self.least_mass > 0 and questions:
            self._check_mass(questions, template)

    def _check_lengths(self, questions: Sequence[Question], template: Template) -> None:
        """Raises ValueError for a question whose prompt has more tokens than the model has positions."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is None:
            return
        for question in questions:
            order = range(len(question.options))
            text = self.prompt(question, order, template)
            # Of ASCII text a token stands for a character at least; "<" leaves room for a space in front, or an end of text.
            if text.isascii() and len(text) < limit:
                continue
            [prompt] = self.tokenize([question], np.array([order]), template)
            if len(prompt) > limit:
                raise ValueError(
                    f"question {question.id!r} takes {len(prompt)} tokens with template {template.name!r}, {self.name} has "
                    f"{limit} positions: shorten its context, or leave it out"
                )

    def _check_mass(self, questions: Sequence[Question], template: Template) -> None:
        """Raises ValueError when the labels get less than ``least_mass`` of the probability, on :data:`PROBED` questions in
        their original order: in front of a thought, or of prose, label probabilities say nothing."""
        places = np.linspace(0, len(questions) - 1, min(PROBED, len(questions))).astype(int)
        some = [questions[place] for place in places]
        prompts = [self.tokenize([q], np.arange(len(q.options))[None], template) for q in some]
        vocabulary = range(self.model.get_output_embeddings().weight.shape[0])
        passes = forest.stream(self.model, [[prompt] for prompt in prompts], vocabulary, self.max_tokens)
        found = dict(pair for done, _ in passes for pair in done)
        p = np.exp(np.concatenate([found[i] for i in range(len(some))]).astype(np.float64))  # (question, vocabulary)

        def mass(teacher: CausalTeacher) -> float:
            own = {k: sum(teacher.label_forms(k, template), []) for k in {len(q.options) for q in some}}
            return float(np.mean([p[i, own[len(q.options)]].sum() for i, q in enumerate(some)]))

        got, best = mass(self), int(p.mean(axis=0).argmax())
        if got < self.least_mass:
            words = ", ".join(map(repr, template.words(max(len(q.options) for q in some))))
            raise ValueError(
                f"the labels {words} get {got:.1%} of {self.name}'s probability on {len(some)} questions with template "
                f"{template.name!r}, at least {self.least_mass:.0%} is wanted; {self.tokenizer.decode([best])!r} gets "
                f"{p[:, best].mean():.1%}: {self._fix(mass(replace(self, variants=True)))}. --min-label-mass 0 scores anyway"
            )

    def _fix(self, summed: float) -> str:
        """What to pass when labels get too little; ``summed``: what they get with all their forms."""
        if summed >= self.least_mass:
            return f"pass --variants, with which the labels get {summed:.1%}"
        chat = self.tokenizer.chat_template or ""
        for name in _THINKING:
            if re.search(rf"\b{name}\b", str(chat)) and name not in self.template_args:
                return f"""its chat template knows {name}: pass --template-args '{{"{name}": false}}'"""
        replies = "serve it, and read its replies with `permdistill ask --mode answer`"
        if "think" in self._around[1].lower():
            return f"its chat template begins a thought: {replies}"
        return f"give another --template (brief begins the answer), or {replies}"

    def log_probs(self, questions: Sequence[Question], orders: np.ndarray, template: Template) -> np.ndarray:
        result = np.empty((len(questions), *orders.shape), dtype=np.float32)
        for done in self.stream([questions], template, [orders] * len(questions)):
            for place, values in done:
                result[place] = values
        return result

    def stream(
        self, groups: Sequence[Sequence[Question]], template: Template, orders: Sequence[np.ndarray] | None = None
    ) -> Iterator[list[tuple[int, np.ndarray]]]:
        """Log-probabilities (order, option) of questions of any K and context, as they are ready: lists of (place among all
        questions, values). Those of a group should share their context. ``orders``: (order, K) of each; None: all K!."""
        questions = [question for group in groups for question in group]
        ks = sorted({len(question.options) for question in questions})
        labels = {k: self.label_forms(k, template) for k in ks}
        wanted = sorted({token for own in labels.values() for tokens in own for token in tokens})
        columns = {k: [[wanted.index(token) for token in tokens] for tokens in labels[k]] for k in ks}
        shown = [all_orders(len(question.options)) for question in questions] if orders is None else orders
        each = iter(shown)  # of the groups' questions, one after the other
        tokens = ([self.tokenize([question], next(each), template) for question in group] for group in groups)
        for done, n in forest.stream(self.model, tokens, wanted, self.max_tokens):
            self.tokens_forwarded += n
            found = []
            for place, values in done:
                k = len(questions[place].options)
                summed = [np.logaddexp.reduce(values[:, own], axis=1) for own in columns[k]]
                found.append((place, to_options(np.stack(summed, axis=1), shown[place])))
            if found:
                yield found

    @property
    def plan(self) -> str:
        """How much goes through the model at a time, in words."""
        together, at_once = forest.sizes(self.model, self.max_tokens, trie.obstacle(self.model) is None)
        return f"{together:,} prompt tokens a forest, {at_once:,} tokens a pass"


@dataclass
class Seq2SeqTeacher(CausalTeacher):
    """An encoder-decoder: the encoder reads the question, and the decoder's first token is the answer.

    There is no chat template, and no place for a template's ``answer_prefix``: the label stands alone in the decoder. (T5's
    tokenizer reads a line break as a space.)
    """

    def prompt(self, question: Question, order: Sequence[int], template: Template) -> str:
        """What the encoder reads, as text."""
        return template.user_message(question, order)

    def prompts(self, question: Question, orders: np.ndarray, template: Template) -> list[str]:
        return [self.prompt(question, order, template) for order in orders]

    def label_tokens(self, k: int, template: Template) -> list[int]:
        """Ids of the first K label words as the decoder's first token. Raises ValueError as for a decoder-only LM."""
        encoded = [self.tokenizer.encode(label, add_special_tokens=False) for label in template.words(k)]
        for label, tokens in zip(template.words(k), encoded, strict=True):
            if len(tokens) != 1:
                raise ValueError(
                    f"label {label!r} of template {template.name!r} is not one token of {self.name} (token ids {tokens}): "
                    "choose other labels"
                )
        if len({tokens[0] for tokens in encoded}) != k:
            raise ValueError(f"labels {template.words(k)} of template {template.name!r} share a token: {encoded}")
        return [tokens[0] for tokens in encoded]

    @property
    def bare(self) -> bool:
        return False  # none is wanted

    def _one_token(self, word: str, prompt: str) -> int | None:
        tokens = self.tokenizer.encode(word, add_special_tokens=False)
        return tokens[0] if len(tokens) == 1 else None

    @cached_property
    def _around(self) -> tuple[str, str]:
        return "", ""

    def tokenize(self, questions: Sequence[Question], orders: np.ndarray, template: Template) -> list[list[int]]:
        """Token ids of the encoder's inputs with the tokenizer's end of text: (item x order) lists."""
        texts = [text for q in questions for text in self.prompts(q, orders, template)]
        return self.tokenizer(texts, verbose=False)["input_ids"] if texts else []


@dataclass
class PlantedTeacher:
    """log P(o | x, order) = preference of the option + bias of the position it stands at, renormalised.

    preferences  {question id: (K,) option logits}
    bias         (K,) position logits; zeros make an order-invariant teacher
    """

    preferences: dict[str, np.ndarray]
    bias: np.ndarray
    name: str = "planted"
    calls: int = 0

    @property
    def model_key(self) -> str:
        preferences = {name: list(map(float, logits)) for name, logits in self.preferences.items()}
        return "planted " + json.dumps([list(map(float, self.bias)), preferences])

    def check(self, questions: Sequence[Question], template: Template) -> None:
        if unknown := [q.id for q in questions if q.id not in self.preferences]:
            raise ValueError(f"no preferences planted for question {unknown[0]!r} ({len(unknown)} in all): add them")

    def log_probs(self, questions: Sequence[Question], orders: np.ndarray, template: Template) -> np.ndarray:
        self.calls += len(questions)
        preference = np.stack([self.preferences[q.id] for q in questions])[:, None, :]  # (item, 1, option)
        bias = to_options(np.broadcast_to(self.bias, orders.shape), orders)[None]  # (1, order, option)
        return log_softmax(preference + bias, axis=-1).astype(np.float32)


# The committed scores were made in bfloat16 (with a float32 head), and so are new ones, unless asked otherwise.
DTYPE = torch.bfloat16


def model_key(
    name: str, dtype: torch.dtype = DTYPE, template_args: Mapping[str, Any] | None = None, variants: bool = False
) -> str:
    """Identifies a teacher's weights, number format and what else is set: part of the content key of its scores.

    ``name`` is what :func:`permdistill.sources.find` takes. A folder counts by its safetensors, config, tokenizer and chat
    template, a repository of the model hub by its name and, where one is pinned, commit. Raises ValueError for a folder
    without safetensors, whose weights could not be told from others.
    """
    source = sources.find(name)
    key = f"{source.key or _folder_key(source.location())} {str(dtype).removeprefix('torch.')}, float32 head"
    key += f", template arguments {json.dumps(dict(template_args), sort_keys=True)}" if template_args else ""
    return key + ", forms of labels summed" * variants


def _folder_key(folder: str) -> str:
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no *.safetensors: save the model there with save_pretrained")
    for pattern in ("config.json", "tokenizer*", "chat_template*"):
        files += sorted(Path(folder).glob(pattern))
    return "sha256:" + ",".join(sha256_of(f) for f in files)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the machine multiplies it natively, else float32."""
    return torch.bfloat16 if has_bfloat16("cuda" if torch.cuda.is_available() else "cpu") else torch.float32


def has_chat_template(name: str) -> bool:
    """Whether a teacher has a chat template, or needs none since it is an encoder-decoder. Loads no weights."""
    at = sources.find(name).arguments
    return AutoConfig.from_pretrained(**at).is_encoder_decoder or bool(AutoTokenizer.from_pretrained(**at).chat_template)


def load_teacher(
    name: str,
    dtype: torch.dtype = DTYPE,
    max_tokens: int | None = None,
    template_args: Mapping[str, Any] | None = None,
    variants: bool = False,
) -> CausalTeacher:
    """A teacher by name (:func:`permdistill.sources.find`): a folder, a repository of the model hub, or a known model.

    ``template_args``, ``variants``: see :class:`CausalTeacher`. Raises ValueError, before weights are loaded, for an
    argument that the chat template does not read: it would change nothing, and nobody would see that. Raises ValueError for
    weights that lack a tensor.
    """
    key, at = model_key(name, dtype, template_args, variants), sources.find(name).arguments
    tokenizer = AutoTokenizer.from_pretrained(**at)
    seq2seq = AutoConfig.from_pretrained(**at).is_encoder_decoder
    chat = "" if seq2seq else str(tokenizer.chat_template or "")
    if unread := [word for word in template_args or {} if not re.search(rf"\b{re.escape(word)}\b", chat)]:
        raise ValueError(f"{name}: its chat template does not read {unread[0]!r} of the template arguments: leave it out")
    kind = AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM
    loaded: Any = kind.from_pretrained(**at, dtype=dtype, output_loading_info=True)
    model, about = loaded
    sources.check_whole(at["pretrained_model_name_or_path"], about)
    model = with_packed_linears(placed(with_float32_head(model.eval())))
    teacher = (Seq2SeqTeacher if seq2seq else CausalTeacher)(sources.short(name), model, tokenizer, key, max_tokens)
    teacher.template_args, teacher.variants = dict(template_args or {}), variants
    return teacher


def with_float32_head(model: PreTrainedModel) -> PreTrainedModel:
    """Make the model's output layer compute in float32, whatever the rest does.

    A logit of 20 has a step of 1/8 in bfloat16, which is larger than the difference between two summaries that their
    comparison lives on. Measured against float32 throughout, this halves the error of bfloat16 for 1% of the time.
    """
    head = model.get_output_embeddings()
    if head.weight.dtype != torch.float32:
        # A copy, since the weight may be tied to the input embedding, which stays as it is.
        wide = torch.nn.Linear(1, 1, bias=False, device="meta")
        wide.weight = torch.nn.Parameter(head.weight.detach().float(), requires_grad=False)
        if head.bias is not None:
            wide.bias = torch.nn.Parameter(head.bias.detach().float(), requires_grad=False)
        else:
            wide.register_parameter("bias", None)
        wide.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
        model.set_output_embeddings(wide)
    return model
