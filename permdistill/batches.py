"""Many prompts -> padded batches of similar length: what everybody does, for models that the trie cannot serve exactly.

Every prompt goes through the model whole. Padding stands on the right, where a causal model cannot see it, whatever its
positions, windows or states are; an encoder is told by the attention mask. So this is exact for any model, also for
encoder-decoders, whose answer is read at the decoder's first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

MAX_TOKENS = 2048  # tokens a forward pass, padding included


def by_length(lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
    """Indices in batches of similar length, longest first; longest member x members is at most ``max_tokens``, or one."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    while len(order):
        n = max(1, max_tokens // max(1, int(lengths[order[0]])))
        yield order[:n]
        order = order[n:]


@torch.inference_mode()
def next_token_log_probs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[int], max_tokens: int = MAX_TOKENS
) -> tuple[np.ndarray, int]:
    """As :func:`permdistill.trie.next_token_log_probs`; the number of tokens includes padding."""
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt has no last token to read label logits from")
    lengths = np.array([len(p) for p in prompts], dtype=np.int64)
    result = np.empty((len(prompts), len(tokens)), dtype=np.float32)
    forwarded = 0
    for batch in by_length(lengths, max_tokens):
        own = torch.from_numpy(lengths[batch])
        mask = (torch.arange(int(own.max())) < own[:, None]).long()  # (prompt, token)
        ids = torch.zeros_like(mask)
        ids[mask.bool()] = torch.tensor([t for i in batch for t in prompts[i]])
        forwarded += ids.numel()
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        if model.config.is_encoder_decoder:
            start = model.generation_config.decoder_start_token_id
            inputs["decoder_input_ids"] = torch.full((len(batch), 1), start, device=model.device)
            logits = model(**inputs).logits[:, 0]
        else:
            ends, place = torch.unique(own - 1, return_inverse=True)  # few: the lengths are similar
            keep = ends.to(model.device) if len(ends) > 1 or int(ends[0]) + 1 < ids.shape[1] else 1
            logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits[torch.arange(len(batch)), place]
        logits = logits.float()
        result[batch] = (logits[:, list(tokens)] - logits.logsumexp(-1, keepdim=True)).cpu().numpy()
    return result, forwarded
