"""What a student is, and how it is trained: plain settings, checked when they are made. Loads no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from permdistill.orders import MAX_OPTIONS, MIN_OPTIONS

HEADS = ("joint", "per_option", "shared_prefix", "cross_option", "bi_encoder")
INPUTS = ("plain", "prediction", "distribution")


@dataclass(frozen=True)
class StudentConfig:
    """What a student is, before any training.

    encoder     what :func:`permdistill.sources.find` takes: "all-MiniLM-L6-v2", a local folder, a hub repository
    head        joint | per_option | shared_prefix | cross_option | bi_encoder
    inputs      plain | prediction | distribution
    k           number of options, 2..26; 0: any, for all heads but joint
    max_length  tokens a sequence; only context and question are ever cut, see :meth:`Student.encode`
    """

    encoder: str
    head: str = "joint"
    inputs: str = "plain"
    k: int = 4
    max_length: int = 256

    def __post_init__(self) -> None:
        if not self.encoder:
            raise ValueError(f"encoder {self.encoder!r}: give an asset's name, a folder, or a hub repository")
        for name, value, known in (("head", self.head, HEADS), ("inputs", self.inputs, INPUTS)):
            if value not in known:
                raise ValueError(f"{name} {value!r}: give one of {', '.join(known)}")
        any_k = self.head != "joint" and self.inputs != "distribution"  # what is fitted has its K
        if not (MIN_OPTIONS <= self.k <= MAX_OPTIONS or (self.k == 0 and any_k)):
            more = " (0, any number, is for all heads but joint, without distributions)"
            raise ValueError(f"k = {self.k} options: give {MIN_OPTIONS}..{MAX_OPTIONS}{more * (self.k == 0)}")
        if self.max_length < 8:
            raise ValueError(f"max_length = {self.max_length} tokens: give at least 8")


@dataclass(frozen=True)
class TrainingConfig:
    """How a student is trained.

    epochs         times that each question is seen; 0: an untrained student, fitted scale and correction apart
    learning_rate  its maximum, after warm-up
    warmup         share of the steps in which it rises linearly; then it falls linearly to 0
    weight_decay   AdamW's, on matrices only
    batch_size     questions a step
    micro_tokens   a step runs in pieces of at most so many tokens, padding included; bounds the memory, not the mathematics
    max_grad_norm  longer gradients are scaled down to this norm
    save_every     steps between checkpoints; there are more after each epoch and every training.SAVE_SECONDS
    seed           of the new head, the orders, the decisions, the batches and the dropout
    held_out       share of the questions that are not trained on: the epoch with the lowest KL on them is the one that is
                   kept. Like all of training, that reads no gold answer. 0: the last epoch is kept
    patience       with held_out: training stops after so many epochs in a row without a new lowest KL
    """

    epochs: int = 3
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.01
    batch_size: int = 16
    micro_tokens: int = 2048
    max_grad_norm: float = 1.0
    save_every: int = 100
    seed: int = 0
    held_out: float = 0.0
    patience: int = 2

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs = {self.epochs}: give a number of at least 0")
        for name in ("learning_rate", "batch_size", "micro_tokens", "max_grad_norm", "save_every", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)!r}: give a number above 0")
        if not (0 <= self.warmup < 1 and 0 <= self.held_out < 1) or self.weight_decay < 0 or self.seed < 0:
            raise ValueError(f"{self}: give warmup and held_out in [0, 1), weight_decay and seed of at least 0")

    @property
    def key(self) -> dict[str, Any]:
        """What the trained weights depend on. What is not used does not count, so that a new option voids no student."""
        return {name: value for name, value in asdict(self).items() if self.held_out or name not in ("held_out", "patience")}
