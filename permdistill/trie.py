"""Many prompts that share prefixes -> one forward pass over their trie, exact.

The orders of one question share the instruction, the context, the question and every common prefix of options; the pairs
of one document share the article and the first summary. The token trie of all prompts holds each shared token once. A
node may attend to its ancestors only, and its position is its depth, so every prompt sees exactly the tokens, positions
and attention that it would see alone: the same distributions up to rounding, for a fraction of the tokens.

The trie is built from the *whole* prompts' token ids, so no assumption on how text segments tokenise is needed.

A trie too large for one forward is cut along the tree: the trunk's keys and values are computed once and reused by every
group of whole subtrees that fits into ``max_tokens`` (:func:`plan`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

MAX_TOKENS = 1024  # tokens a forward pass; bounds memory (mask, activations) and suits the CPU's caches


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
    """One forward pass: nodes ``start : stop``. The ``past`` tokens that the cache must hold are their common ancestors."""

    start: int
    stop: int
    past: int


def plan(trie: Trie, max_tokens: int = MAX_TOKENS) -> Iterator[Step]:
    """Cut the trie into forward passes of at most ``max_tokens`` tokens, depth first."""

    def children(node: int, stop: int) -> Iterator[int]:
        child = node
        while child < stop:
            yield child
            child = int(trie.end[child])

    # Work list of (start, stop): sibling subtrees that hang from the same path. An explicit stack, since a chain may be
    # longer than Python's recursion limit.
    stack = [(0, len(trie))] if len(trie) else []
    while stack:
        start, stop = stack.pop()
        past = int(trie.depth[start])
        if stop - start <= max_tokens:
            yield Step(start, stop, past)
            continue
        group: list[tuple[int, int]] = []  # whole siblings, packed greedily
        siblings = list(children(start, stop))
        if len(siblings) > 1:
            for node in siblings:
                if group and int(trie.end[node]) - group[-1][0] <= max_tokens:
                    group[-1] = (group[-1][0], int(trie.end[node]))
                else:
                    group.append((node, int(trie.end[node])))
            stack += reversed(group)
            continue
        # One subtree, too large: its trunk (the chain down to the first branching), then what hangs from it.
        trunk = start + 1
        while trunk < stop and trunk - start < max_tokens and trie.end[trunk] == stop:
            trunk += 1
        yield Step(start, trunk, past)
        if trunk < stop:
            stack.append((trunk, stop))


def _mask(trie: Trie, step: Step, device: torch.device) -> torch.Tensor:
    """Boolean attention mask (1, 1, query, past + key): the whole past, and one's ancestors within the step."""
    node = torch.arange(step.start, step.stop, device=device)
    end = torch.as_tensor(trie.end[step.start : step.stop], device=device)
    within = (node[None, :] <= node[:, None]) & (node[:, None] < end[None, :])  # (query, key): key is ancestor of query
    past = torch.ones(len(node), step.past, dtype=torch.bool, device=device)
    return torch.cat([past, within], dim=1)[None, None]


@torch.inference_mode()
def next_token_log_probs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[int], max_tokens: int = MAX_TOKENS
) -> tuple[np.ndarray, int]:
    """Log-probabilities of ``tokens`` as the next token after each prompt.

    prompts  token ids, any lengths; the more they share, the cheaper
    tokens   ids of the label tokens
    Returns ``log_probs`` (prompt, label), over the whole vocabulary, float32, and
    the number of tokens that went through the model. Raises ValueError for a model whose attention would misread the mask.
    """
    trie = build(prompts)
    device = model.device
    cache = DynamicCache(config=model.config)
    if model.config._attn_implementation != "sdpa":  # others add a boolean mask to the scores, or ignore it
        raise ValueError(
            f"attention is {model.config._attn_implementation!r}: load the model with attn_implementation='sdpa'"
        )
    if any(cache.is_sliding):
        raise ValueError(f"{model.config.model_type} has sliding-window attention, which an ancestor mask does not know")
    prompts_of_leaf: dict[int, list[int]] = {}
    for prompt, node in enumerate(trie.leaf):
        prompts_of_leaf.setdefault(int(node), []).append(prompt)
    leaves = np.array(sorted(prompts_of_leaf), dtype=np.int64)
    result = np.empty((len(prompts), len(tokens)), dtype=np.float32)
    for step in plan(trie, max_tokens):
        ends = leaves[(leaves >= step.start) & (leaves < step.stop)]
        if surplus := cache.get_seq_length() - step.past:
            cache.crop(-surplus)  # what earlier, finished subtrees left behind
        output = model(
            input_ids=torch.as_tensor(trie.tokens[None, step.start : step.stop], device=device),
            position_ids=torch.as_tensor(trie.depth[None, step.start : step.stop], device=device),
            attention_mask=_mask(trie, step, device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=torch.as_tensor(ends - step.start, device=device) if len(ends) else 1,
        )
        if len(ends):
            log_probs = torch.log_softmax(output.logits[0].float(), dim=-1)[:, list(tokens)].cpu().numpy()
            for row, node in enumerate(ends):
                result[prompts_of_leaf[int(node)]] = log_probs[row]
    return result, len(trie)
