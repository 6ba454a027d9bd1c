"""Many prompts that share prefixes -> forward passes over their trie, exact.

The orders of one question share the instruction, the context, the question and every common prefix of options; the pairs
of one document share the article and the first summary. The token trie of all prompts holds each shared token once. A
node may attend to its ancestors only, and its position is its depth, so every prompt sees exactly the tokens, positions
and attention that it would see alone: the same distributions up to rounding, for a fraction of the tokens.

The trie is built from the *whole* prompts' token ids, so no assumption on how text segments tokenise is needed.

A trie too large for one forward is cut into even slices of its depth-first sequence. The ancestors of a slice's nodes lie
in the slice or on the path to its first node, so the cache keeps that path's keys and values and drops all others: memory
depends on the slice and on the longest prompt, not on the number of prompts, and every forward pass is equally full.

Models for which this would not be exact are named by :func:`obstacle`; :mod:`permdistill.engine.batches` serves them.
"""

from __future__ import annotations

import inspect
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from permdistill.engine.attention import (
    BLOCKS,
    FLEX_FROM,
    PAST_FROM,
    PRODUCTS,
    block_mask,
    dense_mask,
    fast_attention,
    flexible,
    rounded,
)
from permdistill.engine.batches import next_token_log_probs as next_token_in_batches
from permdistill.engine.batches import positions_change_at
from permdistill.engine.placement import out_of_memory

# Tokens a forward pass. On a CPU a matrix product of 256 rows is as fast as a larger one, and attention wastes less on
# nodes that are no ancestors (measured on an AMD CPU: 13% faster than 512 on summaries, 6% on short questions). Intel's
# matrix units (AMX) are three times as fast, so that fewer passes over the weights pay (up to 7%). A GPU wants more.
MAX_TOKENS, MAX_TOKENS_AMX, MAX_TOKENS_GPU = 256, 512, 8192


@dataclass(frozen=True)
class Trie:
    """Token trie in depth-first order: a node's subtree is the slice ``i : end[i]``, so that node ``i`` is an ancestor of
    (or is) node ``j`` exactly when ``i <= j < end[i]``.

    tokens  (node,) token ids
    parent  (node,) index of the parent, -1 for a root
    depth   (node,) position of the token in its prompt
    end     (node,) one past the last node of the subtree
    leaf    (prompt,) node of each prompt's last token
    """

    tokens: np.ndarray
    parent: np.ndarray
    depth: np.ndarray
    end: np.ndarray
    leaf: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def above(self, node: int) -> np.ndarray:
        """The proper ancestors of ``node``, root first: (depth of the node,) nodes."""
        path = []
        while (node := int(self.parent[node])) >= 0:
            path.append(node)
        return np.array(path[::-1], dtype=np.int64)


def build(prompts: Sequence[Sequence[int]]) -> Trie:
    """Token ids of all prompts -> their trie. Raises ValueError on an empty prompt."""
    n, lengths = len(prompts), np.fromiter(map(len, prompts), np.int64, len(prompts))
    if (lengths == 0).any():
        raise ValueError("an empty prompt has no last token to read label logits from")
    column = np.arange(lengths.max(initial=0))
    # A row is a prompt, 0 where it has ended. Big-endian bytes sort as the numbers do, and prompts in lexicographic order
    # are the trie's leaves in depth-first order.
    ids = np.zeros((n, len(column)), dtype=">u4")
    ids[column < lengths[:, None]] = np.fromiter(chain.from_iterable(prompts), np.int64, lengths.sum()) + 1
    rows = [row.tobytes() for row in ids]
    order = np.array(sorted(range(n), key=rows.__getitem__), dtype=np.int64)
    ids, lengths = ids[order].astype(np.int32), lengths[order]
    # A prompt shares with the one before it what it shares with any of those before; a duplicate shares everything.
    differs = ids[1:] != ids[:-1]
    shared = np.zeros(n, dtype=np.int64)
    shared[1:] = np.where(differs.any(1), differs.argmax(1) if len(column) else 0, len(column))
    new = (column >= shared[:, None]) & (column < lengths[:, None])  # (prompt, depth): a node that it is the first to have
    first = np.concatenate([[0], new.sum(1).cumsum()])  # of its new nodes
    size, first = int(first[-1]), first[:-1]
    node = np.maximum.accumulate(np.where(new, first[:, None] + column - shared[:, None], -1), axis=0)
    parent, branches = np.arange(size) - 1, np.flatnonzero(new.any(1))
    parent[first[branches]] = np.where(shared[branches] > 0, node[branches, shared[branches] - 1], -1)
    # A subtree ends where a later prompt shares less than the node's depth.
    stop = np.full((n + 1, len(column)), size)
    stop[:-1] = np.where(shared[:, None] <= column, first[:, None], size)
    end = np.minimum.accumulate(stop[::-1], axis=0)[-2::-1][new]
    leaf = np.empty(n, dtype=np.int64)
    leaf[order] = node[np.arange(n), lengths - 1]
    return Trie((ids[new] - 1).astype(np.int64), parent, np.nonzero(new)[1], end, leaf)


@dataclass(frozen=True)
class Step:
    """One forward pass: nodes ``start : stop``, while the cache holds ``past``, the proper ancestors of ``start``."""

    start: int
    stop: int
    past: np.ndarray

    @property
    def held(self) -> np.ndarray:
        """Nodes whose keys and values the cache holds after the pass, in its order."""
        return np.concatenate([self.past, np.arange(self.start, self.stop)])


def plan(trie: Trie, max_tokens: int = MAX_TOKENS, even: bool = True) -> Iterator[Step]:
    """Cut the trie's depth-first sequence into as few slices of at most ``max_tokens`` tokens as possible: even ones, or all
    of ``max_tokens`` but the last."""
    n = -(-len(trie) // max_tokens)
    for i in range(n):
        start, stop = (len(trie) * j // n if even else min(len(trie), max_tokens * j) for j in (i, i + 1))
        yield Step(start, stop, trie.above(start))


def attended(trie: Trie) -> int:
    """Pairs (token, token it attends to), itself included: what attention's cost is proportional to."""
    return int((trie.depth + 1).sum())


def _sent(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """An array on the device; a GPU goes on computing meanwhile."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _hold(cache: DynamicCache, places: torch.Tensor) -> None:
    """Keep these places of the cache, drop the others."""
    layer: Any  # a DynamicLayer, since the cache was made without a config
    for layer in cache.layers:
        if layer.is_initialized:
            index = places.to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)


def _laid_out(step: Step, cache: DynamicCache, held: np.ndarray, size: int, blocks: bool) -> tuple[np.ndarray, np.ndarray]:
    """Drop from the cache what ``step`` does not need. ``held`` are the nodes of its places before. Returns those after the
    pass, and the pass's own; for attention by blocks both are filled up with ``size``, which stands for no node."""
    past, own = step.past, np.arange(step.start, step.stop)
    if blocks:
        past = np.append(past, np.full(rounded(len(past), PAST_FROM, 4) - len(past), size))
        own = np.append(own, np.full(rounded(len(own), FLEX_FROM, 2) - len(own), size))
    if len(held):
        place = np.zeros(size + 1, dtype=np.int64)
        place[held] = np.arange(len(held))
        _hold(cache, torch.from_numpy(place[past]))
    return np.concatenate([past, own]), own


def tokens_a_pass(model: PreTrainedModel) -> int:
    """Tokens of a forward pass that suit the model's machine."""
    if model.device.type != "cpu":
        return MAX_TOKENS_GPU
    return MAX_TOKENS_AMX if torch.cpu._is_amx_tile_supported() else MAX_TOKENS


@torch.inference_mode()
def next_token_log_probs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[int], max_tokens: int | None = None
) -> tuple[np.ndarray, int]:
    """Log-probabilities of ``tokens`` as the next token after each prompt.

    prompts     token ids, any lengths; the more they share, the cheaper
    tokens      ids of the label tokens
    max_tokens  a forward pass, bounds the memory; None: what suits the machine (:func:`tokens_a_pass`)
    Returns ``log_probs`` (prompt, label), over the whole vocabulary, float32, and
    the number of tokens that went through the model. Raises ValueError for a model or prompt that :func:`obstacle` names.
    """
    if problem := obstacle(model, max(map(len, prompts), default=0)):
        raise ValueError(f"{problem}: use permdistill.engine.batches instead")
    return through(model, build(prompts), tokens, max_tokens or tokens_a_pass(model))


def _read(places: np.ndarray, row: np.ndarray, log_probs: torch.Tensor, n: int) -> tuple[np.ndarray, np.ndarray, int]:
    return places, log_probs.cpu().numpy()[row], n


def through(
    model: PreTrainedModel, trie: Trie, tokens: Sequence[int], max_tokens: int, blocks: bool | None = None
) -> tuple[np.ndarray, int]:
    """:func:`next_token_log_probs` of a trie that is built, and a model that has no :func:`obstacle`."""
    result, forwarded = np.empty((len(trie.leaf), len(tokens)), dtype=np.float32), 0
    for places, log_probs, n in forward(model, trie, tokens, max_tokens, blocks):
        result[places] = log_probs
        forwarded += n
    return result, forwarded


@torch.inference_mode()
def forward(
    model: PreTrainedModel, trie: Trie, tokens: Sequence[int], max_tokens: int, blocks: bool | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """:func:`next_token_log_probs` pass by pass: (places of the prompts that end in it, their log-probabilities, tokens
    that it took). ``blocks``: attention by blocks (FlexAttention) or not; None: in passes where it is known to be faster."""
    able = max_tokens >= FLEX_FROM and flexible(model) and _BY_BLOCKS.get(model, False) if blocks is None else blocks
    least = FLEX_FROM if blocks is None else 0
    order = np.argsort(trie.leaf, kind="stable")  # prompts by the node at which they end
    leaves, size = trie.leaf[order], len(trie)
    ids, depth, end = (_sent(np.append(a, 0), model.device) for a in (trie.tokens, trie.depth, trie.end))
    # Without the model's config: no layer forgets what lies outside a window, the mask alone decides (see obstacle).
    cache, held = DynamicCache(), np.empty(0, dtype=np.int64)
    wanted = torch.tensor(list(tokens), device=model.device)
    waiting: deque[tuple[np.ndarray, np.ndarray, torch.Tensor, int]] = deque()
    at = torch.device("cpu") if hasattr(model, "hf_device_map") else model.device  # see placement.spread
    for step in plan(trie, max_tokens, even=not able):
        blocks = able and step.stop - step.start >= least
        held, query = _laid_out(step, cache, held, size, blocks)
        key, nodes, asking = (_sent(a, model.device) for a in (held, query, np.minimum(query, step.stop - 1)))
        lowest, highest = np.searchsorted(leaves, [step.start, step.stop])
        ends, row = np.unique(leaves[lowest:highest], return_inverse=True)
        places = _sent(ends - step.start, at) if len(ends) else 1
        mask = block_mask(key, end[key], asking) if blocks else dense_mask(key, end[key], asking, model.dtype)
        with fast_attention(model, blocks):
            output = model(
                input_ids=ids[nodes][None],
                position_ids=depth[nodes][None],
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=places,
            )
        logits = output.logits[0].float()
        log_probs = logits[:, wanted.to(logits.device)] - logits.logsumexp(-1, keepdim=True)
        waiting.append((order[lowest:highest], row, log_probs, step.stop - step.start))
        if model.device.type == "cpu" or len(waiting) > 1:  # a GPU gets its next pass before the last one is read
            yield _read(*waiting.popleft())
    for last in waiting:
        yield _read(*last)


def obstacle(model: PreTrainedModel, longest: int = 0) -> str | None:
    """Why the trie would not give a prompt of ``longest`` tokens what it gets alone, None if it does.

    What a configuration tells is read there. Whether the model honours positions and mask is tried on a few tokens, once
    per model: attention biased by the distance of cache places (ALiBi), recurrent states, or code that builds masks of its
    own show up as different probabilities.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return f"{model.config.model_type} is an encoder-decoder: its encoder sees what follows"
    if (implementation := config._attn_implementation) not in ("sdpa", "eager", PRODUCTS, BLOCKS):  # ours while a pass runs
        return f"attention is {implementation!r}, which takes no mask of our own: load with attn_implementation='sdpa'"
    if "local" in getattr(config, "attention_layers", ()):
        return f"{config.model_type} has local attention by places in the cache"
    limits = {
        "sliding_window": getattr(config, "sliding_window", None),
        "attention_chunk_size": getattr(config, "attention_chunk_size", None),
        "rotary positions that change in passes beyond": positions_change_at(model),
    }
    for name, limit in limits.items():
        if limit is not None and longest > limit:
            return f"{config.model_type} has {name} {limit} tokens, a prompt has {longest}"
    length = min([60, *(limit for limit in limits.values() if limit is not None)])
    while model not in _TRIED:
        try:
            _TRIED[model] = _tried(model, length)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or length < 8:
                raise
            length //= 2
            warnings.warn(f"out of memory in a trial of the model: going on with {length} tokens a prompt", stacklevel=2)
    return _TRIED[model]


_TRIED: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()
_BY_BLOCKS: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()  # whether that is exact, too


@contextmanager
def without_blocks(model: PreTrainedModel) -> Iterator[None]:
    """Attention with whole masks inside a ``with`` block, for measurements."""
    before = _BY_BLOCKS.pop(model, False)
    try:
        yield
    finally:
        _BY_BLOCKS[model] = before


@torch.inference_mode()
def _tried(model: PreTrainedModel, longest: int) -> str | None:
    """Score a few prompts of up to ``longest`` tokens in the trie and alone: the difference as an obstacle, or None."""
    name = model.config.model_type
    if model.training:
        raise ValueError(f"{name} is in training mode, where dropout is random: call model.eval() first")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return f"{name} has no logits_to_keep"
    vocabulary = model.config.get_text_config().vocab_size
    stem = np.random.default_rng(0).integers(0, vocabulary, longest).tolist()
    half, fifth = longest // 2, longest // 5
    prompts = [stem, [*stem[:half], *stem[: -half - 1 : -1]], [*stem[:half], *stem[:fifth]], [*stem[:fifth], *stem[half:]]]

    def p(log_probs: np.ndarray) -> np.ndarray:
        return np.exp(log_probs.astype(np.float64))

    every = range(vocabulary)
    alone, batched = (p(next_token_in_batches(model, prompts, every, n)[0]) for n in (1, 10**6))
    try:
        packed = p(through(model, build(prompts), every, max_tokens=64, blocks=False)[0])
    except Exception as error:  # whatever foreign code raises at a mask or a cache that it does not know
        if out_of_memory(error):
            raise
        return f"{name} does not take positions, mask and cache of our own ({type(error).__name__}: {error})"
    # Rounding depends on the shape of a batch; that is how much two right answers may differ.
    rounding, apart = (float(np.abs(q - alone).sum(-1).max()) / 2 for q in (batched, packed))
    if not apart <= 4 * rounding + 1e-3:
        return f"{name} gives other probabilities in a trie than alone (total variation {apart:.3g} on a trial)"
    if flexible(model):
        try:
            apart = (
                float(np.abs(p(through(model, build(prompts), every, max_tokens=64, blocks=True)[0]) - alone).sum(-1).max())
                / 2
            )
        except Exception as error:  # whatever a compiler or a kernel raises
            warnings.warn(f"attention by blocks does not work here, masks are whole ({error})", stacklevel=2)
            apart = np.inf
        _BY_BLOCKS[model] = apart <= 4 * rounding + 1e-3
    return None
