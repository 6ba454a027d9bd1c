"""Many prompts -> padded batches of similar length: what everybody does, for models that the trie cannot serve exactly.

Every prompt goes through the model whole. Padding stands on the right, where a causal model cannot see it, whatever its
attention, windows or states are; an encoder is told by the attention mask. Models whose positions depend on the longest
prompt of a batch (:func:`positions_change_at`) get batches of equal lengths. Encoder-decoders answer at the decoder's
first step.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

MAX_TOKENS, MAX_TOKENS_GPU = 2048, 16384  # tokens a forward pass, padding included


def by_length(lengths: np.ndarray, max_tokens: int, equal: bool = False) -> Iterator[np.ndarray]:
    """Indices in batches of similar (``equal``: the same) length, longest first, so that what does not fit into memory
    fails at once; the longest times the number of members is at most ``max_tokens``, or there is one member."""
    lengths = np.asarray(lengths)
    waiting = np.argsort(-lengths, kind="stable")
    while len(waiting):
        longest = int(lengths[waiting[0]])
        n = max(1, max_tokens // max(1, longest))
        if equal:
            n = min(n, int((lengths[waiting] == longest).sum()))
        yield waiting[:n]
        waiting = waiting[n:]


def positions_change_at(model: PreTrainedModel, kinds: Sequence[str] = ("dynamic", "longrope")) -> int | None:
    """Length of a forward pass beyond which the model turns all of its rotary positions differently, None if it does not.

    ``kinds`` are the rope types of transformers whose frequencies depend on the longest position of a pass.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    found = []
    for own in (rope, *(value for value in rope.values() if isinstance(value, dict))):  # one for all layers, or per type
        if own.get("rope_type") in kinds:
            found.append(own.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(found, default=None)


def tokens_a_pass(model: PreTrainedModel) -> int:
    """Tokens of a forward pass, padding included, that suit the model's machine."""
    return MAX_TOKENS if model.device.type == "cpu" else MAX_TOKENS_GPU


def next_token_log_probs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[int], max_tokens: int | None = None
) -> tuple[np.ndarray, int]:
    """As :func:`permdistill.engine.trie.next_token_log_probs`; the number of tokens includes padding."""
    result, forwarded = np.empty((len(prompts), len(tokens)), dtype=np.float32), 0
    for places, log_probs, n in forward(model, prompts, tokens, max_tokens or tokens_a_pass(model)):
        result[places] = log_probs
        forwarded += n
    return result, forwarded


@torch.inference_mode()
def forward(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], tokens: Sequence[int], max_tokens: int
) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """:func:`next_token_log_probs` pass by pass: (places of its prompts, their log-probabilities, tokens that it took)."""
    if any(len(p) == 0 for p in prompts):
        raise ValueError("an empty prompt has no last token to read label logits from")
    lengths = np.array([len(p) for p in prompts], dtype=np.int64)
    limit = positions_change_at(model, ["dynamic"])
    if limit is not None and max(lengths, default=0) > limit:
        raise ValueError(
            f"a prompt has {max(lengths)} tokens; beyond {limit}, {model.config.model_type}'s rope type dynamic lets a pass "
            "depend on the passes before it: shorten the context, or use another rope type"
        )
    for batch in by_length(lengths, max_tokens, equal=positions_change_at(model) is not None):
        own = torch.from_numpy(lengths[batch])
        mask = (torch.arange(int(own.max())) < own[:, None]).long()  # (prompt, token)
        ids = torch.zeros_like(mask)
        ids[mask.bool()] = torch.tensor([t for i in batch for t in prompts[i]])
        inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
        logits = (_first_step if model.config.is_encoder_decoder else _at)(model, inputs, own - 1).float()
        yield batch, (logits[:, list(tokens)] - logits.logsumexp(-1, keepdim=True)).cpu().numpy(), ids.numel()


def _at(model: PreTrainedModel, inputs: dict[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Logits (prompt, vocabulary) of a causal model at one place of each prompt."""
    spread = hasattr(model, "hf_device_map")  # over several devices: places of a batch would lie on another than its logits
    if "logits_to_keep" in inspect.signature(model.forward).parameters and not spread:
        return model(**inputs, logits_to_keep=places[:, None].to(model.device), use_cache=False).logits[:, 0]
    return model(**inputs).logits[torch.arange(len(places)), places]


def _first_step(model: PreTrainedModel, inputs: dict[str, torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """Logits (prompt, vocabulary) of an encoder-decoder at the decoder's first step."""
    start = model.generation_config.decoder_start_token_id
    if start is None or model.generation_config.forced_bos_token_id is not None:
        raise ValueError(
            f"{model.config.model_type} does not answer at its decoder's first step: decoder_start_token_id is {start}, "
            f"forced_bos_token_id {model.generation_config.forced_bos_token_id}"
        )
    return model(**inputs, decoder_input_ids=torch.full((len(places), 1), start, device=model.device)).logits[:, 0]
