"""The trie's own attention computes what transformers' does, and hands on what it does not know."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_trie import CONFIGS, random_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from permdistill.engine.attention import PRODUCTS, by_products, fast_attention

needs_onednn = pytest.mark.skipif(not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch without oneDNN")


def case(heads: int, shared: int, dtype: torch.dtype, batch: int = 1, values: int = 16) -> tuple[torch.Tensor, ...]:
    """query, key, value, mask of random numbers; each query sees itself and about half of the rest."""
    generator = torch.Generator().manual_seed(heads)
    query = torch.randn(batch, heads, 20, 16, generator=generator).to(dtype)
    key = torch.randn(batch, shared, 33, 16, generator=generator).to(dtype)
    value = torch.randn(batch, shared, 33, values, generator=generator).to(dtype)
    hidden = torch.rand(batch, 1, 20, 33, generator=generator) < 0.5
    hidden[..., torch.arange(20), torch.arange(20) + 13] = False
    return query, key, value, torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)


def module(heads: int, shared: int) -> SimpleNamespace:
    return SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True)


@needs_onednn
@pytest.mark.parametrize("heads, shared", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scaling", [None, 0.5])
def test_same_as_fused_attention(heads, shared, scaling):
    query, key, value, mask = case(heads, shared, torch.float32)
    expected, _ = sdpa_attention_forward(module(heads, shared), query, key, value, mask, scaling=scaling)
    found, _ = by_products(module(heads, shared), query, key, value, mask, scaling=scaling)
    assert found.shape == expected.shape == (1, 20, heads, 16)
    assert torch.allclose(found, expected, atol=1e-6)
    unmasked, _ = by_products(module(heads, shared), query, key, value, torch.zeros_like(mask), scaling=scaling)
    assert (unmasked - expected).abs().max() > 0.1  # the mask matters


@needs_onednn
def test_bfloat16_is_no_further_from_float32_than_fused_attention():
    query, key, value, mask = case(6, 2, torch.bfloat16)
    exact, _ = sdpa_attention_forward(module(6, 2), query.float(), key.float(), value.float(), mask.float())
    fused, own = (f(module(6, 2), query, key, value, mask)[0] for f in (sdpa_attention_forward, by_products))
    assert own.dtype == torch.bfloat16
    assert (own.float() - exact).abs().mean() <= 1.2 * (fused.float() - exact).abs().mean()


@pytest.mark.parametrize("batch, mask_given", [(2, True), (1, False)])
def test_what_it_does_not_know_goes_to_transformers(batch, mask_given):
    query, key, value, mask = case(4, 2, torch.float32, batch)
    arguments = (module(4, 2), query, key, value, mask if mask_given else None)
    expected, _ = sdpa_attention_forward(*arguments)
    found, _ = by_products(*arguments)
    assert torch.equal(found, expected)


@needs_onednn
def test_a_model_gets_it_inside_the_block_only_and_where_it_is_faster():
    model = random_model(CONFIGS["llama"])
    with fast_attention(model):
        assert model.config._attn_implementation == ("sdpa" if torch.cpu._is_amx_tile_supported() else PRODUCTS)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyboardInterrupt), fast_attention(model):
        raise KeyboardInterrupt
    assert model.config._attn_implementation == "sdpa"
    eager = random_model(CONFIGS["llama"], "eager")
    with fast_attention(eager):
        assert eager.config._attn_implementation == "eager"
