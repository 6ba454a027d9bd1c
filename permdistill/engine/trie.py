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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from permdistill.engine.attention import fast_attention
from permdistill.engine.batches import next_token_log_probs as next_token_in_batches
from permdistill.engine.batches import positions_change_at

# Tokens a forward pass. On a CPU a matrix product of 256 rows is as fast as a larger one, and attention wastes less on
# nodes that are no ancestors (measured on an AMD CPU: 13% faster than 512 on summaries, 6% on short questions). Intel's
# matrix units (AMX) are three times as fast, so that fewer passes over the weights pay (up to 7%). A GPU wants more.
MAX_TOKENS, MAX_TOKENS_AMX, MAX_TOKENS_GPU = 256, 512, 4096


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
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt has no last token to read label logits from")
    # Prompts in lexicographic order are the trie's leaves in depth-first order.
    tokens: list[int] = []
    parent: list[int] = []
    depth: list[int] = []
    leaf = np.empty(len(prompts), dtype=np.int64)
    path: list[int] = []  # nodes of the previous prompt
    previous: Sequence[int] = ()
    for index in sorted(range(len(prompts)), key=lambda i: list(prompts[i])):
        prompt = prompts[index]
        shared = 0
        while shared < min(len(prompt), len(previous)) and prompt[shared] == previous[shared]:
            shared += 1
        del path[shared:]
        for position in range(shared, len(prompt)):
            parent.append(path[-1] if path else -1)
            depth.append(position)
            path.append(len(tokens))
            tokens.append(prompt[position])
        leaf[index], previous = path[-1], prompt
    end = np.arange(1, len(tokens) + 1)
    for node in range(len(tokens) - 1, -1, -1):
        if parent[node] >= 0:
            end[parent[node]] = max(end[parent[node]], end[node])
    return Trie(
        np.array(tokens, dtype=np.int64), np.array(parent, dtype=np.int64), np.array(depth, dtype=np.int64), end, leaf
    )


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


def plan(trie: Trie, max_tokens: int = MAX_TOKENS) -> Iterator[Step]:
    """Cut the trie's depth-first sequence into as few even slices of at most ``max_tokens`` tokens as possible."""
    n = -(-len(trie) // max_tokens)
    for i in range(n):
        start, stop = len(trie) * i // n, len(trie) * (i + 1) // n
        yield Step(start, stop, trie.above(start))


def attended(trie: Trie) -> int:
    """Pairs (token, token it attends to), itself included: what attention's cost is proportional to."""
    return int((trie.depth + 1).sum())


def _mask(trie: Trie, step: Step, model: PreTrainedModel) -> torch.Tensor:
    """Additive attention mask (1, 1, query, key), keys in the order of ``step.held``: 0 for ancestors, else -inf."""
    key = torch.from_numpy(step.held)[None, :]
    end = torch.from_numpy(trie.end[step.held])[None, :]
    query = torch.arange(step.start, step.stop)[:, None]
    visible = (key <= query) & (query < end)
    mask = torch.zeros(visible.shape, dtype=model.dtype).masked_fill_(~visible, -torch.inf)
    return mask[None, None].to(model.device)


def _hold(cache: DynamicCache, places: np.ndarray) -> None:
    """Keep these places of the cache, drop the others."""
    layer: Any  # a DynamicLayer, since the cache was made without a config
    for layer in cache.layers:
        if layer.is_initialized:
            index = torch.from_numpy(places).to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)


@torch.inference_mode()
def next_token_log_probs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[int], max_tokens: int | None = None
) -> tuple[np.ndarray, int]:
    """Log-probabilities of ``tokens`` as the next token after each prompt.

    prompts     token ids, any lengths; the more they share, the cheaper
    tokens      ids of the label tokens
    max_tokens  a forward pass, bounds the memory; None: what suits the machine (MAX_TOKENS and its siblings)
    Returns ``log_probs`` (prompt, label), over the whole vocabulary, float32, and
    the number of tokens that went through the model. Raises ValueError for a model or prompt that :func:`obstacle` names.
    """
    if problem := obstacle(model, max(map(len, prompts), default=0)):
        raise ValueError(f"{problem}: use permdistill.engine.batches instead")
    if max_tokens is None:
        on_cpu = MAX_TOKENS_AMX if torch.cpu._is_amx_tile_supported() else MAX_TOKENS
        max_tokens = on_cpu if model.device.type == "cpu" else MAX_TOKENS_GPU
    with fast_attention(model):
        return _forward(model, build(prompts), tokens, max_tokens)


def _forward(model: PreTrainedModel, trie: Trie, tokens: Sequence[int], max_tokens: int) -> tuple[np.ndarray, int]:
    """:func:`next_token_log_probs` of a trie's leaves."""
    prompts_of_leaf: dict[int, list[int]] = {}
    for prompt, node in enumerate(trie.leaf):
        prompts_of_leaf.setdefault(int(node), []).append(prompt)
    leaves = np.array(sorted(prompts_of_leaf), dtype=np.int64)
    result = np.empty((len(trie.leaf), len(tokens)), dtype=np.float32)
    # Without the model's config: no layer forgets what lies outside a window, the mask alone decides (see obstacle).
    cache = DynamicCache()
    held = np.empty(0, dtype=np.int64)
    for step in plan(trie, max_tokens):
        if len(held):
            _hold(cache, np.searchsorted(held, step.past))  # held nodes are in ascending order
        ends = leaves[(leaves >= step.start) & (leaves < step.stop)]
        logits = model(
            input_ids=torch.from_numpy(trie.tokens[None, step.start : step.stop]).to(model.device),
            position_ids=torch.from_numpy(trie.depth[None, step.start : step.stop]).to(model.device),
            attention_mask=_mask(trie, step, model),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.from_numpy(ends - step.start) if len(ends) else 1,  # on the CPU: see machine.placed
        ).logits[0]
        held = step.held
        if len(ends):
            log_probs = (logits.float()[:, list(tokens)] - logits.float().logsumexp(-1, keepdim=True)).cpu().numpy()
            for row, node in enumerate(ends):
                result[prompts_of_leaf[int(node)]] = log_probs[row]
    return result, len(trie)


def obstacle(model: PreTrainedModel, longest: int = 0) -> str | None:
    """Why the trie would not give a prompt of ``longest`` tokens what it gets alone, None if it does.

    What a configuration tells is read there. Whether the model honours positions and mask is tried on a few tokens, once
    per model: attention biased by the distance of cache places (ALiBi), recurrent states, or code that builds masks of its
    own show up as different probabilities.
    """
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return f"{model.config.model_type} is an encoder-decoder: its encoder sees what follows"
    if (implementation := config._attn_implementation) not in ("sdpa", "eager"):
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
    if model not in _TRIED:
        _TRIED[model] = _tried(model, min([60, *(limit for limit in limits.values() if limit is not None)]))
    return _TRIED[model]


_TRIED: WeakKeyDictionary[PreTrainedModel, str | None] = WeakKeyDictionary()


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
        with fast_attention(model):
            packed = p(_forward(model, build(prompts), every, max_tokens=64)[0])
    except Exception as error:  # whatever foreign code raises at a mask or a cache that it does not know
        return f"{name} does not take positions, mask and cache of our own ({type(error).__name__}: {error})"
    # Rounding depends on the shape of a batch; that is how much two right answers may differ.
    rounding, apart = (float(np.abs(q - alone).sum(-1).max()) / 2 for q in (batched, packed))
    if not apart <= 4 * rounding + 1e-3:
        return f"{name} gives other probabilities in a trie than alone (total variation {apart:.3g} on a trial)"
    return None
