"""Forests: questions of several contexts and K in the same passes, exact; pass by pass, in smaller ones when memory ends."""

from __future__ import annotations

import importlib
from itertools import permutations

import numpy as np
import pytest
import torch
from test_trie import CONFIGS, LABELS, VOCABULARY, alone, random_model
from torch.nn.attention.flex_attention import create_mask, flex_attention

from permdistill.engine import attention, forest, trie

ARCHITECTURES = ["llama", "qwen2", "gpt2", "opt", "gemma"]


def make_groups(seed: int, n: int = 5) -> list[list[list[list[int]]]]:
    """Groups of one to three questions behind a context, of 2 to 4 options in all orders; all begin with the same tokens."""
    rng = np.random.default_rng(seed)

    def text(length: int) -> list[int]:
        return rng.integers(0, VOCABULARY, length).tolist()

    groups, start = [], text(6)
    for number in range(n):
        context = start + text(rng.integers(0, 8))
        group = []
        for _ in range(rng.integers(1, 4)):
            question, options = text(3), [text(rng.integers(1, 4)) for _ in range(2 + number % 3)]
            orders = permutations(range(len(options)))
            group.append([context + question + sum((options[i] for i in order), []) + [1] for order in orders])
        groups.append(group)
    return groups


def units_of(groups: list) -> list[list[list[int]]]:
    return [unit for group in groups for unit in group]


def collected(stream) -> tuple[dict[int, np.ndarray], int]:
    found: dict[int, np.ndarray] = {}
    forwarded = 0
    for done, n in stream:
        assert not found.keys() & {place for place, _ in done}  # each unit once
        found |= dict(done)
        forwarded += n
    return found, forwarded


def apart(model, groups, found) -> float:
    """Largest difference of a log-probability from that of the prompt alone."""
    expected = [alone(model, unit, LABELS) for unit in units_of(groups)]
    assert sorted(found) == list(range(len(expected)))
    assert np.std([row for values in expected for row in values], axis=0).min() > 0.1  # else it could not fail
    return max(float(np.abs(found[i] - values).max()) for i, values in enumerate(expected))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("prompt_tokens, max_tokens", [(None, 64), (300, 20), (1, 64)])
def test_mixed_contexts_and_k_equal_prompts_alone(name, prompt_tokens, max_tokens):
    model, groups = random_model(CONFIGS[name]), make_groups(0)
    found, forwarded = collected(forest.stream(model, groups, LABELS, max_tokens, prompt_tokens))
    assert apart(model, groups, found) < 1e-4
    each = sum(len(trie.build([p for unit in group for p in unit])) for group in groups)
    whole = len(trie.build([p for unit in units_of(groups) for p in unit]))
    # A group a forest takes what their tries have, also while the next one is prepared beside a running pass.
    assert forwarded == {None: whole, 1: each}.get(prompt_tokens, forwarded)
    assert whole <= forwarded <= each


def test_what_is_done_is_handed_out_before_the_forest_is():
    """So that a kill loses the passes in flight, not the forest."""
    model, groups = random_model(CONFIGS["llama"]), make_groups(1, 9)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    trie.obstacle(model)
    passes.clear()
    seen = [(len(done), len(passes)) for done, _ in forest.stream(model, groups, LABELS, 32)]
    assert len(passes) == len(seen) > 10
    assert [n for _, n in seen] == list(range(1, len(seen) + 1))
    assert sum(n for n, _ in seen[: len(seen) // 2]) > len(units_of(groups)) // 4


def test_groups_are_drawn_a_forest_ahead_and_no_further():
    model, drawn = random_model(CONFIGS["llama"]), []

    def groups():
        for number, group in enumerate(make_groups(1, 9)):
            drawn.append(number)
            yield group

    stream = forest.stream(model, groups(), LABELS, 10**6, prompt_tokens=1)
    next(stream)
    next(stream)
    assert len(drawn) <= 5  # two used, the next one, and the first of the one after it
    stream.close()


class Full:
    """Raises ``error`` in every pass of more than ``limit`` tokens, as a machine with so much memory would."""

    def __init__(self, model, limit: int, error: Exception):
        self.model, self.limit, self.error, self.passes = model, limit, error, []
        self.forward, model.forward = model.forward, self

    def __call__(self, input_ids=None, position_ids=None, attention_mask=None, logits_to_keep=0, **rest):
        self.passes.append(input_ids.numel())
        if input_ids.numel() > self.limit:
            raise self.error
        return self.forward(input_ids, attention_mask, position_ids, logits_to_keep=logits_to_keep, **rest)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
)
def test_out_of_memory_halves_the_passes_and_goes_on(error):
    model, groups = random_model(CONFIGS["llama"]), make_groups(2)
    trie.obstacle(model)
    machine = Full(model, 40, error)
    with pytest.warns(UserWarning, match="out of memory in a pass of") as warned:
        found, _ = collected(forest.stream(model, groups, LABELS, 128, prompt_tokens=400))
    assert [str(w.message)[-26:] for w in warned] == ["8 tokens: going on with 64", "4 tokens: going on with 32"]
    assert forest.sizes(model, 128)[1] == 32  # it is remembered
    assert sum(n > 40 for n in machine.passes) == 2
    model.forward = machine.forward
    assert apart(model, groups, found) < 1e-4


def test_out_of_memory_late_in_a_forest_repeats_nothing_that_was_handed_out():
    model, groups = random_model(CONFIGS["llama"]), make_groups(2)
    trie.obstacle(model)
    machine = Full(model, 10**6, MemoryError())
    found = {}
    stream = forest.stream(model, groups, LABELS, 64)
    with pytest.warns(UserWarning, match="out of memory"):
        for done, _ in stream:
            assert not found.keys() & {place for place, _ in done}
            found |= dict(done)
            machine.limit = 32
    model.forward = machine.forward
    assert apart(model, groups, found) < 1e-4


def test_other_errors_and_passes_that_cannot_be_smaller_are_raised():
    for error, message in (
        (RuntimeError("shape mismatch"), "shape mismatch"),
        (MemoryError("not one pass"), "not one pass"),
    ):
        model = random_model(CONFIGS["llama"])
        trie.obstacle(model)
        Full(model, 0, error)
        with pytest.raises(type(error), match=message):
            collected(forest.stream(model, make_groups(2), LABELS, forest.LEAST))


def test_out_of_memory_in_the_trial_makes_it_smaller_and_is_no_obstacle():
    model, groups = random_model(CONFIGS["llama"]), make_groups(2)
    machine = Full(model, 70, MemoryError())
    with pytest.warns(UserWarning, match="out of memory in a trial of the model") as warned:
        found, _ = collected(forest.stream(model, groups, LABELS, 64))
    assert [str(w.message)[-30:] for w in warned] == [f"going on with {n} tokens a prompt"[-30:] for n in (30, 15)]
    assert trie.obstacle(model) is None and machine.passes[0] == 60 and max(machine.passes[4:]) == 240
    model.forward = machine.forward
    assert apart(model, groups, found) < 1e-4
    none = random_model(CONFIGS["llama"])
    Full(none, 0, MemoryError("nothing fits"))
    with pytest.warns(UserWarning, match="out of memory in a trial"), pytest.raises(MemoryError, match="nothing fits"):
        trie.obstacle(none)


def test_groups_that_the_trie_cannot_serve_go_through_in_batches_and_the_others_do_not():
    model = random_model(CONFIGS["mistral"])  # a window of 32 tokens
    groups = make_groups(3)
    long = [[stem + [1, 2, 3] * 9 for stem in unit] for unit in groups[1]]
    groups[1] = long
    assert min(len(p) for unit in long for p in unit) > 32
    found, forwarded = collected(forest.stream(model, groups, LABELS, 64))
    assert apart(model, groups, found) < 1e-4
    assert forwarded < sum(len(p) for unit in units_of(groups) for p in unit)


def test_nothing_gives_nothing():
    model = random_model(CONFIGS["llama"])
    assert list(forest.stream(model, [], LABELS)) == []


# --------------------------------------------------------------------------------------------------------------------
# Attention by blocks


def laid_out(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys (some of them places that hold nothing), their ends and the queries of the second pass over a trie."""
    tree = trie.build([p for unit in units_of(make_groups(seed, 9)) for p in unit])
    step = list(trie.plan(tree, 512, even=False))[-1]
    past = np.append(step.past, np.full(128 - len(step.past), len(tree)))
    own = np.append(np.arange(step.start, step.stop), np.full(512 - (step.stop - step.start), len(tree)))
    held, end = np.concatenate([past, own]), np.append(tree.end, 0)
    return tuple(map(torch.from_numpy, (held, end[held], np.minimum(own, step.stop - 1))))


@pytest.mark.parametrize("seed", range(3))
def test_block_mask_is_the_dense_mask(seed):
    key, end, query = laid_out(seed)
    dense = attention.dense_mask(key, end, query, torch.float32)[0, 0] == 0
    mask = attention.block_mask(key, end, query)
    assert torch.equal(create_mask(mask.mask_mod, None, None, len(query), len(key), device="cpu")[0, 0], dense)
    blocks = dense.view(len(query) // 128, 128, len(key) // 128, 128)
    live = torch.zeros(blocks.shape[0], blocks.shape[2], dtype=torch.bool)
    for row in range(len(live)):
        partial = mask.kv_indices[0, 0, row, : mask.kv_num_blocks[0, 0, row]].long()
        full = mask.full_kv_indices[0, 0, row, : mask.full_kv_num_blocks[0, 0, row]].long()
        live[row, partial] = live[row, full] = True
        assert blocks[row, :, full].all()
        assert not set(partial.tolist()) & set(full.tolist())
    assert not blocks[~live.view(len(live), 1, -1, 1).expand_as(blocks)].any()  # nothing visible is left out
    assert not live.all()  # and something is skipped


def test_full_blocks_of_a_long_context_are_found():
    tree = trie.build([[*range(20), *[5] * 400, i, 3] for i in range(70)])
    key, query = torch.arange(512), torch.arange(384, 512)
    mask = attention.block_mask(key, torch.from_numpy(tree.end[:512]), query)
    assert mask.full_kv_num_blocks.flatten().tolist() == [3]
    assert mask.kv_num_blocks.flatten().tolist() == [1]


@pytest.fixture
def uncompiled(monkeypatch):
    """FlexAttention as plain products, without its warning that this is slow."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention, "compiled", lambda: flex_attention)


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gemma"])
def test_attention_by_blocks_equals_prompts_alone(name, uncompiled, monkeypatch):
    monkeypatch.setattr(trie, "FLEX_FROM", 128)
    monkeypatch.setattr(trie, "PAST_FROM", 128)
    model, groups = random_model(CONFIGS[name]), make_groups(4, 6)
    prompts = [p for unit in units_of(groups) for p in unit]
    tree = trie.build(prompts)
    assert len(tree) > 300
    for max_tokens in (100, 128, 2048):  # several passes with a cache that is filled up, and one without
        found, n = trie.through(model, tree, LABELS, max_tokens, blocks=True)
        assert n == len(tree)
        assert np.abs(found - alone(model, prompts, LABELS)).max() < 1e-4


@pytest.mark.long
def test_compiled_attention_by_blocks_equals_prompts_alone(monkeypatch):
    model, groups = random_model(CONFIGS["llama"]), make_groups(4, 3)
    prompts = [p for unit in units_of(groups) for p in unit]
    found, _ = trie.through(model, trie.build(prompts), LABELS, 1024, blocks=True)
    assert np.abs(found - alone(model, prompts, LABELS)).max() < 1e-4


def test_attention_by_blocks_is_for_gpus_and_refuses_what_it_does_not_know():
    model = random_model(CONFIGS["llama"])
    assert not attention.flexible(model)
    nothing = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="attention by blocks has no softcap"):
        attention.by_blocks(model, nothing, nothing, nothing, None, softcap=1.0)


@pytest.mark.parametrize("name, works", [("llama", True), ("llama", False), ("gpt2", False)])  # GPT-2 reads a mask itself
def test_attention_by_blocks_is_tried_before_it_is_used(name, works, uncompiled, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(trie, "flexible", lambda model: True)
    model, groups = random_model(CONFIGS[name]), make_groups(5)
    if works:
        assert trie.obstacle(model) is None
    else:
        if name == "llama":
            monkeypatch.setattr(attention, "compiled", lambda: broken)
        with pytest.warns(UserWarning, match=r"attention by blocks does not work here"):
            assert trie.obstacle(model) is None
    assert trie._BY_BLOCKS[model] == works
    found, _ = collected(forest.stream(model, groups, LABELS, 1024))
    assert apart(model, groups, found) < 1e-4


def test_attention_by_blocks_is_for_passes_of_many_tokens_whatever_the_limit_is(uncompiled, monkeypatch):
    monkeypatch.setattr(trie, "flexible", lambda model: True)
    monkeypatch.setattr(trie, "FLEX_FROM", 128)
    monkeypatch.setattr(trie, "PAST_FROM", 128)
    model, masks = random_model(CONFIGS["llama"]), []
    assert trie.obstacle(model) is None and trie._BY_BLOCKS[model]
    for name in ("block_mask", "dense_mask"):
        real = getattr(trie, name)
        monkeypatch.setattr(trie, name, lambda *args, name=name, real=real: masks.append(name) or real(*args))
    groups = make_groups(4, 6)
    prompts, lone = [p for unit in units_of(groups) for p in unit], units_of(groups)[0]
    n = len(trie.build(prompts))
    assert n % 210 < 128 < n and len(trie.build(lone)) < 128
    for given, max_tokens, expected in (
        (lone, 8192, ["dense_mask"]),
        (prompts, 210, ["block_mask"] * (n // 210) + ["dense_mask"]),
        (prompts, 8192, ["block_mask"]),
    ):
        masks.clear()
        found, _ = trie.through(model, trie.build(given), LABELS, max_tokens)
        assert masks == expected
        assert np.abs(found - alone(model, given, LABELS)).max() < 1e-4


def test_sizes_round_up_to_few():
    assert [attention.rounded(n, 512, 4) for n in (0, 1, 512, 513, 2049)] == [0, 512, 512, 2048, 8192]
