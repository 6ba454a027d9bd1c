"""Where the answer starts, and what the model says there: thinking blocks, models without a chat template, forms of labels.

The models are tiny and made by hand: what comes next depends on the last token alone. Their tokenizers are trained here.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_students import make_encoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from permdistill import cli, scores, teachers
from permdistill.engine import trie
from permdistill.orders import all_orders
from permdistill.prompts import TEMPLATES, forms
from permdistill.questions import Question
from permdistill.teachers import CausalTeacher, Seq2SeqTeacher, load_teacher, model_key

LETTERS, PLAIN, BRIEF = (TEMPLATES[name] for name in ("letters", "plain", "brief"))
# Qwen3's, shortened: a turn begins with a thought unless it is told not to.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def make_tokenizer(chat: str | None) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ["Question: which animal can fly? an eagle a trout"] * 9 + [
        f"Answer: {letter} {letter}" for letter in ALPHABET
    ] * 9
    special = ["<s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(text, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet))
    raw.add_tokens(["\n\n"])
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=chat, bos_token="<s>", eos_token="<|im_end|>")


def make_model(folder: Path, chat: str | None, next_tokens: dict[str, dict[str, float]]) -> str:
    """A checkpoint that says ``next_tokens`` {token after: weight} after a token, and anything after others."""
    tokenizer = make_tokenizer(chat)
    sizes = {"hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["eos_token_id"] = tokenizer.eos_token_id  # where a server ends a reply
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=False, **sizes)
    )
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[0].get_submodule(name).weight.zero_()
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.copy_(torch.linalg.qr(torch.randn(len(tokenizer), 256))[0])  # columns: rows are nearly orthogonal
        embedding /= embedding.norm(dim=1, keepdim=True)
        head.zero_()
        for last, following in next_tokens.items():
            for text, weight in following.items():
                (before,), (after,) = (tokenizer.encode(t, add_special_tokens=False) for t in (last, text))
                head[after] += weight * embedding[before]
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory) -> str:
    saying = {"\n": {"<think>": 1.0}, "\n\n": {"A": 1.0, "B": 0.95, "C": 0.9}}
    return make_model(tmp_path_factory.mktemp("thinker"), CHAT, saying)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    saying = {":": {" A": 1.0, " B": 0.95, " C": 0.9}}
    return make_model(tmp_path_factory.mktemp("base"), None, saying)


@pytest.fixture
def questions(tmp_path) -> str:
    path = tmp_path / "mine.jsonl"
    records = [{"id": f"q{i}", "question": f"which {i}?", "options": ["a cow", "an eagle", f"{i}"]} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return str(path)


# --------------------------------------------------------------------------------------------------------------------
# Thinking blocks


def test_a_thinking_template_is_refused_with_the_reason_and_scored_without_its_block(thinker, questions, tmp_path, capsys):
    command = ["score", "--teacher", thinker, "--questions", questions, "--scores", str(tmp_path), "--dtype", "float32"]
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        cli.main(command)
    assert time.monotonic() - started < 60
    said = str(stopped.value.code)
    assert "the labels 'A', 'B', 'C' get 0" in said and "'<think>' gets 100.0%" in said
    assert """pass --template-args '{"enable_thinking": false}'""" in said and "--min-label-mass 0 scores anyway" in said
    assert not list((tmp_path / Path(thinker).name).glob("*.parquet"))
    cli.main([*command, "--template-args", '{"enable_thinking": false}'])
    said = capsys.readouterr().out
    assert "12 questions scored now" in said and "label mass 1.00" in said and "try another" not in said
    cli.main([*command, "--min-label-mass", "0"])  # another key, so all of them again
    said = capsys.readouterr().out
    assert "12 questions scored now" in said and "label mass 0.00: the model wants to say something else" in said


def test_template_args_reach_the_prompt_and_the_key(thinker):
    quick = {"enable_thinking": False}
    teacher = load_teacher(thinker, torch.float32, template_args=quick)
    question = Question("q", "", "which?", ("a cow", "an eagle"))
    assert teacher.prompt(question, (0, 1), LETTERS).endswith("assistant\n<think>\n\n</think>\n\n")
    assert teacher.prompts(question, all_orders(2), LETTERS)[0] == teacher.prompt(question, (0, 1), LETTERS)
    assert teacher.model_key == model_key(thinker, torch.float32, quick) != model_key(thinker, torch.float32)
    assert teacher.model_key == model_key(thinker, torch.float32) + ', template arguments {"enable_thinking": false}'
    assert model_key(thinker, torch.float32, {}) == model_key(thinker, torch.float32)
    with pytest.raises(ValueError, match="chat template does not read 'enable_thinkin'"):
        load_teacher(thinker, torch.float32, template_args={"enable_thinkin": False})


def test_the_questions_tried_go_through_in_smaller_passes_when_memory_ends(thinker):
    teacher = load_teacher(thinker, torch.float32, 4096, {"enable_thinking": False})
    asked = [Question(f"q{i}", "", f"which {i}?", ("a cow", "an eagle")) for i in range(4)]
    assert trie.obstacle(teacher.model) is None
    forward, passes = teacher.model.forward, []

    def full(input_ids=None, **rest):
        passes.append(input_ids.numel())
        if input_ids.numel() > 60:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(input_ids, **rest)

    teacher.model.forward, teacher.least_mass = full, 0.5
    with pytest.warns(UserWarning, match="out of memory in a pass of"):
        teacher.check(asked, LETTERS)
    assert max(passes) > 60 >= passes[-1]


def test_a_block_that_no_argument_turns_off_is_named(tmp_path, questions):
    always = CHAT.split("{% if enable_thinking")[0] + "<think>\n{% endif %}"
    name = make_model(tmp_path / "always", always, {"\n": {"\n\n": 1.0}})
    with pytest.raises(
        SystemExit, match="begins a thought: serve it, and read its replies with .permdistill ask --mode answer"
    ):
        cli.main(["score", "--teacher", name, "--questions", questions, "--scores", str(tmp_path), "--dtype", "float32"])


# --------------------------------------------------------------------------------------------------------------------
# Models without a chat template


def test_a_base_model_gets_a_plain_prompt_which_is_said_before_its_weights_are_loaded(
    base, questions, tmp_path, capsys, monkeypatch
):
    command = ["--teacher", base, "--questions", questions, "--scores", str(tmp_path), "--dtype", "float32"]
    load, said = teachers.load_teacher, []
    monkeypatch.setattr(teachers, "load_teacher", lambda *a, **b: said.append(capsys.readouterr().out) or load(*a, **b))
    cli.main(["score", *command])
    assert "has no chat template: template plain instead of letters" in said[0]
    assert "template plain: 12 questions scored now" in (found := capsys.readouterr().out) and "label mass 1.00" in found
    cli.main(["score", *command])
    assert "all 12 questions were in the store" in capsys.readouterr().out and len(said) == 1
    cli.main(["audit", *command, "--n", "3"])
    assert "template plain: 3 questions re-scored" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="with template 'letters'.* give another --template"):
        cli.main(["score", *command, "--template", "letters"])


def test_notebooks_give_a_base_model_a_plain_prompt_too(base, questions, tmp_path, capsys, monkeypatch):
    from permdistill.paper import experiments, profiles

    for _ in range(2):  # scored, and found again without its weights
        (found,) = experiments.teachers_scores(profiles.get("smoke"), tmp_path, str(tmp_path / "no"), base, questions)
        assert found.task.template.name == "plain" and found.P.shape == (12, 6, 3)
        assert "has no chat template: template plain instead of letters" in capsys.readouterr().out
        monkeypatch.setattr(experiments, "_live", lambda *a: pytest.fail("loaded"))


def test_notebooks_refuse_a_thinking_template_too(thinker, questions, tmp_path):
    from permdistill.paper import experiments, profiles

    own = (profiles.get("smoke"), tmp_path, str(tmp_path / "no"), thinker, questions)
    with pytest.raises(ValueError, match="""pass --template-args '{"enable_thinking": false}'"""):
        experiments.teachers_scores(*own)
    assert not list(tmp_path.rglob("*.parquet"))
    prompting = {"template_args": {"enable_thinking": False}, "variants": True}
    for _ in range(2):  # scored, and found again
        (found,) = experiments.teachers_scores(*own, prompting)
        assert found.P.shape == (12, 6, 3) and found.label_mass > 0.99
    (anyway,) = experiments.teachers_scores(*own, {"min_label_mass": 0})
    assert anyway.label_mass < 0.01
    for wrong in ({"template-args": {}}, {"variants": "no"}, {"template_args": '{"enable_thinking": false}'}):
        with pytest.raises(ValueError, match="give template_args, variants, min_label_mass"):
            experiments.teachers_scores(*own, wrong)
    with pytest.raises(ValueError, match="prompting goes with a teacher or questions of your own"):
        experiments.teachers_scores(*own[:3], prompting=prompting)


def test_sweep_scores_with_template_arguments(thinker, questions, tmp_path, capsys):
    command = ["sweep", "--teacher", thinker, "--questions", questions, "--output", str(tmp_path / "out"), "--epochs", "1"]
    command += ["--scores", str(tmp_path / "no"), "--encoders", make_encoder(tmp_path / "encoder"), "--held-out", "0.25"]
    command += ["--learning-rates", "1e-3", "--max-length", "64"]
    with pytest.raises(SystemExit, match="""pass --template-args '{"enable_thinking": false}'"""):
        cli.main(command)
    cli.main([*command, "--template-args", '{"enable_thinking": false}'])
    assert "closest to its targets" in capsys.readouterr().out
    from_store = ["sweep", "--tasks", "arc_easy", *command[1:3], "--scores", str(tmp_path / "out" / "scores"), "--variants"]
    with pytest.raises(SystemExit, match="no scores in .* forms of labels summed"):
        cli.main(from_store)


def test_plain_prompts_in_full(base):
    teacher = load_teacher(base, torch.float32)
    question = Question("q", "", "Which can fly?", ("a cow", "an eagle"))
    prompt = "Question: Which can fly?\n A. an eagle\n B. a cow\nAnswer:"
    assert teacher.prompt(question, (1, 0), PLAIN) == prompt
    assert teacher.prompts(question, all_orders(2), PLAIN)[1] == prompt
    tokens = teacher.tokenizer.encode(prompt)
    assert teacher.label_tokens(2, PLAIN) == [t for word in (" A", " B") for t in teacher.tokenizer.encode(word)]
    assert set(teacher.label_tokens(2, PLAIN)) <= set(tokens)  # the options show the very tokens that are asked for


def test_the_start_of_text_is_written_where_the_tokenizer_writes_one(base):
    from tokenizers.processors import TemplateProcessing

    teacher = load_teacher(base, torch.float32)
    plain = Question("q", "", "?", ("a", "b"))
    assert not teacher.prompt(plain, (0, 1), PLAIN).startswith("<s>")
    backend = teacher.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    other = CausalTeacher("other", teacher.model, teacher.tokenizer, "")
    (tokens,) = other.tokenize([plain], np.array([[0, 1]]), PLAIN)
    assert tokens == teacher.tokenizer.encode(other.prompt(plain, (0, 1), PLAIN).removeprefix("<s>"))


# --------------------------------------------------------------------------------------------------------------------
# Forms of a label


def test_forms_of_a_label():
    assert forms("A") == ("A", " A", "(A", "a") and forms(" A") == (" A", "A", "(A", "a") and forms("1") == ("1", " 1", "(1")


def test_variants_are_summed_each_token_once(tmp_path):
    name = make_model(tmp_path, CHAT, {"\n\n": {" A": 0.9, "B": 0.85, "b": 0.8, "A": 0.5, "C": 0.8}})
    quick = {"enable_thinking": False}
    one, summed = (load_teacher(name, torch.float32, None, quick, variants) for variants in (False, True))
    assert summed.model_key == one.model_key + ", forms of labels summed"
    question = Question("q", "", "which?", ("a cow", "an eagle", "a trout"))
    ids = {text: one.tokenizer.encode(text)[0] for text in ("A", " A", "a", "B", " B", "b", "C", " C", "c")}
    assert one.label_forms(3, LETTERS) == [[ids["A"]], [ids["B"]], [ids["C"]]]
    assert summed.label_forms(3, LETTERS) == [[ids[f] for f in (x, f" {x}", x.lower())] for x in "ABC"]
    (prompt,) = one.tokenize([question], np.array([[0, 1, 2]]), LETTERS)
    with torch.inference_mode():
        p = one.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    orders = all_orders(3)[:1]
    for teacher in (one, summed):
        expected = [sum(p[t] for t in tokens) for tokens in teacher.label_forms(3, LETTERS)]
        found = np.exp(teacher.log_probs([question], orders, LETTERS)[0, 0])
        assert found == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"pass --variants, with which the labels get \d"):
        demanding = CausalTeacher("demanding", one.model, one.tokenizer, "", template_args=quick, least_mass=0.7)
        demanding.check([question], LETTERS)


@pytest.mark.parametrize("k", [7, 10, 26])
def test_as_many_labels_as_letters(base, thinker, k):
    """ " A" to " Z" after "Answer:", "A" to "Z" in a chat, and alone in a decoder; each one token, or refused."""
    many = {PLAIN.name: load_teacher(base), LETTERS.name: load_teacher(thinker)}
    for template in (PLAIN, LETTERS):
        teacher = many[template.name]
        assert len(set(teacher.label_tokens(k, template))) == k
        decoder = Seq2SeqTeacher("decoder", None, teacher.tokenizer, "", variants=True)
        own = decoder.label_tokens(k, template)
        assert len(set(own)) == k and [tokens[0] for tokens in decoder.label_forms(k, template)] == own
        assert len({t for tokens in decoder.label_forms(k, template) for t in tokens}) == 3 * k
    with pytest.raises(ValueError, match="7 options, template 'numbers' only 6 labels"):
        many["plain"].label_tokens(7, TEMPLATES["numbers"])


def test_score_says_how_much_goes_through_at_a_time_in_one_line(base, questions, tmp_path, capsys):
    """Here no progress is shown: TQDM_DISABLE is set."""
    command = ["score", "--teacher", base, "--questions", questions, "--scores", str(tmp_path), "--dtype", "float32"]
    cli.main(command)
    teacher = load_teacher(base, torch.float32)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("permdistill:")]
    assert said == [f"permdistill: {teacher.name}: {teacher.plan}"]
    tokens = trie.tokens_a_pass(teacher.model)
    assert teacher.plan == f"65,536 prompt tokens a forest, {tokens} tokens a pass"
    cli.main(command)
    assert not capsys.readouterr().err  # nothing to score, nothing to say


def test_plans_of_models_that_go_through_in_batches_count_those(base):
    teacher = load_teacher(base, torch.float32)
    trie._TRIED[teacher.model] = "takes no mask of our own"
    assert teacher.plan.endswith(" 2,048 tokens a pass")


# --------------------------------------------------------------------------------------------------------------------
# Label mass


def test_label_mass_is_that_of_the_stored_scores(base, tmp_path):
    teacher, store = load_teacher(base, torch.float32), scores.Store(tmp_path)
    asked = [Question(f"q{i}", "", f"which {i}?", ("a", "b", "c")) for i in range(3)]
    assert scores.score(store, teacher, asked[:2], PLAIN) == 2
    mass = scores.label_mass(store, asked, PLAIN, teacher.model_key)
    expected = np.exp(scores.load(store, asked[:2], PLAIN, teacher.model_key)).sum(-1).mean(-1)
    assert mass == pytest.approx(expected) and (0.5 < mass).all() and (mass < 1).all()
