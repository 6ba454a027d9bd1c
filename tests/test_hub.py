"""The model hub without the hub: revisions, refusals, every model of the profile "paper" end to end on tiny stand-ins."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_hub
import torch
from httpx import Request, Response
from huggingface_hub import errors
from transformers import LlamaForCausalLM

from permdistill import sources
from permdistill.engine import batches, placement, trie
from permdistill.engine.placement import spread
from permdistill.orders import all_orders, to_options
from permdistill.paper import experiments, hub, manifest, models, profiles
from permdistill.paper.assets import AssetError
from permdistill.paper.tasks import load_task
from permdistill.prompts import TEMPLATES
from permdistill.questions import Question, unlabelled
from permdistill.students import Student, build, encoder_key
from permdistill.teachers import CausalTeacher, Seq2SeqTeacher, load_teacher, model_key, with_float32_head

PAPER = profiles.PROFILES["paper"]
RACE, COSMOS = tiny_hub.REPOS["ehovy/race"], tiny_hub.REPOS["allenai/cosmos_qa"]
MODELS = [name for name, repo in tiny_hub.REPOS.items() if repo.kind == "model"]
QUESTIONS = [
    Question("one", "The tall cat is near the old dog.", "What is tall ?", ("the cat", "the dog", "the tree")),
    Question("two", "The tall cat is near the old dog.", "What is old ?", ("the bird", "the dog", "the lamp")),
]


@pytest.fixture
def online(monkeypatch, tmp_path):
    """A hub that answers, with what it was asked."""
    monkeypatch.delenv(hub.LOCAL, raising=False)
    monkeypatch.setenv("PERMDISTILL_CACHE", str(tmp_path))
    asked = []

    class Api:
        refused: dict[str, type[Exception]] = {}

        def auth_check(self, name, repo_type):
            asked.append((name, repo_type))
            if kind := self.refused.get(name):
                raise (
                    kind("no", response=Response(403, request=Request("GET", "https://hub/")))
                    if kind is not OSError
                    else kind()
                )

        def repo_info(self, name, revision, repo_type):
            asked.append((name, revision, repo_type))
            if kind := self.refused.get(name):
                raise kind()
            return type("Info", (), {"sha": f"{len(asked):040x}"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    return Api, asked


# --------------------------------------------------------------------------------------------------------------------
# Revisions and refusals


def test_profile_needs_nothing_that_is_not_pinned_in_one_place():
    assert set(profiles.repositories(PAPER)) == set(tiny_hub.REPOS.values())
    assert profiles.repositories(profiles.PROFILES["full"]) == []
    named = {name for name, repo in tiny_hub.REPOS.items() if not re.fullmatch("[0-9a-f]{40}", repo.revision)}
    assert named == {"tasksource/race-c", "allenai/cosmos_qa", "metaeval/reclor"}  # no commit was known for certain


def test_revision_that_is_a_name_is_resolved_once_and_recorded(online, tmp_path):
    api, asked = online
    assert hub.locate(RACE) == ("ehovy/race", RACE.revision) and not asked
    first = hub.locate(COSMOS)
    assert asked == [("allenai/cosmos_qa", "refs/convert/parquet", "dataset")]
    assert hub.locate(COSMOS) == first and len(asked) == 1  # also for later processes: it is in a file
    assert first[1] in json.loads((tmp_path / "revisions.json").read_text()).values()
    recorded = hub.revisions(tiny_hub.REPOS.values())
    assert recorded["allenai/cosmos_qa"] == first[1] and recorded["metaeval/reclor"] == "main"
    assert recorded["ehovy/race"] == tiny_hub.REPOS["ehovy/race"].revision
    (tmp_path / "build").mkdir()
    assert json.loads(manifest.write(tmp_path / "build").read_text())["revisions"] == recorded
    theirs = {"pretrained_model_name_or_path": "somebody/else", "trust_remote_code": False}
    assert sources.find("somebody/else").arguments == theirs


def test_hub_that_does_not_answer_is_an_error_with_its_fix(online):
    api, _ = online
    api.refused = {"metaeval/reclor": ConnectionError}
    with pytest.raises(AssetError, match="metaeval/reclor.*cannot be reached.*PERMDISTILL_HUB=/path"):
        hub.commit(tiny_hub.REPOS["metaeval/reclor"])


def test_everything_is_asked_for_before_any_compute_and_gated_models_are_explained(online, monkeypatch):
    api, asked = online
    hub.check(profiles.repositories(PAPER))
    assert sorted(question[0] for question in asked) == sorted([*tiny_hub.REPOS] * 2)  # may it be had, is the commit there
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    llama, race = "meta-llama/Llama-2-7b-chat-hf", "ehovy/race"
    api.refused = {llama: errors.GatedRepoError, race: errors.RepositoryNotFoundError, "metaeval/reclor": OSError}
    with pytest.raises(AssetError) as caught:
        hub.check(profiles.repositories(PAPER))
    message = str(caught.value)
    assert f"{llama}: gated under the Llama 2 Community License: accept it at https://huggingface.co/{llama}" in message
    assert "set HF_TOKEN" in message and "hf_secret" not in message
    assert "ehovy/race: the hub does not show it (https://huggingface.co/datasets/ehovy/race)" in message
    assert "metaeval/reclor: the hub cannot be reached (OSError)" in message
    assert len(message.splitlines()) == 4


def test_commit_that_is_not_there_is_found_before_any_compute(online, monkeypatch):
    api, _ = online
    answer = Response(404, request=Request("GET", "https://hub/"))

    def repo_info(self, name, revision, repo_type):
        if name == "ehovy/race":
            raise errors.RevisionNotFoundError("no", response=answer)

    monkeypatch.setattr(api, "repo_info", repo_info)
    with pytest.raises(AssetError, match=f"the hub has no revision '{tiny_hub.REPOS['ehovy/race'].revision}'"):
        hub.check([RACE, tiny_hub.REPOS["google/flan-t5-xl"]])


def test_folder_in_the_place_of_the_hub(tiny, monkeypatch, tmp_path):
    hub.check(tiny_hub.REPOS.values())
    assert hub.locate(tiny_hub.REPOS["google/flan-t5-xl"]) == (str(tiny / "google/flan-t5-xl"), None)
    assert set(hub.revisions(tiny_hub.REPOS.values()).values()) == {"local"}
    monkeypatch.setenv(hub.LOCAL, str(tmp_path))
    with pytest.raises(AssetError, match="holds no folder google/flan-t5-xl"):
        hub.check(tiny_hub.REPOS.values())


def test_keys_tell_commits_and_local_weights_apart(tiny, monkeypatch):
    names = [*PAPER.teachers, *profiles.PAPER_ENCODERS]
    here = [model_key(name) for name in names[:4]] + [encoder_key(name) for name in names[4:]]
    monkeypatch.delenv(hub.LOCAL)
    there = [model_key(name) for name in names[:4]] + [encoder_key(name) for name in names[4:]]
    assert len(set(here + there)) == 20
    assert all(key.startswith("sha256:") for key in here)
    assert there[0].startswith(f"hub:{names[0]}@{tiny_hub.REPOS[names[0]].revision} ")


# --------------------------------------------------------------------------------------------------------------------
# Every architecture, end to end


@torch.inference_mode()
def alone(teacher: CausalTeacher, prompt: list[int], labels: list[int]) -> np.ndarray:
    """Log-probabilities of the labels after one prompt, by a plain forward."""
    ids = torch.tensor([prompt])
    if teacher.model.config.is_encoder_decoder:
        logits = teacher.model(ids, decoder_input_ids=torch.zeros(1, 1, dtype=torch.long)).logits[0, 0]
    else:
        logits = teacher.model(ids).logits[0, -1]
    return logits.float().log_softmax(-1)[labels].numpy()


@pytest.mark.parametrize("template", ["brief", "letters", "numbers", "summaries", "summaries_letters"])
@pytest.mark.parametrize("name", PAPER.teachers)
def test_teacher_gives_every_order_what_its_prompt_gets_alone(tiny, name, template):
    teacher = load_teacher(name, torch.float32)
    assert type(teacher) is (Seq2SeqTeacher if "flan" in name else CausalTeacher)
    shape, orders = TEMPLATES[template], all_orders(3)
    teacher.check(QUESTIONS, shape)
    labels = teacher.label_tokens(3, shape)
    prompts = teacher.tokenize(QUESTIONS, orders, shape)
    expected = np.stack([alone(teacher, prompt, labels) for prompt in prompts]).reshape(2, 6, 3)
    found = teacher.log_probs(QUESTIONS, orders, shape)
    assert np.abs(found - to_options(expected, orders)).max() < 1e-3
    assert np.ptp(found, axis=1).max() > 0.01  # the order does matter to it
    words = [teacher.tokenizer.decode([label]).strip() for label in labels]
    assert words == [label.strip() for label in shape.labels[:3]]
    shared = trie.build(prompts)
    assert teacher.tokens_forwarded == len(shared) if "Llama" in name else teacher.tokens_forwarded >= sum(map(len, prompts))


def test_llama_answers_after_its_chat_template_and_t5_after_the_end_of_its_input(tiny):
    llama, t5 = load_teacher(PAPER.teachers[0]), load_teacher(PAPER.teachers[2])
    assert llama.model.dtype == t5.model.dtype == torch.bfloat16
    assert llama.prompt(QUESTIONS[0], range(3), TEMPLATES["brief"]).endswith("[/INST]Answer:")
    text = llama.prompt(QUESTIONS[0], range(3), TEMPLATES["brief"])
    assert text.count("<s>") == 1 and llama.tokenize(QUESTIONS[:1], np.arange(3)[None], TEMPLATES["brief"])[0].count(1) == 1
    assert t5.prompt(QUESTIONS[0], range(3), TEMPLATES["brief"]).endswith(" C) the tree\n")
    assert t5.tokenize(QUESTIONS[:1], np.arange(3)[None], TEMPLATES["brief"])[0][-1] == t5.tokenizer.eos_token_id


def test_only_prompts_that_may_be_too_long_are_tokenized_to_see(tiny, monkeypatch):
    teacher, template = load_teacher("meta-llama/Llama-2-7b-chat-hf", torch.float32), TEMPLATES["brief"]
    asked, tokenize = [], teacher.tokenize
    monkeypatch.setattr(teacher, "tokenize", lambda qs, *rest: asked.extend(q.id for q in qs) or tokenize(qs, *rest))
    foreign = replace(QUESTIONS[0], id="foreign", context="Le café est près de la forêt.")  # a character may be 3 tokens
    teacher.check([*QUESTIONS, foreign], template)
    assert asked == ["foreign"]
    long = replace(QUESTIONS[0], id="long", context="The tall cat is old. " * 1000)
    with pytest.raises(ValueError, match=r"'long' takes \d+ tokens .* 4096 positions"):
        teacher.check([long], template)


def test_labels_that_are_no_single_token_of_a_seq2seq_teacher_are_refused(tiny):
    teacher = load_teacher(PAPER.teachers[3])
    with pytest.raises(ValueError, match="label 'catdog' of template 'brief' is not one token of flan-t5-xl"):
        teacher.check(QUESTIONS, replace(TEMPLATES["brief"], labels=("catdog", "B", "C")))
    with pytest.raises(ValueError, match="share a token"):
        teacher.check(QUESTIONS, replace(TEMPLATES["brief"], labels=("A", " A", "B")))


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-chat-hf", "google/flan-t5-xl"])
def test_model_spread_by_accelerate_answers_alike(tiny, name, tmp_path):
    """Some layers on the CPU, others on disk, fetched when they are needed: hooks around layers, as over several GPUs."""
    teacher, orders = load_teacher(name, torch.float32), all_orders(3)
    expected = teacher.log_probs(QUESTIONS, orders, TEMPLATES["brief"])
    kind = type(teacher.model)
    model = with_float32_head(kind.from_pretrained(tiny / name, dtype=torch.float32).eval())
    stacks = {"google": ("encoder.block", "decoder.block"), "meta-llama": ("model.layers",)}[name.split("/")[0]]
    second = [f"{stack}.1" for stack in stacks]
    rest = [
        n for n, m in model.named_modules() if not list(m.children()) and not n.startswith(tuple(f"{s}." for s in stacks))
    ]
    places = dict.fromkeys([*rest, *(f"{stack}.0" for stack in stacks)], "cpu") | dict.fromkeys(second, "disk")
    model = spread(model, places, main_device="cpu", offload_dir=str(tmp_path))
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
    found = replace(teacher, model=model).log_probs(QUESTIONS, orders, TEMPLATES["brief"])
    assert np.abs(found - expected).max() < 1e-4
    if name.startswith("meta"):
        assert trie.obstacle(model) is None


def test_a_model_that_no_gpu_holds_goes_over_all_of_them_in_whole_layers(tiny, monkeypatch):
    """GPUs are pretended: what torch and accelerate would say of them. What is decided is which layer goes where."""
    model = LlamaForCausalLM.from_pretrained(tiny / "meta-llama/Llama-2-7b-chat-hf", dtype=torch.float32)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    free, moved = [size + placement.SPARE], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free[0], 80 << 30))
    monkeypatch.setattr(model, "to", lambda device: moved.append(device) or model)
    assert placement.placed(model) is model and moved == ["cuda"]  # one GPU holds it

    def memory(model, no_split_module_classes):
        assert no_split_module_classes == ["LlamaDecoderLayer"]
        return {0: size - layer, 1: size, "cpu": size}

    free[0] -= 1
    monkeypatch.setattr("accelerate.utils.get_balanced_memory", memory)
    monkeypatch.setattr(placement, "spread", lambda model, device_map: device_map)
    places = placement.placed(model)
    assert moved == ["cuda"] and set(places.values()) == {0, 1}
    layers = [name for name in places if "layers" in name]
    assert layers == [f"model.layers.{i}" for i in range(len(model.model.layers))]  # none in parts


def test_batches_of_similar_length_hold_no_more_than_they_may(tiny):
    teacher = load_teacher("google/flan-t5-xl", torch.float32)
    prompts = [[5] * n for n in (3, 50, 7, 49, 4, 48)]
    _, forwarded = batches.next_token_log_probs(teacher.model, prompts, [4, 5], max_tokens=150)
    assert forwarded == 150 + 3 * 7


@pytest.mark.parametrize("run", PAPER.pools["multiple_choice"].runs, ids=lambda run: run.name)
def test_student_learns_answers_and_comes_back(tiny, tmp_path, run):
    assert build(run.student, 0).model.config.model_type == models.MODELS[run.student.encoder].config["model_type"]
    task = load_task("race_middle", "test").first(6)
    P = np.random.default_rng(0).dirichlet(np.ones(4), (6, 24))
    scored = experiments.Scored("teacher", task, P)
    small = replace(run, training=replace(run.training, epochs=3, learning_rate=1e-2))
    answers = experiments.distil(small, scored, scored, tmp_path)
    assert answers.P.shape == (6, 4, 4) and np.allclose(answers.P.sum(-1), 1)
    again = Student.from_pretrained(tmp_path / "students" / small.name)
    asked = experiments.test_inputs(small, scored)
    assert np.allclose(again.predict_batch(**asked), answers.P, atol=1e-5)
    untrained = build(run.student, 0).predict_batch(**asked)
    assert np.abs(untrained - answers.P).max() > 1e-3
    assert unlabelled(task.questions) == asked["questions"]
