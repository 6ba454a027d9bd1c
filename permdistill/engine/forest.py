"""Any number of prompts, group by group -> forests: many groups a forward pass, and the next ones prepared meanwhile.

What groups have in common (a chat template, an instruction) is paid once a forest, and every pass is full. A forest is cut
into passes by :mod:`permdistill.engine.trie`; what has gone through is handed out pass by pass, so that a kill loses a few
seconds of work, however large the forest. Groups that the trie cannot serve exactly go through in batches.

A *unit* is a list of prompts that are handed out together (the orders of a question), a *group* a list of units that share
much, which are never torn apart. A pass that does not fit into memory is tried again at half of its size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import PreTrainedModel

from permdistill.engine import batches, trie
from permdistill.engine.placement import out_of_memory

# Tokens of all prompts of a forest, before sharing. On a CPU the passes are small, and a forest of these hides what its
# questions share (16 or more of them: 94% of what can be saved); a GPU needs several full passes of thousands of nodes.
PROMPT_TOKENS, PROMPT_TOKENS_GPU = 1 << 16, 1 << 18
LEAST = 16  # tokens: a pass of so few that does not fit into memory is an error

Unit = Sequence[Sequence[int]]
Done = list[tuple[int, np.ndarray]]
T = TypeVar("T")


def sizes(model: PreTrainedModel, max_tokens: int | None = None, packed: bool = True) -> tuple[int, int]:
    """(tokens of a forest's prompts, tokens of a forward pass) for the model's machine.

    max_tokens  of a pass, where somebody knows better. What did not fit into memory before has halved it
    packed      whether the passes go over the prompts' trie, or in batches
    """
    forest = PROMPT_TOKENS if model.device.type == "cpu" else PROMPT_TOKENS_GPU
    usual = max_tokens or (trie if packed else batches).tokens_a_pass(model)
    return forest, max(LEAST, usual >> _HALVED.get(model, 0))


_HALVED: WeakKeyDictionary[PreTrainedModel, int] = WeakKeyDictionary()  # how often


def stream(
    model: PreTrainedModel,
    groups: Iterable[Sequence[Unit]],
    tokens: Sequence[int],
    max_tokens: int | None = None,
    prompt_tokens: int | None = None,
) -> Iterator[tuple[Done, int]]:
    """Log-probabilities of ``tokens`` after every prompt of ``groups``, as they are ready.

    max_tokens     of a forward pass; None: what suits the machine (:func:`sizes`)
    prompt_tokens  of all prompts of a forest, or one group; None: what suits the machine. 1: a group a forest
    Yields the units done by a pass, [(number of the unit in all groups, (prompt, label))], and the tokens that it took.
    ``groups`` are drawn, in another thread, one forest ahead. Raises ValueError for an empty prompt, and what
    :func:`permdistill.engine.batches.next_token_log_probs` raises.
    """
    trie.obstacle(model)  # tried here, not beside a running pass
    first = 0
    for units, tree in _one_ahead(_forests(model, groups, prompt_tokens or sizes(model)[0])):
        for done, n in _through(model, units, tree, tokens, max_tokens):
            yield [(first + unit, values) for unit, values in done], n
        first += len(units)


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; each is made in a thread while the one before it is in use."""
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(next, items, None)
        while (item := following.result()) is not None:
            following = thread.submit(next, items, None)
            yield item


def _forests(
    model: PreTrainedModel, groups: Iterable[Sequence[Unit]], limit: int
) -> Iterator[tuple[list[Unit], trie.Trie | None]]:
    """Units of a forest and their trie; None where they are to go through in batches."""
    units: list[Unit] = []
    size, packed = 0, True
    for group in groups:
        lengths = [len(prompt) for unit in group for prompt in unit]
        own = trie.obstacle(model, max(lengths, default=0)) is None
        if units and (size + sum(lengths) > limit or own != packed):
            yield units, _tree(units, packed)
            units, size = [], 0
        units.extend(group)
        size, packed = size + sum(lengths), own
    if units:
        yield units, _tree(units, packed)


def _tree(units: Sequence[Unit], packed: bool = True) -> trie.Trie | None:
    return trie.build([prompt for unit in units for prompt in unit]) if packed else None


def _through(
    model: PreTrainedModel, units: list[Unit], tree: trie.Trie | None, tokens: Sequence[int], max_tokens: int | None
) -> Iterator[tuple[Done, int]]:
    """:func:`stream` of one forest, in smaller passes when memory does not suffice."""
    waiting = list(range(len(units)))
    while True:
        finished: set[int] = set()
        limit = sizes(model, max_tokens, packed=tree is not None)[1]
        engine = batches if tree is None else trie
        prompts = tree if tree is not None else [prompt for i in waiting for prompt in units[i]]
        try:
            passes = engine.forward(model, prompts, tokens, limit)
            for done, n in _units(passes, [len(units[i]) for i in waiting], len(tokens)):
                finished.update(waiting[i] for i, _ in done)
                yield [(waiting[i], values) for i, values in done], n
            return
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or limit <= LEAST:
                raise
        _HALVED[model] = _HALVED.get(model, 0) + 1
        warnings.warn(f"out of memory in a pass of {limit} tokens: going on with {limit // 2}", stacklevel=2)
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        waiting = [i for i in waiting if i not in finished]
        tree = None if tree is None else _tree([units[i] for i in waiting])


def _units(
    passes: Iterator[tuple[np.ndarray, np.ndarray, int]], lengths: Sequence[int], width: int
) -> Iterator[tuple[Done, int]]:
    """Passes over prompts -> units of so many prompts each, when their last prompt is there."""
    left, start = np.array(lengths, dtype=np.int64), np.cumsum([0, *lengths])
    unit = np.repeat(np.arange(len(left)), left)
    result = np.empty((len(unit), width), dtype=np.float32)
    for places, log_probs, n in passes:
        result[places] = log_probs
        np.subtract.at(left, unit[places], 1)
        ready = [int(i) for i in np.unique(unit[places]) if not left[i]]
        yield [(i, result[start[i] : start[i + 1]]) for i in ready], n
