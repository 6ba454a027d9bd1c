"""What is done to a loaded model keeps its answers: a float32 head, packed linear layers. And how models are told apart."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scaleout import make_causal
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from permdistill.engine.placement import has_bfloat16, with_packed_linears
from permdistill.orders import all_orders
from permdistill.paper.models import TEACHERS
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question
from permdistill.teachers import CausalTeacher, load_teacher, model_key, with_float32_head


@pytest.fixture(scope="module")
def model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=97, num_key_value_heads=2, tie_word_embeddings=True, initializer_range=0.3, **sizes)
    return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


@torch.inference_mode()
def logits(model: Qwen2ForCausalLM) -> torch.Tensor:
    return model(torch.arange(40)[None]).logits[0]


def test_float32_head_computes_what_the_head_computes_without_its_rounding(model):
    with torch.inference_mode():
        hidden = model.model(torch.arange(40)[None]).last_hidden_state[0]
    wide = with_float32_head(deepcopy(model))
    found = logits(wide)
    assert found.dtype == torch.float32
    assert torch.allclose(found, hidden.float() @ model.lm_head.weight.float().T, atol=1e-5)
    assert (found - logits(model).float()).abs().max() > 1e-4  # the rounding that it avoids
    assert wide.model.embed_tokens.weight.dtype == torch.bfloat16  # tied before, untouched now


PACKS = hasattr(torch.ops.mkldnn, "_linear_pointwise")


@pytest.mark.skipif(not PACKS, reason="this build of torch cannot pack")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_linear_layers_give_the_same_logits(model, dtype):
    expected = logits(with_float32_head(deepcopy(model).to(dtype)))
    packed = with_packed_linears(with_float32_head(deepcopy(model).to(dtype)))
    kinds = [type(module).__name__ for module in packed.modules()]
    layers = 2 * 7 if dtype == torch.float32 or has_bfloat16() else 0
    assert kinds.count("PackedLinear") == layers + 1  # the head computes in float32
    assert kinds.count("Linear") == 2 * 7 - layers
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert torch.allclose(logits(packed), expected, atol=tolerance * expected.abs().max().item())
    assert (logits(packed).argmax(-1) == expected.argmax(-1)).float().mean() > 0.9


def test_model_key_follows_weights_tokenizer_and_number_format(tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    keys = [model_key(str(tmp_path)), model_key(str(tmp_path), torch.float32)]
    (tmp_path / "tokenizer.json").write_text("{ }")
    keys.append(model_key(str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    keys.append(model_key(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"rope_theta": 1e6}')
    keys.append(model_key(str(tmp_path)))
    keys += [model_key(name) for name in TEACHERS]
    assert len(set(keys)) == len(keys)
    assert str(tmp_path) not in " ".join(keys)
    assert model_key(TEACHERS[0]) == (
        "sha256:cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046 bfloat16, float32 head"
    )


def test_folder_whose_weights_cannot_be_told_apart_is_refused(tmp_path: Path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    with pytest.raises(ValueError, match=r"no \*.safetensors: save the model there with save_pretrained"):
        model_key(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path, tied: bool):
    """transformers would put random numbers in its place, and say so in a warning."""
    make_causal(tmp_path, tie_word_embeddings=tied)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    assert ("lm_head.weight" in weights) is not tied
    load_teacher(str(tmp_path))  # tied weights are held once, and lack nothing
    name = "model.layers.1.mlp.up_proj.weight" if tied else "lm_head.weight"
    save_file({n: tensor for n, tensor in weights.items() if n != name}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path}: its weights lack {name} \(1 in all\): restore the file"):
        load_teacher(str(tmp_path))


# --------------------------------------------------------------------------------------------------------------------
# Prompts

TURN = "{{ messages[0]['content'] }}"
CHATS = {
    "plain": (f"<user>{TURN}<assistant>", 2),
    "trimmed": ("<user>{{ messages[0]['content'] | trim }}<assistant>", 6),
    "changed": ("<user>{{ messages[0]['content'] | replace('stone', 'rock') }}<assistant>", 6),
    "twice": (f"<user>{TURN}<again>{TURN}<assistant>", 6),
    "nothing": ("<user><assistant>", 6),
}


@pytest.mark.parametrize("name", CHATS)
def test_chat_template_is_rendered_once_a_question_where_that_gives_every_prompt(name):
    chat, rendered_at_most = CHATS[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    tokenizer.chat_template = chat
    teacher = CausalTeacher("t", None, tokenizer, "")
    calls, render = [], tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *args, **rest: calls.append(1) or render(*args, **rest)
    orders = all_orders(3)
    for question in (
        Question("q", "Passage.", "Which {one}?", ("a stone", "b", "c ")),
        Question("r", "", "?", ("d", "e", "f")),
    ):
        for template in TEMPLATES.values():
            calls.clear()
            found = teacher.prompts(question, orders, template)
            assert len(calls) <= rendered_at_most + 2
            if name == "plain" and "_around" in vars(teacher) and question.id == "r":
                assert len(calls) == 1
            assert found == [teacher.prompt(question, order, template) for order in orders]
