"""What `permdistill ask --mode logprobs` sends to a serving engine (vLLM, SGLang): which fields, and in which order."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path

import openai_server
import pytest
from openai_server import planted_backend, serving

from permdistill import cli

SCALE = (Path(__file__).parent.parent / "docs" / "scale.md").read_text(encoding="utf-8")


def shared(a: str, b: str) -> int:
    """Length of the common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def computed(prompts: list[str]) -> int:
    """Characters that a server computes whose cache holds the last prompt only: one for each different prefix at best."""
    return sum(len(p) - shared(p, before) for p, before in zip(prompts, ["", *prompts], strict=False))


@pytest.fixture
def sent(monkeypatch) -> list[dict]:
    """The bodies of all requests, as they arrive."""
    bodies: list[dict] = []
    reply = openai_server.Server.reply
    monkeypatch.setattr(openai_server.Server, "reply", lambda self, body: bodies.append(body) or reply(self, body))
    return bodies


def ask(folder: Path, records: list[dict], *more: str) -> None:
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    with serving(planted_backend()) as server:
        arguments = ["--base-url", server.url, "--model", "m", "--questions", str(folder / "mine.jsonl")]
        cli.main(["ask", *arguments, "--mode", "logprobs", "--replies", str(folder / "replies"), *more])


def passages(n: int = 3) -> list[dict]:
    """Questions on ``n`` passages, those of one passage far apart."""
    return [
        {"id": f"{i}/{j}", "context": f"{i}. A passage.", "question": f"{word} happens?", "options": ["x", "y", f"z{j}"]}
        for j, word in enumerate(("What", "Why", "Where"))
        for i in reversed(range(n))
    ]


def test_calls_leave_in_the_depth_first_order_of_their_shared_prefixes(sent, tmp_path):
    records = passages()
    ask(tmp_path, records, "--concurrency", "1")
    prompts = [body["messages"][0]["content"] for body in sent]
    assert len(set(prompts)) == len(prompts) == 9 * 6
    prefixes = {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    assert computed(prompts) == len(prefixes)
    first = re.findall(r"\d\. A passage", "".join(prompts))
    assert list(dict.fromkeys(first)) == [f"{i}. A passage" for i in (2, 1, 0)]  # a budget that ends early buys the first
    assert sum(map(len, prompts)) > 3 * len(prefixes)


def test_pairs_of_one_document_share_their_first_summary(sent, tmp_path):
    """All orders of all pairs, each asked two questions: the first summary of many prompts is computed once."""
    summaries = [f"{name} is a summary." for name in ("Ann's", "Bob's", "Carl's", "Dora's")]
    records = [
        {"id": f"{what} {a} {b}", "context": "An article.", "question": f"Which is more {what}?", "options": [a, b]}
        for what in ("coherent", "fluent")
        for a, b in combinations(summaries, 2)
    ]
    with pytest.raises(SystemExit, match="12 items are incomplete"):  # the planted server knows no numbers
        ask(tmp_path, records, "--concurrency", "1", "--template", "summaries", "--tries", "1")
    prompts = [body["messages"][0]["content"] for body in sent]
    prefixes = {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    assert len(prompts) == 24 and computed(prompts) == len(prefixes)


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_the_fields_are_those_that_the_engine_documents(sent, tmp_path, engine):
    """The page's --extra-body arrives as it stands there, beside what is always sent."""
    (extra,) = re.findall(rf"{engine}: `--extra-body '(.*?)'`", SCALE)
    ask(tmp_path, passages(1), "--extra-body", extra)
    always = {"model": "m", "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "logprobs": True, "top_logprobs": 20}
    for body in sent:
        assert {name: value for name, value in body.items() if name != "messages"} == always | json.loads(extra)
    assert len(sent) == 18
