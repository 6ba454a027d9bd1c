"""The shared-prefix engine gives every prompt what it would get alone."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config

from permdistill import trie

VOCABULARY = 24
CONFIGS = {
    "llama": LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.4,
    ),
    "qwen2": Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.4,
    ),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=128, initializer_range=0.4,
        bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip

tokens = st.integers(0, 3)  # few different tokens: much is shared
prompt_lists = st.lists(st.lists(tokens, min_size=1, max_size=9), min_size=1, max_size=12)


def path(tree: trie.Trie, node: int) -> list[int]:
    """Nodes from the root to ``node``."""
    nodes = []
    while node >= 0:
        nodes.append(int(node))
        node = tree.parent[node]
    return nodes[::-1]


# --------------------------------------------------------------------------------------------------------------------
# The tree


@given(prompt_lists)
def test_leaves_spell_the_prompts(prompts):
    tree = trie.build(prompts)
    assert [[int(tree.tokens[n]) for n in path(tree, leaf)] for leaf in tree.leaf] == prompts


@given(prompt_lists)
def test_every_prefix_is_one_node(prompts):
    assert len(trie.build(prompts)) == len({tuple(p[: i + 1]) for p in prompts for i in range(len(p))})


@given(prompt_lists)
def test_subtrees_are_slices_and_depth_is_position(prompts):
    tree = trie.build(prompts)
    for node in range(len(tree)):
        ancestors = path(tree, node)
        assert tree.depth[node] == len(ancestors) - 1
        assert [i for i in range(node + 1) if i <= node < tree.end[i]] == ancestors


@given(prompt_lists, st.randoms())
def test_order_of_prompts_does_not_change_the_tree(prompts, random):
    shuffled = random.sample(prompts, len(prompts))
    assert trie.build(shuffled).tokens.tolist() == trie.build(prompts).tokens.tolist()


def test_sharing_of_all_orders_of_four_options():
    tree = trie.build([(9, *order) for order in permutations(range(4))])
    assert len(tree) == 1 + 64  # a question token, and 4 + 12 + 24 + 24 option nodes instead of 96


def test_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="empty prompt"):
        trie.build([[1], []])


@given(prompt_lists, st.integers(1, 12))
def test_plan_covers_every_node_once_within_budget_and_with_its_ancestors_cached(prompts, max_tokens):
    tree = trie.build(prompts)
    cached: list[int] = []  # nodes whose keys and values the cache holds, as next_token_log_probs keeps it
    done = []
    for step in trie.plan(tree, max_tokens):
        assert 1 <= step.stop - step.start <= max_tokens
        assert step.past == tree.depth[step.start]
        cached = cached[: step.past]
        assert cached == path(tree, step.start)[:-1]
        for node in range(step.start, step.stop):
            assert set(path(tree, node)) <= {*cached, *range(step.start, step.stop)}
        cached += range(step.start, step.stop)
        done += range(step.start, step.stop)
    assert done == list(range(len(tree)))


def test_plan_of_a_long_chain_needs_no_recursion():
    tree = trie.build([[1] * 5000])
    assert sum(step.stop - step.start for step in trie.plan(tree, 2)) == 5000


# --------------------------------------------------------------------------------------------------------------------
# The forward pass


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[request.param], attn_implementation="sdpa").float().eval()


@torch.inference_mode()
def alone(model: PreTrainedModel, prompts: list[list[int]], labels: list[int]) -> np.ndarray:
    """One prompt at a time, without mask or cache: the definition. (prompt, label)."""
    rows = [torch.log_softmax(model(torch.tensor([p])).logits[0, -1].float(), dim=-1)[labels].numpy() for p in prompts]
    return np.stack(rows)


def ragged_prompts(seed: int) -> list[list[int]]:
    """Prompts of one root and of several, of all lengths, with a duplicate and with prefixes of others."""
    rng = np.random.default_rng(seed)
    stem = rng.integers(0, VOCABULARY, 12).tolist()
    prompts = [stem[: rng.integers(1, 13)] + rng.integers(0, VOCABULARY, rng.integers(0, 15)).tolist() for _ in range(12)]
    return [*prompts, stem, stem + [5, 6, 7], stem + [5, 6], prompts[0], [3], rng.integers(0, VOCABULARY, 20).tolist()]


LABELS = [7, 2, 11]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 7, 20, 64, 1024])
def test_trie_equals_prompts_alone(model, max_tokens):
    prompts = ragged_prompts(1)
    expected = alone(model, prompts, LABELS)
    found, forwarded = trie.next_token_log_probs(model, prompts, LABELS, max_tokens)
    assert found.shape == (len(prompts), len(LABELS))
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(np.exp(found) - np.exp(expected)).max() < 1e-5
    assert forwarded == len(trie.build(prompts)) < sum(map(len, prompts))
    assert expected.std(axis=0).min() > 0.1  # else the comparison could not fail


@pytest.mark.parametrize("seed", range(3))
def test_other_prompts_change_nothing(model, seed):
    prompts = ragged_prompts(seed)
    whole, _ = trie.next_token_log_probs(model, prompts, LABELS, 16)
    for i in (0, 5, len(prompts) - 2):
        single, forwarded = trie.next_token_log_probs(model, [prompts[i]], LABELS, 16)
        assert forwarded == len(prompts[i])
        assert np.abs(single[0] - whole[i]).max() < 1e-4


def test_duplicate_prompts_get_equal_rows(model):
    prompts = [[1, 2, 3], [4], [1, 2, 3]]
    found, forwarded = trie.next_token_log_probs(model, prompts, LABELS)
    assert found[0].tolist() == found[2].tolist()
    assert np.abs(found[0] - found[1]).max() > 1e-2
    assert forwarded == 4


def test_prefix_of_another_prompt_is_read_at_its_own_end(model):
    prompts = [[1, 2, 3, 4, 5], [1, 2, 3], [1]]
    found, forwarded = trie.next_token_log_probs(model, prompts, LABELS, max_tokens=2)
    assert forwarded == 5
    assert np.abs(found - alone(model, prompts, LABELS)).max() < 1e-4


def test_log_probs_are_over_the_whole_vocabulary(model):
    found, _ = trie.next_token_log_probs(model, [[1, 2], [3]], range(VOCABULARY))
    assert np.allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)


def test_mask_matters():
    """The comparison above can fail: with a plain causal mask in place of the ancestors' the results are far off."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="sdpa").float().eval()
    prompts = ragged_prompts(1)
    tree = trie.build(prompts)
    with torch.inference_mode():
        output = model(torch.as_tensor(tree.tokens[None]), position_ids=torch.as_tensor(tree.depth[None]))
    wrong = torch.log_softmax(output.logits[0, tree.leaf].float(), dim=-1)[:, LABELS].numpy()
    assert np.abs(wrong - alone(model, prompts, LABELS)).max() > 0.1


def test_attention_that_would_misread_the_mask_is_refused_or_right():
    """A boolean mask means "add 0 or 1" to eager attention: such a model must not give wrong numbers silently."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager").float().eval()
    prompts = ragged_prompts(1)
    try:
        found, _ = trie.next_token_log_probs(model, prompts, LABELS)
    except ValueError as error:
        assert "sdpa" in str(error)
    else:
        assert np.abs(found - alone(model, prompts, LABELS)).max() < 1e-4


def test_sliding_window_is_refused():
    """An ancestor mask knows no window: such a model would see further than it was trained to."""
    config = MistralConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=4)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").float().eval()
    with pytest.raises(ValueError, match="sliding"):
        trie.next_token_log_probs(model, ragged_prompts(1), LABELS)


def test_no_prompts_give_no_rows(model):
    found, forwarded = trie.next_token_log_probs(model, [], LABELS)
    assert found.shape == (0, 3)
    assert forwarded == 0
