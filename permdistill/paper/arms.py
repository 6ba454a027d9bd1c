"""The arms of :mod:`permdistill.paper.bench`: ways to score all orders, and what each of them puts through a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from permdistill.engine import batches, forest, trie
from permdistill.engine.placement import PackedLinear, synchronise

COUNT = -1  # pairs: not counted yet
SORTED_TOKENS = (batches.MAX_TOKENS, 32768)  # a batch of the rival's, on a CPU and on a GPU

Groups = Sequence[Sequence[Sequence[list[int]]]]  # token ids of prompts: (group, question, order)


@dataclass
class Work:
    """What an arm did: log-probabilities (prompt, label), and how much went through the model.

    tokens  that went through the model, padding included
    pairs   (token, token it attends to)
    rows    places that went through the output layer
    once    (seconds, tokens, pairs) of it that the groups take once, however many of their questions are scored
    """

    log_probs: np.ndarray
    tokens: int
    pairs: int
    rows: int
    once: tuple[float, int, int] = (0.0, 0, 0)

    def __add__(self, other: Work) -> Work:
        once = (self.once[0] + other.once[0], self.once[1] + other.once[1], self.once[2] + other.once[2])
        log_probs = np.concatenate([self.log_probs, other.log_probs])
        return Work(log_probs, self.tokens + other.tokens, self.pairs + other.pairs, self.rows + other.rows, once)


def _causal(lengths: np.ndarray) -> int:
    """Pairs (token, token it attends to) of sequences of these lengths."""
    return int((lengths * (lengths + 1) // 2).sum())


def _in_batches(model: PreTrainedModel, prompts: Sequence[list[int]], labels: Sequence[int], max_tokens: int) -> Work:
    log_probs, tokens = batches.next_token_log_probs(model, prompts, labels, max_tokens)
    lengths = np.array([len(p) for p in prompts])
    passed = [np.full(len(b), lengths[b[0]]) for b in batches.by_length(lengths, max_tokens)]
    return Work(log_probs, tokens, _causal(np.concatenate(passed)), len(prompts))


def padded(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """One batch for each question."""
    return reduce(add, [_in_batches(model, own, labels, 10**9) for group in groups for own in group])


def length_sorted(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """Batches of all prompts by length."""
    return _in_batches(
        model, [p for group in groups for own in group for p in own], labels, SORTED_TOKENS[model.device.type != "cpu"]
    )


def cached_prefix(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """The common beginning of each group's prompts once, the rest in padded batches by length."""
    return reduce(add, [_cached_prefix(model, [p for own in group for p in own], labels) for group in groups])


@torch.inference_mode()
def _cached_prefix(model: PreTrainedModel, prompts: Sequence[list[int]], labels: Sequence[int]) -> Work:
    first, last = min(prompts), max(prompts)
    same = [a == b for a, b in zip(first, last, strict=False)]
    shared = min(same.index(False) if False in same else len(same), min(map(len, prompts)) - 1)
    started, prefix, device = time.perf_counter(), DynamicCache(), model.device
    model(torch.tensor([first[:shared]], device=device), past_key_values=prefix, use_cache=True, logits_to_keep=1)
    synchronise(device)
    once = (time.perf_counter() - started, shared, _causal(np.array([shared])))
    lengths = np.array([len(p) - shared for p in prompts])
    result = np.empty((len(prompts), len(labels)), dtype=np.float32)
    tokens, pairs = once[1:]
    for batch in batches.by_length(lengths, batches.MAX_TOKENS):
        own = torch.from_numpy(lengths[batch])
        inside = torch.arange(int(own.max())) < own[:, None]
        ids = torch.zeros(inside.shape, dtype=torch.long)
        ids[inside] = torch.tensor([t for i in batch for t in prompts[i][shared:]])
        cache = DynamicCache()
        layer: Any
        for number, layer in enumerate(prefix.layers):
            cache.update(layer.keys.expand(len(batch), -1, -1, -1), layer.values.expand(len(batch), -1, -1, -1), number)
        mask = torch.cat([torch.ones(len(batch), shared, dtype=torch.bool), inside], dim=1).long()
        last_places = (own - 1)[:, None].to(device)
        output = model(
            ids.to(device), attention_mask=mask.to(device), past_key_values=cache, use_cache=True, logits_to_keep=last_places
        )
        logits = output.logits[:, 0].float()
        result[batch] = (logits[:, list(labels)] - logits.logsumexp(-1, keepdim=True)).cpu().numpy()
        tokens += ids.numel()
        pairs += ids.numel() * shared + _causal(np.full(len(batch), ids.shape[1]))
    return Work(result, tokens, pairs, len(prompts), once)


def shared_trie(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """Each group's trie, one after the other."""
    parts = []
    for group in groups:
        built = trie.build([p for own in group for p in own])
        log_probs, tokens = trie.through(model, built, labels, trie.tokens_a_pass(model))
        parts.append(Work(log_probs, tokens, trie.attended(built), len(set(built.leaf.tolist()))))
    return reduce(add, parts)


def shared_forest(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """All groups in forests: what :func:`permdistill.scores.score` does."""
    found: dict[int, np.ndarray] = {}
    tokens = 0
    for done, n in forest.stream(model, groups, labels):
        found |= dict(done)
        tokens += n
    return Work(np.concatenate([found[i] for i in range(len(found))]), tokens, COUNT, len(groups))


def whole_masks(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """Forests without attention by blocks, where there is one."""
    with trie.without_blocks(model):
        return shared_forest(model, groups, labels)


def counted(work: Work, groups: Groups) -> Work:
    """``work`` of a forest with what its arm has left to be counted outside the clock."""
    if work.pairs != COUNT:
        return work
    built = trie.build([p for group in groups for own in group for p in own])
    return replace(work, pairs=trie.attended(built), rows=len(set(built.leaf.tolist())))


def one_order(model: PreTrainedModel, groups: Groups, labels: Sequence[int]) -> Work:
    """The first order of each question, one at a time."""
    return reduce(add, [_in_batches(model, own[:1], labels, 1) for group in groups for own in group])


ARMS: dict[str, Callable[[PreTrainedModel, Groups, Sequence[int]], Work]] = {
    "padded": padded,
    "sorted": length_sorted,
    "cached prefix": cached_prefix,
    "trie": shared_trie,
    "forest": shared_forest,
    "one order": one_order,
}


GPU_ARMS = {"forest, whole masks": whole_masks}  # where attention goes by blocks


def flops(model: PreTrainedModel, work: Work) -> int:
    """Floating-point operations by formula: 2 per weight and token in linear layers, 4 x heads x head size per layer and
    attended pair (scores, and values weighted by them), 2 per weight of the output layer and row that it computes."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    kinds = (torch.nn.Linear, PackedLinear, Conv1D)
    linears = sum(m.weight.numel() for m in model.modules() if isinstance(m, kinds) and m is not head)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * size
    return 2 * linears * work.tokens + attention * work.pairs + 2 * head.weight.numel() * work.rows


@torch.inference_mode()
def layers_speed(model: PreTrainedModel, rows: int = 512, passes: int = 3) -> float:
    """FLOP/s of the model's linear layers alone, one after the other, on ``rows`` tokens: the most that any engine built
    of these products can reach. Below the machine's peak where layers are narrow or their weights come from memory."""
    layers = [
        m
        for m in model.modules()
        if isinstance(m, (torch.nn.Linear, PackedLinear)) and m is not model.get_output_embeddings()
    ]
    inputs = {m.weight.shape[1]: torch.randn(1, rows, m.weight.shape[1]).to(m.weight.device, model.dtype) for m in layers}
    seconds = []
    for _ in range(passes):
        started = time.perf_counter()
        for layer in layers:
            layer(inputs[layer.weight.shape[1]])
        synchronise(model.device)
        seconds.append(time.perf_counter() - started)
    return 2 * rows * sum(m.weight.numel() for m in layers) / min(seconds)


def sample(groups: Groups, n: int | None) -> list[list[int]]:
    """Places of ``n`` questions of each group, evenly spaced by length; of groups of one question each, of ``n`` groups.
    None: of all."""
    if n is not None and len(groups) > n and all(len(group) == 1 for group in groups):
        kept = set(_evenly([len(group[0][0]) for group in groups], n))
        return [[0] if i in kept else [] for i in range(len(groups))]
    return [_evenly([len(own[0]) for own in group], n) for group in groups]


def _evenly(lengths: Sequence[int], n: int | None) -> list[int]:
    if n is None or n >= len(lengths):
        return list(range(len(lengths)))
    by_length = np.argsort(lengths, kind="stable")
    return by_length[((np.arange(n) + 0.5) * len(lengths) / n).astype(int)].tolist()
