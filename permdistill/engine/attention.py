"""Attention by plain matrix products: the trie's own on CPUs on which torch's fused attention is slow.

Without Intel's matrix units (AMX), torch's fused CPU attention multiplies bfloat16 far below the machine's speed: it took a
fifth of a forward pass over a trie. Scores in float32, softmax in float32, weights in the values' format: the same
arithmetic, in less than half of the time (measured on an AMD EPYC, 12 heads, 256 queries, 832 keys: 3.6 ms against 8.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "permdistill_products"


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


AttentionInterface.register(NAME, by_products)


@contextmanager
def fast_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let ``model`` use :func:`by_products` inside the block where that is the faster way; else nothing changes."""
    config = model.config.get_text_config()
    wanted = config._attn_implementation == "sdpa" and model.device.type == "cpu"
    if not (wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise")) or torch.cpu._is_amx_tile_supported():
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = "sdpa"
