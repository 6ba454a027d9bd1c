"""Students: a compact encoder + a head (:mod:`permdistill.heads`) x what it reads. A student is a system like any other:
P (item, order, option).

Inputs
    plain       context, question and options: pure distillation
    prediction  also the teacher's one decision for that order: error correction. joint appends "Prediction: A", the others
                mark each option "(chosen)" or "(not chosen)".
    distribution  the text of plain; the teacher's probabilities for that one order, calibrated
                (:mod:`permdistill.corrections`), are added to the logits: white-box error correction, of which the encoder
                learns what is left.

Saved students are ordinary transformers checkpoints plus ``permdistill.json``, the :class:`StudentConfig`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from tokenizers import Encoding
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from permdistill import sources
from permdistill.configs import StudentConfig
from permdistill.corrections import Correction
from permdistill.engine.batches import by_length
from permdistill.engine.placement import has_bfloat16
from permdistill.files import disk_errors, remove, sha256_of, sync
from permdistill.heads import HEADS, OFFSET_POSITIONS, Head, Row, Text, alike, pack
from permdistill.orders import MIN_OPTIONS, to_options, to_positions
from permdistill.questions import Question

CONFIG_FILE = "permdistill.json"


@dataclass
class Student:
    """A model and its tokenizer under a :class:`StudentConfig`. Make one with :func:`build` or :meth:`from_pretrained`.

    ``correction`` belongs to inputs="distribution", ``scale`` to head="bi_encoder": training fits them, before the encoder
    learns anything.
    """

    config: StudentConfig
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    correction: Correction | None = None
    scale: float = 1.0

    @property
    def head(self) -> Head:
        """What is particular to its head."""
        return HEADS[self.config.head]

    def encode(
        self, questions: Sequence[Question], orders: np.ndarray, decisions: np.ndarray | None = None
    ) -> tuple[list[Row], np.ndarray]:
        """Tokenise each *different* sequence once.

        orders (item, order, K) and decisions (item, order) -> (sequences, index). ``index`` says which sequence belongs
        where: (item, order) for the joint head, (item, order, option) for the per-option head, (item, order, 1 + option)
        for the bi-encoder, whose first is the question's. A sequence that is too long loses the end of its context, then
        the beginning of its question, never the prediction. Options that are too long by themselves (:meth:`overlong`) lose
        their ends, with one warning that counts and names their questions. Raises ValueError when questions or decisions do
        not fit the config.
        """
        self._check(questions, orders, decisions)
        questions = self._cut_options(questions)
        seen: dict[Text, int] = {}
        ids: list[str] = []  # of the first question that needs the sequence, for error messages
        index = []
        for i, question in enumerate(questions):
            for j, order in enumerate(orders[i]):
                for text in self.head.texts(question, order, None if decisions is None else int(decisions[i, j])):
                    if text not in seen:
                        ids.append(question.id)
                    index.append(seen.setdefault(text, len(seen)))
        shape = (*orders.shape[:2], *self.head.width(orders.shape[2]))
        return self._tokenise(list(seen), ids), np.array(index, dtype=np.int64).reshape(shape)

    def overlong(self, questions: Sequence[Question]) -> dict[int, int]:
        """Questions with options that max_length has no room for beside 1 token of the question: {item: the most tokens that
        an option of it can keep}."""
        k, decision = self.config.k or MIN_OPTIONS, 0 if self.config.inputs == "prediction" else None
        texts = self.head.texts(Question("", "", "?", ("",) * k), range(k), decision)
        around = max(len(self._tokens(text.second)) for text in texts)  # labels and marks
        pair = len(self.head.columns(texts)) > 1
        room = self.config.max_length - self.tokenizer.num_special_tokens_to_add(pair) - around - pair
        found = {}
        for i, question in enumerate(questions):
            if sum(len(option.encode()) for option in question.options) <= room:  # no token without a byte
                continue
            sizes = [len(self._tokens(option)) for option in question.options]
            if (max(sizes) if self.head.equivariant else sum(sizes)) > room:
                fits = (n for n in range(room, 0, -1) if sum(min(size, n) for size in sizes) <= room)
                found[i] = room if self.head.equivariant else next(fits, 1)
        return found

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """Where the tokens of a text begin and end."""
        return self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]

    def _cut_options(self, questions: Sequence[Question]) -> Sequence[Question]:
        """The questions, without the ends of options that are too long."""
        if not (long := self.overlong(questions)):
            return questions
        ids = ", ".join(repr(questions[i].id) for i in list(long)[:5]) + ", .." * (len(long) > 5)
        what = f"{len(long)} of {len(questions)} questions have options that max_length {self.config.max_length} cuts off"
        warnings.warn(f"{what}: {ids}", stacklevel=3)
        result = list(questions)
        for i, n in long.items():
            ends = [(option, self._tokens(option)) for option in questions[i].options]
            options = tuple(option[: places[n - 1][1]] if len(places) > n else option for option, places in ends)
            result[i] = replace(questions[i], options=options)
        return result

    def _check(self, questions: Sequence[Question], orders: np.ndarray, decisions: np.ndarray | None) -> None:
        k = self.config.k or orders.shape[-1]
        for question in questions:
            if len(question.options) != k:
                whose = "the student k" if self.config.k else "the orders K"
                raise ValueError(f"question {question.id!r} has {len(question.options)} options, {whose} = {k}")
        fits = orders.ndim == 3 and (orders.shape[0], orders.shape[2]) == (len(questions), k)
        if not fits or (np.sort(orders, axis=-1) != np.arange(k)).any():
            raise ValueError(f"orders of shape {orders.shape[1:]}: give (order, {k}) permutations of 0..{k - 1}")
        if (decisions is not None) != (self.config.inputs == "prediction"):
            state = "missing" if decisions is None else "given"
            fix = "'prediction' needs the teacher's option indices (item, order), the others take none"
            raise ValueError(f"inputs={self.config.inputs!r} and decisions {state}: {fix}")
        if decisions is None:
            return
        if decisions.shape != orders.shape[:2] or not np.issubdtype(decisions.dtype, np.integer):
            raise ValueError(f"decisions of shape {decisions.shape}, {decisions.dtype}: give integers {orders.shape[:2]}")
        for i, j in np.argwhere((decisions < 0) | (decisions >= k))[:1]:
            raise ValueError(f"question {questions[i].id!r}, order {j}: decision {decisions[i, j]}, give 0..{k - 1}")

    def _tokenise(self, different: list[Text], ids: list[str], chunk: int = 1024) -> list[Row]:
        rows: list[Row] = []
        sets: dict[Text, int] = {}  # numbers of what sees each other
        for start in range(0, len(different), chunk):
            part = different[start : start + chunk]
            encoded = self.tokenizer(*self.head.columns(part), verbose=False)
            names = [name for name in encoded if name != "attention_mask"]
            for i, text in enumerate(part):
                cut = self._cut(encoded[i], text, ids[start + i])
                own = {name: encoded[name][i] for name in names}
                if self.head.packs:
                    second = np.maximum.accumulate([part == 1 for part in encoded[i].sequence_ids])
                    second[-1] = True  # an option without any token is its end alone
                    asked = text._replace(second="")
                    own["option"] = second * (sets.setdefault(asked, len(sets) + 2) if text.among else 1)
                rows.append({name: np.delete(np.array(values, dtype=np.int32), cut) for name, values in own.items()})
        return rows

    def _cut(self, encoding: Encoding, text: Text, id_: str) -> list[int]:
        """Places of the tokens to drop, so that max_length remain."""
        excess = len(encoding.ids) - self.config.max_length
        if excess <= 0:
            return []
        first = [place for place, part in enumerate(encoding.sequence_ids) if part == 0 and text.first]
        if excess >= len(first):
            raise ValueError(
                f"question {id_!r}: {text.second[:60]!r}.. and 1 token of the question take "
                f"{len(encoding.ids) - len(first) + 1} tokens, max_length is {self.config.max_length}: give a larger one"
            )
        offsets = encoding.offsets  # made anew by each look at them
        n_context = sum(offsets[place][1] <= len(text.context) for place in first)
        begin = max(n_context - excess, 0)
        return first[begin : begin + excess]

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        """One forward pass: logits (sequence, K) by position for the joint head, (sequence, 1) for the per-option head,
        embeddings of length 1 (sequence, hidden) for the bi-encoder, whose short sequences may have a pass of their own."""
        return self.head.forward(self._pass, rows)

    def _pass(self, rows: Sequence[Row]) -> torch.Tensor:
        inputs = {}
        for name in rows[0]:
            fill = self.tokenizer.pad_token_id if name == "input_ids" else 0
            inputs[name] = pad_sequence(
                [torch.from_numpy(r[name]).long() for r in rows], batch_first=True, padding_value=fill
            )
        lengths = torch.tensor([len(r["input_ids"]) for r in rows])
        inputs["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()  # (sequence, token)
        return self.head.outputs(self.model, {name: value.to(self.model.device) for name, value in inputs.items()})

    def logits(self, outputs: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        """What :meth:`forward` gives for the different sequences -> logits (item, order, position) for the joint head,
        (item, order, option) for the others. ``index`` is that of :meth:`encode`."""
        return self.head.logits(outputs[torch.from_numpy(index)], self.scale)

    def offsets(self, distributions: np.ndarray | None, orders: np.ndarray) -> np.ndarray | float:
        """What the teacher's probabilities (item, order, option) in ``orders`` (item, order, K) add to the logits, in the
        axes of :meth:`logits`; 0 for other inputs. Raises ValueError when they are missing, or given where none belong."""
        if (distributions is not None) != (self.config.inputs == "distribution"):
            state = "missing" if distributions is None else "given"
            fix = "'distribution' needs the teacher's probabilities (item, order, option), the others take none"
            raise ValueError(f"inputs={self.config.inputs!r} and distributions {state}: {fix}")
        if distributions is None:
            return 0.0
        if np.shape(distributions) != orders.shape:
            raise ValueError(
                f"distributions of shape {np.shape(distributions)}: give (item, order, option) = {orders.shape}"
            )
        if self.correction is None:
            raise ValueError("this student has no correction yet: train it, or load a trained one")
        logits = self.correction.logits(distributions, orders)
        return logits if self.head.equivariant else to_positions(logits, orders)

    def predict(
        self,
        question: str,
        options: Sequence[str],
        context: str = "",
        decision: int | None = None,
        distribution: Sequence[float] | None = None,
    ) -> np.ndarray:
        """Probabilities of the K options of one question, (K,), in the order in which they are given.

        decision      index of the option that the teacher chose in this order, for inputs="prediction"
        distribution  (K,) the teacher's probabilities in this order, for inputs="distribution"
        """
        decisions = None if decision is None else np.array([[decision]])
        distributions = None if distribution is None else np.array([[distribution]])
        one = Question("question", context, question, tuple(options))
        return self.predict_batch([one], np.arange(len(options))[None], decisions, distributions)[0, 0]

    def predict_batch(
        self,
        questions: Sequence[Question],
        orders: np.ndarray,
        decisions: np.ndarray | None = None,
        distributions: np.ndarray | None = None,
        batch_tokens: int = 4096,
        autocast: bool | None = None,
    ) -> np.ndarray:
        """P (item, order, option), float64, in option space.

        orders        (order, K)
        decisions     (item, order) option indices, the teacher's; required for inputs="prediction", else refused
        distributions (item, order, option) the teacher's probabilities; required for inputs="distribution", else refused
        batch_tokens  tokens a forward pass, padding included; bounds the memory above the weights
        autocast      bfloat16 matrix products; None: where the machine has units for them
        """
        orders = np.asarray(orders)
        offsets = self.offsets(distributions, np.broadcast_to(orders, (len(questions), *orders.shape)))
        same = self.head.equivariant and decisions is None  # nothing depends on the order: compute it once
        used = orders[:1] if same else orders
        rows, index = self.encode(questions, np.broadcast_to(used, (len(questions), *used.shape)), decisions)
        together = alike(rows) if self.head.packs else [[i] for i in range(len(rows))]  # what one pass has to hold
        sizes = (pack([rows[i] for i in own])[0] if self.head.packs else [rows[i] for i in own] for own in together)
        lengths = np.array([len(one["input_ids"]) for (one,) in sizes], dtype=np.int64)
        outputs: list[torch.Tensor] = [torch.empty(0)] * len(rows)
        self.model.eval()
        bar = tqdm(total=len(rows), unit="sequence", desc=f"predict {self.config.head}", delay=1)
        with bar, torch.inference_mode(), mixed_precision(self.model.device, autocast):
            for units in by_length(lengths, batch_tokens):
                batch = [i for unit in units for i in together[unit]]
                for i, output in zip(batch, self.forward([rows[i] for i in batch]).cpu(), strict=True):
                    outputs[i] = output
                bar.update(len(batch))
        p = softmax(self.logits(torch.stack(outputs).double(), index).numpy() + offsets, axis=-1)
        if not self.head.equivariant:
            p = to_options(p, orders)
        return np.broadcast_to(p, (len(questions), *orders.shape)).copy()

    def save(self, path: str | Path) -> None:
        """Write a transformers checkpoint and permdistill.json. A kill leaves no folder that loads as something half old."""
        path = Path(path)
        part = path / ".part"
        remove(part)
        try:
            with disk_errors(path):
                self._write(part)
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            raise
        (path / CONFIG_FILE).unlink(missing_ok=True)  # without it the folder is no student; it comes back last
        for file in sorted(part.iterdir(), key=lambda file: file.name == CONFIG_FILE):
            os.replace(file, path / file.name)
        part.rmdir()

    def _write(self, part: Path) -> None:
        part.mkdir(parents=True)
        with _quiet():
            self.model.save_pretrained(part)
        self.tokenizer.save_pretrained(part)
        settings = asdict(self.config) | ({"correction": asdict(self.correction)} if self.correction else {})
        settings |= {"scale": self.scale} if self.head.scaled else {}
        hashes = {file.name: sha256_of(file) for file in sorted(part.iterdir())} | {CONFIG_FILE: _sha256(settings)}
        (part / CONFIG_FILE).write_text(json.dumps(settings | {"sha256": hashes}, indent=2) + "\n", encoding="utf-8")
        for file in part.iterdir():
            sync(file)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Student:
        """A student that :meth:`save` wrote. Raises FileNotFoundError when ``path`` is none, or only half written, and
        ValueError that names file and field where something in it is missing, makes no sense, or is not what was saved
        (students of version 0.1 have no hashes: of these only what is missing or impossible is seen)."""
        file = Path(path) / CONFIG_FILE
        if not file.exists():
            raise FileNotFoundError(f"{path} has no {CONFIG_FILE}: give a folder that Student.save finished")
        config, correction, scale, hashes = _settings(file)
        for name, sha256 in hashes.items():
            if not (file.parent / name).is_file() or sha256_of(file.parent / name) != sha256:
                raise ValueError(f"{file.parent / name} is not what was saved: restore it, or save the student again")
        try:
            student = _load(config, sources.Source(lambda: str(path)), whole=True)
        except Exception as error:  # of whichever library reads a file that is damaged
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} cannot be loaded ({why}): restore its files, or save the student again") from error
        student.scale, student.correction = scale, correction
        return student


def _sha256(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _settings(file: Path) -> tuple[StudentConfig, Correction | None, float, dict[str, str]]:
    """What ``permdistill.json`` says, and the hashes of the other files. Every field has to be there: a default would make
    it another student."""
    kinds = {"encoder": str, "head": str, "inputs": str, "k": int, "max_length": int}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        for name, kind in kinds.items():
            if type(found.get(name)) is not kind:
                raise ValueError(f"field {name!r} is {found.get(name)!r}")
        config, correction, scale = StudentConfig(**{name: found[name] for name in kinds}), None, 1.0
        if HEADS[config.head].scaled:
            scale = _number("scale", found.get("scale"))
        if config.inputs == "distribution":
            own = found["correction"]
            position = tuple(_number("correction", value) for value in own["position"])
            if len(position) != config.k:
                raise ValueError(f"field 'correction' has {len(position)} positions, k is {config.k}")
            correction = Correction(_number("correction", own["scale"]), position)
        if unknown := found.keys() - {*kinds, "scale", "correction", "sha256"}:
            raise ValueError(f"field {min(unknown)!r} is not known")
        hashes = dict(found.pop("sha256", {}))
        if hashes and hashes.pop(CONFIG_FILE) != _sha256(found):
            raise ValueError("it is not what was saved")
        return config, correction, scale, hashes
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}): restore it, or save the student again") from error


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
        raise ValueError(f"field {name!r} is {value!r}: no finite number")
    return float(value)


def build(config: StudentConfig, seed: int) -> Student:
    """An untrained student: the encoder's weights, in float32, under a new random head (the bi-encoder has none). Seeds
    torch with ``seed``.

    Raises ValueError when the encoder has fewer positions than max_length.
    """
    return _load(config, sources.find(config.encoder), seed)


def encoder_key(name: str) -> str:
    """Identifies an encoder by the content of its weights where they are at hand: changed weights, changed key."""
    source = sources.find(name)
    if source.key:
        return source.key
    weights = sorted(Path(source.location()).glob("*.safetensors"))
    return f"sha256:{','.join(sha256_of(w) for w in weights)}" if weights else f"hub:{name}"


def _load(config: StudentConfig, source: sources.Source, seed: int = 0, whole: bool = False) -> Student:
    """``whole``: the checkpoint has to hold every weight, since what it lacks would be random."""
    at = source.arguments
    tokenizer = AutoTokenizer.from_pretrained(**at)
    settings: dict[str, Any] = {**at, "dtype": torch.float32}
    # Dropout on attention probabilities keeps torch from its fused attention: training takes 3 times as long with it.
    if hasattr(AutoConfig.from_pretrained(**at), "attention_probs_dropout_prob"):
        settings["attention_probs_dropout_prob"] = 0.0
    with _quiet():
        torch.manual_seed(seed)  # what a checkpoint lacks, here the head, is drawn inside from_pretrained
        settings |= HEADS[config.head].settings(config.k)
        model, about = HEADS[config.head].model.from_pretrained(**settings, output_loading_info=True)
    if whole:
        sources.check_whole(source.location(), about)
    positions = getattr(model.config, "max_position_embeddings", None) or config.max_length
    if model.config.model_type in OFFSET_POSITIONS:
        positions -= model.config.pad_token_id + 1
    if config.max_length > positions:
        raise ValueError(
            f"max_length = {config.max_length}: encoder {config.encoder!r} has {positions} positions, give no more"
        )
    return Student(config, model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report that the head is new, which is the purpose, and without its progress bars."""
    verbosity, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def mixed_precision(device: torch.device, autocast: bool | None = None) -> torch.autocast:
    """bfloat16 matrix products over float32 weights; None: where the machine has units for them."""
    if autocast is None:
        autocast = has_bfloat16(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast)
