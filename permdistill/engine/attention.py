"""Attention of a pass over a trie: its masks, and the ways to compute it that are faster than torch's fused one.

``by_products``, on CPUs without Intel's matrix units (AMX): torch's fused CPU attention multiplies bfloat16 far below the
machine's speed there, a fifth of a forward pass over a trie. Scores in float32, softmax in float32, weights in the values'
format: the same arithmetic in less than half of the time (an AMD EPYC, 12 heads, 256 queries, 832 keys: 3.6 ms against 8.1).

``by_blocks``, on one GPU: FlexAttention skips the blocks of keys that no query of a block may see, nearly all of them in a
pass over many questions. Which ones follows from two numbers a node (:func:`block_mask`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PRODUCTS, BLOCKS = "permdistill_products", "permdistill_blocks"
BLOCK = 128  # FlexAttention's
# FlexAttention is the slower way below about 1,000 tokens (one H200, 1.5B). It is compiled for each shape, so numbers of
# tokens and of places in the cache round up, to powers of two and of four.
FLEX_FROM, PAST_FROM = 1024, 512


def flexible(model: PreTrainedModel) -> bool:
    """Whether :func:`by_blocks` can serve ``model``: on one CUDA device, with the compiler that it needs."""
    whole = model.device.type == "cuda" and not hasattr(model, "hf_device_map")
    return (
        whole and model.config.get_text_config()._attn_implementation == "sdpa" and bool(importlib.util.find_spec("triton"))
    )


def rounded(n: int, first: int, factor: int) -> int:
    """The least of 0, first, first * factor, first * factor^2, .. that holds ``n``."""
    size = first if n else 0
    while size < n:
        size *= factor
    return size


def dense_mask(key: torch.Tensor, end: torch.Tensor, query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive mask (1, 1, query, key): 0 where node ``key`` is an ancestor of node ``query`` or the same, else -inf.

    key, query  (key,), (query,) nodes
    end         (key,) one past the last node of each key's subtree; 0 for a place that holds nothing
    """
    visible = (key <= query[:, None]) & (query[:, None] < end)
    return torch.zeros(visible.shape, dtype=dtype, device=key.device).masked_fill_(~visible, -torch.inf)[None, None]


def block_mask(key: torch.Tensor, end: torch.Tensor, query: torch.Tensor) -> BlockMask:
    """:func:`dense_mask` for FlexAttention, without looking at pairs. Numbers of keys and queries: multiples of BLOCK.

    A block of keys is live for a block of queries when its first node and its largest end lie on both sides of some query;
    it is full when every key lies before the queries and ends behind them.
    """

    def visible(batch: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (key[k] <= query[q]) & (query[q] < end[k])

    keys, ends, queries = key.view(-1, BLOCK), end.view(-1, BLOCK), query.view(-1, BLOCK)
    first, last = queries.amin(1)[:, None], queries.amax(1)[:, None]
    live = (keys.amin(1) <= last) & (first < ends.amax(1))  # (query block, key block)
    full = (keys.amax(1) <= first) & (last < ends.amin(1))
    counts, places = [], []
    for kind in (live & ~full, full):
        counts.append(kind.sum(-1, dtype=torch.int32)[None, None])
        places.append(kind.int().argsort(dim=-1, descending=True, stable=True).int()[None, None])
    return BlockMask.from_kv_blocks(
        counts[0], places[0], counts[1], places[1], BLOCK, mask_mod=visible, seq_lengths=(len(query), len(key))
    )


@cache
def compiled() -> Any:
    """FlexAttention as a kernel, one for each shape."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    return torch.compile(flex_attention, dynamic=False)


def by_blocks(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface with a BlockMask. Raises ValueError for what it does not know."""
    if unknown := [name for name in ("softcap", "position_bias", "cache", "s_aux") if rest.get(name) is not None]:
        raise ValueError(f"attention by blocks has no {unknown[0]}")
    grouped = query.shape[1] != key.shape[1]
    result = compiled()(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return result.transpose(1, 2).contiguous(), None


def by_products(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of transformers' interface: query (1, head, query, size), key and value (1, key-value head, key, size),
    additive mask (1, 1, query, key) -> (1, query, head, size). What it does not know goes to transformers' own."""
    plain = query.shape[0] == 1 and attention_mask is not None and attention_mask.shape[:2] == (1, 1)
    if not plain or dropout or any(rest.get(name) is not None for name in ("softcap", "position_bias", "cache", "s_aux")):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **rest)
    heads, n, size = query.shape[1:]
    shared = key.shape[1]  # key-value heads, each serving heads // shared query heads as one product
    scaled = (query[0].float() * (size**-0.5 if scaling is None else scaling)).reshape(shared, -1, size)
    keys, mask = key[0].float(), attention_mask[0]  # type: ignore[index]
    result = torch.empty(shared, heads // shared * n, value.shape[-1], dtype=value.dtype)
    for head in range(shared):
        scores = _product(scaled[head], keys[head]).view(-1, n, key.shape[2])
        scores += mask
        weights = scores.softmax(-1).to(value.dtype).view(-1, key.shape[2])
        result[head] = _product(weights, value[0, head].T.contiguous())
    return result.view(heads, n, -1).transpose(0, 1)[None], None


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a b^T by oneDNN, which in float32 is twice as fast on an AMD CPU as torch's default library."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


AttentionInterface.register(PRODUCTS, by_products)
AttentionInterface.register(BLOCKS, by_blocks)


@contextmanager
def fast_attention(model: PreTrainedModel, blocks: bool = False) -> Iterator[None]:
    """Let ``model`` use :func:`by_blocks` inside the block if told so, else :func:`by_products` where that is the faster
    way; else nothing changes."""
    config = model.config.get_text_config()
    products = config._attn_implementation == "sdpa" and model.device.type == "cpu"
    products = products and hasattr(torch.ops.mkldnn, "_linear_pointwise") and not torch.cpu._is_amx_tile_supported()
    before = config._attn_implementation
    config._attn_implementation = BLOCKS if blocks else PRODUCTS if products else before
    try:
        yield
    finally:
        config._attn_implementation = before
