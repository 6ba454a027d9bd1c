"""The shared-prefix engine gives every prompt what it would get alone."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from permdistill.engine import batches, trie

VOCABULARY = 24
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_ROTARY = _SIZES | {"intermediate_size": 48, "max_position_embeddings": 128, "initializer_range": 0.4}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "initializer_range": 0.4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_ROTARY, num_key_value_heads=2),
    "qwen2": Qwen2Config(**_ROTARY, num_key_value_heads=1),
    "mistral": MistralConfig(**_ROTARY, num_key_value_heads=2, sliding_window=32),
    "gemma": GemmaConfig(**_ROTARY, num_key_value_heads=1, head_dim=16),
    "gemma2": Gemma2Config(**_ROTARY, num_key_value_heads=2, head_dim=16, sliding_window=32, query_pre_attn_scalar=16),
    "gpt_neox": GPTNeoXConfig(**_ROTARY),
    "gpt2": GPT2Config(**_GPT2, bos_token_id=0, eos_token_id=0),
    "opt": OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=128, init_std=0.4),
}

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
def test_plan_covers_every_node_once_in_even_slices_with_its_ancestors_held(prompts, max_tokens):
    tree = trie.build(prompts)
    held: set[int] = set()
    done: list[int] = []
    for step in trie.plan(tree, max_tokens):
        assert set(step.past) <= held  # nothing is needed that an earlier pass has dropped
        held = set(step.held)
        assert step.held.tolist() == sorted(held)
        for node in range(step.start, step.stop):
            assert set(path(tree, node)) <= held
        done.append(step.stop - step.start)
    assert sum(done) == len(tree)
    assert max(done) <= max_tokens and max(done) - min(done) <= 1
    assert len(done) == -(-len(tree) // max_tokens)


def test_what_is_held_does_not_grow_with_the_number_of_prompts():
    tree = trie.build([(9, 9, 9, *order) for order in permutations(range(6))])
    assert len(tree) > 1900
    assert max(len(step.held) for step in trie.plan(tree, 32)) <= 32 + 9


def test_plan_of_a_long_chain_needs_no_recursion():
    tree = trie.build([[1] * 5000])
    assert sum(step.stop - step.start for step in trie.plan(tree, 100)) == 5000


def test_attended_counts_each_token_and_its_ancestors():
    assert trie.attended(trie.build([[1, 2, 3], [1, 2, 4], [5]])) == 1 + 2 + 3 + 3 + 1


# --------------------------------------------------------------------------------------------------------------------
# The forward pass


def random_model(config: PreTrainedConfig, attention: str = "sdpa") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request) -> PreTrainedModel:
    # Gemma 2 caps its attention scores, which transformers can do in eager attention only.
    return random_model(CONFIGS[request.param], "eager" if request.param == "gemma2" else "sdpa")


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


@pytest.mark.parametrize("name", CONFIGS)
def test_eager_attention_gives_the_same(name):
    prompts = ragged_prompts(1)
    model = random_model(CONFIGS[name], "eager")
    found, _ = trie.next_token_log_probs(model, prompts, LABELS, 16)
    assert np.abs(found - alone(model, prompts, LABELS)).max() < 1e-4


def test_no_prompts_give_no_rows(model):
    found, forwarded = trie.next_token_log_probs(model, [], LABELS)
    assert found.shape == (0, 3)
    assert forwarded == 0


# --------------------------------------------------------------------------------------------------------------------
# Refusals, and the batches that serve what is refused

_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.4}
REFUSED = {
    "window": (MistralConfig(**_SMALL, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, sliding_window=8),
               "sliding_window 8 tokens, a prompt has"),
    "bloom": (BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4), "bloom"),
    "falcon-alibi": (FalconConfig(**_SMALL, num_attention_heads=4, alibi=True), "falcon"),
    "gpt_neo": (GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, window_size=8,
                             attention_types=[[["global", "local"], 1]], max_position_embeddings=128), "local attention"),
    "mamba": (MambaConfig(**_SMALL), "mamba"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_trie_cannot_do_is_refused_and_batches_do_it(name):
    config, reason = REFUSED[name]
    model = random_model(config, "eager" if name in ("bloom", "gpt_neo", "mamba") else "sdpa")
    prompts = ragged_prompts(1)
    with pytest.raises(ValueError, match=reason):
        trie.next_token_log_probs(model, prompts, LABELS)
    found, forwarded = batches.next_token_log_probs(model, prompts, LABELS, 64)
    expected = alone(model, prompts, LABELS)
    assert np.abs(found - expected).max() < 1e-4
    assert sum(map(len, prompts)) <= forwarded <= 2 * sum(map(len, prompts))
    assert expected.std(axis=0).min() > 0.01


def rope_model(rope_type: str, **rest) -> PreTrainedModel:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 4.0, **rest}
    return random_model(LlamaConfig(**_ROTARY | {"max_position_embeddings": 16}, rope_parameters=rope))


def test_frequencies_that_follow_the_longest_prompt_of_a_pass():
    """No slice of a longer trie, and no prompt padded to a longer one, may show it."""
    model = rope_model("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=16)
    prompts = ragged_prompts(1)
    assert min(map(len, prompts)) <= 16 < max(map(len, prompts))
    with pytest.raises(ValueError, match="beyond 16 tokens"):
        trie.next_token_log_probs(model, prompts, LABELS)
    expected = alone(model, prompts, LABELS)
    found, _ = batches.next_token_log_probs(model, prompts, LABELS)
    assert np.abs(found - expected).max() < 1e-4
    short = [i for i, p in enumerate(prompts) if len(p) <= 16]
    packed, _ = trie.next_token_log_probs(model, [prompts[i] for i in short], LABELS, 16)
    assert np.abs(packed - expected[short]).max() < 1e-4


def test_frequencies_that_follow_the_passes_before_are_refused():
    model = rope_model("dynamic")
    assert trie.obstacle(model, 16) is None
    assert "beyond 16 tokens" in trie.obstacle(model, 17)
    with pytest.raises(ValueError, match="17 tokens; beyond 16"):
        batches.next_token_log_probs(model, [[1] * 17], LABELS)


def test_model_in_training_mode_is_refused():
    model = random_model(CONFIGS["llama"]).train()
    with pytest.raises(ValueError, match="training mode"):
        trie.next_token_log_probs(model, [[1, 2]], LABELS)


def test_batches_serve_a_model_without_logits_to_keep():
    model = random_model(CONFIGS["llama"])
    expected = alone(model, ragged_prompts(1), LABELS)
    forward = type(model).forward
    model.forward = lambda input_ids, attention_mask=None, **rest: forward(model, input_ids, attention_mask)
    found, _ = batches.next_token_log_probs(model, ragged_prompts(1), LABELS, 64)
    assert np.abs(found - expected).max() < 1e-4
    assert "logits_to_keep" in trie.obstacle(model)


def test_encoder_decoder_that_begins_with_a_forced_token_is_refused():
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    model.generation_config.forced_bos_token_id = 1
    with pytest.raises(ValueError, match="forced_bos_token_id 1"):
        batches.next_token_log_probs(model, [[1, 2]], LABELS)


def test_window_that_holds_every_prompt_is_no_obstacle():
    model = random_model(CONFIGS["mistral"])
    assert trie.obstacle(model, 32) is None
    assert "sliding_window 32 tokens, a prompt has 33" in trie.obstacle(model, 33)


def test_model_whose_code_ignores_the_mask_is_found_out():
    model = random_model(CONFIGS["llama"])
    forward = type(model).forward

    def without_mask(input_ids=None, attention_mask=None, logits_to_keep=0, **rest):
        return forward(model, input_ids=input_ids, logits_to_keep=logits_to_keep, **rest)

    model.forward = without_mask
    assert "other probabilities" in trie.obstacle(model)


def test_flash_attention_is_refused_by_name():
    model = random_model(CONFIGS["llama"])
    model.config._attn_implementation = "flash_attention_2"
    assert "attn_implementation='sdpa'" in trie.obstacle(model)


def test_encoder_decoder_is_refused_and_batches_read_its_first_step():
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      decoder_start_token_id=0, initializer_factor=1.5)  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    prompts = ragged_prompts(1)
    with pytest.raises(ValueError, match="encoder-decoder"):
        trie.next_token_log_probs(model, prompts, LABELS)
    start = torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        rows = [model(torch.tensor([p]), decoder_input_ids=start).logits[0, 0].log_softmax(-1)[LABELS] for p in prompts]
    expected = torch.stack(rows).numpy()
    found, _ = batches.next_token_log_probs(model, prompts, LABELS, 64)
    assert np.abs(found - expected).max() < 1e-4
    assert expected.std(axis=0).min() > 0.01


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_batches_equal_prompts_alone(model, max_tokens):
    prompts = ragged_prompts(2)
    found, forwarded = batches.next_token_log_probs(model, prompts, LABELS, max_tokens)
    assert np.abs(found - alone(model, prompts, LABELS)).max() < 1e-4
    assert forwarded >= sum(map(len, prompts))
    assert batches.next_token_log_probs(model, [], LABELS)[0].shape == (0, 3)


def test_batches_refuse_an_empty_prompt(model):
    with pytest.raises(ValueError, match="empty prompt"):
        batches.next_token_log_probs(model, [[1], []], LABELS)


def test_batches_by_length_hold_the_token_budget():
    lengths = np.random.default_rng(0).integers(1, 60, size=200)
    parts = list(batches.by_length(lengths, 120))
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    assert all(len(b) * lengths[b].max() <= 120 for b in parts)
    assert sum(len(b) * lengths[b].max() for b in parts) < 1.05 * lengths.sum()  # little padding
    assert [b.tolist() for b in batches.by_length(np.array([500]), 120)] == [[0]]
