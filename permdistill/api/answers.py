"""The final answer that a longer reply states, read by rules; never guessed.

A rule looks at a reply without its thoughts (:func:`without_thoughts`) and without LaTeX's and markdown's markup
(:func:`plain`). There are four, in the order in which they are named in the store:

    stated   the last "the answer is X", "Answer: X", "Die Antwort ist X", "答案是X", ..
    boxed    \\boxed{X}
    label    a label alone on the last line
    option   an option's whole text on the last line, with or without its label before it

X is a label as it was shown, or an option's whole text; where it could be both, of two positions, it is nothing. A reply
counts when every rule that finds something finds the same, and nothing after it takes it back: another label, "No,", "wait".
All else is a failure with a name. The rules prefer silence to an error: "B is correct" is not read, nor is "b".
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

LONGEST = 20_000  # characters of a reply that are read, its last ones: some rules take the square of it
SENTENCE = 1_000  # characters of a sentence without end that are read before what it states
NO_ANSWER, TWO_ANSWERS = "no final answer stated", "final answers that disagree"

_TAG = "think|thinking|thoughts?|reasoning|reflection|scratchpad|seed:think"
_OPENED, _CLOSED = rf"<(?:{_TAG})>|\[THINK\]|◁think▷", rf"</(?:{_TAG})>|\[/THINK\]|◁/think▷"
_HARMONY = r"<\|channel\|>final<\|message\|>"

# What announces an answer, then words that may stand before it.
_ADVERB = r"(?:(?:therefore|thus|clearly|definitely|indeed|most likely|probably|also|daher|donc|por tanto|quindi),?\s+)?"
_NOUN = r"(?:(?:the\s+)?(?:option|choice|letter|number|answer)\s+)?"
_ANNOUNCED = [
    rf"\banswer(?:\s+(?:to|for)\s+(?:this|the)\s+(?:question|problem))?\s*(?:is\s*:|is\b|:|=|—|–)\s*{_ADVERB}{_NOUN}",
    rf"\b(?:correct|right|best)\s+(?:choice|option)\s*(?:is\s*:|is\b|:)\s*{_ADVERB}{_NOUN}",
    rf"\bantwort\s*(?:ist\b|lautet\b|:)\s*:?\s*{_ADVERB}(?:(?:die\s+)?(?:option|antwort|buchstabe)\s+)?",
    rf"\bréponse\s+(?:\w+\s+)?est\b\s*:?\s*{_ADVERB}(?:(?:la\s+)?(?:lettre|réponse|option)\s+|la\s+)?|\bréponse(?:\s+\w+)?\s*:\s*",
    rf"\brespuesta\s+(?:(?!(?:no|nunca|tampoco|jamás)\b)\w+\s+)?es\b\s*:?\s*{_ADVERB}(?:(?:la\s+)?(?:letra|opción)\s+|la\s+)?|\brespuesta(?:\s+\w+)?\s*:\s*",
    rf"\brisposta\s+(?:(?!(?:non|mai|neppure)\b)\w+\s+)?è\s*:?\s*{_ADVERB}(?:(?:la\s+)?(?:lettera|opzione)\s+|la\s+)?|\brisposta(?:\s+\w+)?\s*:\s*",
    r"\bresposta\s+(?:(?!(?:não|nunca|nem)\b)\w+\s+)?é\s*:?\s*(?:(?:a\s+)?(?:letra|alternativa|opção)\s+)?|\bresposta(?:\s+\w+)?\s*:\s*",
    r"\bantwoord\s*(?:is\b|luidt\b|:)\s*:?\s*(?:optie\s+)?",
    r"\bodpowiedź\s*(?:to\b|:|—|–|-)\s*",
    r"\bответ\s*(?::|—|–|-)\s*(?:вариант\s+)?",
    r"\bcevap\s*:\s*",
    r"答案\s*(?:是|为|為|应为|應為|:)\s*:?\s*(?:选项|選項|选|選)?\s*",
    r"(?:故|因此|所以)\s*(?:应|應)?\s*[选選]\s*(?:择|擇)?\s*",
    r"(?:答え|正解|解答)\s*(?:は|:)\s*",
    r"(?:정답|답)\s*(?:은|는|:)\s*",
]
_STATED = re.compile("|".join(_ANNOUNCED), re.I)
_HEDGED = re.compile(
    r"\b(?:not|never|no|nor|neither|cannot|if|whether|unless|unlikely|doubt\w*|wrong|incorrect|suppos\w+|assum\w+|might|may"
    r"|could|would|should|said|says|claim\w*|thought|why|when|nobody|guess|opposite of|contrary to|false that"
    r"|nicht|kein\w*|wenn|ob|falls|pas|si|non|não|se|niet|als|nie|не|если|jeśli|eğer)\b|n['’]t\b|[不非没沒若]|如果|もし|ない|아니|만약",
    re.I,
)
# What stands right before "answer" where it is somebody else's.
_OTHERS = re.compile(
    r"(?:\b(?:another|one|other|common|popular|usual|typical|previous|first|initial|worst|bad|his|her|their|students?|users?)"
    r"|(?<!\blet)(?<!\bhere)(?<!\d)['’]s|s['’]) $",
    re.I,
)
_TAKEN_BACK = re.compile(
    r"\b(?:no|nope|nein|non|nee|nie|não|нет|hmm|hold on)\s*[,.:;!?…—–-]"
    r"|\b(?:wait|actually|sorry|correction|rather|instead|oops|scratch|mistake\w*|reflection|second thoughts?|reconsider\w*"
    r"|changed? my|not right|moment|doch|eigentlich|kidding|joking)\b"
    r"|(?:^ ?|\b(?:it|this|that|which) ?)(?:is|was|['’]s) (?:also |just |actually |clearly )?"
    r"(?:wrong|incorrect|false|mistaken|not (?:correct|true))\b"
    r"|\b(?:das|eso|esto|ciò|questo|isso) (?:ist|es|è|é) (?:falsch|fals[oa]|sbagliato|errado)\b"
    r"|\((?:wrong|incorrect|not|no)\b|不对|不，|不,|等等|いや|待って|아니",
    re.I,
)
# Announces labels that are no answers, where it is no whole sentence.
_REFUSED = re.compile(
    r"(?:\b(?:not|wrong|incorrect|eliminat\w*|exclud\w*|ruled?|false|discard\w*|falsch\w*|faux)\b|[错錯不])(?!.*[.!?。]$)",
    re.I,
)
# What may stand after a label: the end, punctuation that no word or number goes on from, or a word that gives a reason.
_CLOSES = re.compile(
    r"\s*[)\]}]+(?!\w)|\s*(?:$|\n|[.,;:!](?![\w.])|[。、]|\s*[—–]|\s-\s|\s*\("
    r"|\s+(?:because|since|weil|denn|porque|perché|omdat|ponieważ|потому)\b|です|だ|である|입니다|번|选项|選項|项)"
)
_DENIED = re.compile(r"(?:\bnot|n['’]t|\bwrong|\bincorrect)\b[^.\n]{0,20}$", re.I)
_BOXED = re.compile(r"\\f?boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True)
class Shown:
    """What the options looked like: label words and texts, by position."""

    labels: Sequence[str]
    options: Sequence[str]


@dataclass(frozen=True)
class Found:
    """What a rule found: positions (none or several: something that cannot be read) and where in the text that ends."""

    positions: frozenset[int]
    end: int


def without_thoughts(text: str) -> str:
    """The reply after its thoughts: <think>..</think> and its relatives, also where the prompt had opened the block. "" when
    a thought has no end."""
    text = re.split(_HARMONY, text)[-1]
    said = re.split(_CLOSED, text, flags=re.I)
    if re.search(_OPENED, said[-1], re.I):
        return ""
    return said[-1].strip()


def plain(text: str) -> str:
    """Text without emphasis, quotes, dollars and LaTeX's fonts; wide letters are made narrow. \\boxed{B} stays, and
    <answer>B</answer> becomes one."""
    text = unicodedata.normalize("NFKC", text)
    for _ in range(2):  # one inside the other
        text = re.sub(r"\\(?:text|textbf|textit|mathbf|mathrm|mathsf|bf|rm|bm)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"<answer>([^<>{}]{1,500})</answer>", r"\\boxed{\1}", text, flags=re.I)
    text = re.sub(r"\*+|__|`+|\$+|\\[()\[\]]|[\"“”„«»「」『』]", "", text)
    return re.sub(r"[^\S\n]+", " ", text).strip()


def named(text: str, start: int, shown: Shown) -> Found:
    """What stands at ``start``: a label, an option's text, or a label with its own option's text."""
    start += len(re.match(r"[\s(\[{]*", text[start:]).group())  # type: ignore[union-attr]
    found: dict[int, int] = {}  # position -> end
    for position, label in enumerate(shown.labels):
        bare = label.strip()
        if not text.startswith(bare, start) or not _CLOSES.match(text, start + len(bare)):
            continue
        end = start + len(bare)
        between = re.compile(r"[\s)\]}.,;:(—–-]*").match(text, end)
        after = between.end() if between else end
        follow = {i: to for i, option in enumerate(shown.options) if (to := _option_at(text, after, option))}
        if own := follow.get(position):
            end = own
        elif follow:
            found |= follow  # a label with another option's text
        elif re.compile(r"\.\s[^\W\d_A-Z]").match(text, end) and text[after : after + 1].islower():
            continue  # "C. elegans" is a name
        found[position] = end
    texts = {i: end for i, option in enumerate(shown.options) if (end := _option_at(text, start, option))}
    longest = max(texts.values(), default=0)
    # Beside a label, another option's text is in doubt even where it goes on: "C. Lincoln was".
    found |= {i: end for i, end in texts.items() if end == longest and (found or _CLOSES.match(text, end))}
    return Found(frozenset(found), max(found.values(), default=start))


def _option_at(text: str, start: int, option: str) -> int:
    """Where the option's text ends if it stands at ``start``, else 0."""
    match = pattern.match(text, start) if (pattern := _pattern(option)) else None
    return match.end() if match else 0


@lru_cache(maxsize=256)
def _pattern(option: str) -> re.Pattern[str] | None:
    words = [re.escape(word) for word in plain(option).rstrip(".!").split()]
    return re.compile(r"\s+".join(words) + r"(?!\w)", re.I) if words else None


# --------------------------------------------------------------------------------------------------------------------
# The rules: plain text, what was shown -> what was found, None where the rule does not apply


def stated(text: str, shown: Shown) -> Found | None:
    """The last announced answer that is no condition and no denial."""
    text = _BOXED.sub(lambda match: match.group(1).ljust(len(match.group())), text)
    said, sentence = [], 0
    for match in _STATED.finditer(text):
        sentence = max(sentence, *(text.rfind(mark, sentence, match.start()) + 1 for mark in ".!?;\n。！？"))
        before = text[max(sentence, match.start() - SENTENCE) : match.start()]
        if not (_HEDGED.search(before) or (match[0][:6].lower() == "answer" and _OTHERS.search(before))):
            said.append(match)
    if not said:
        return None
    last = said[-1]
    if re.search(r"^\s*(?:question|q)\s*\d*\s*[:.]", text[said[0].start() :], re.I | re.M):
        return Found(frozenset(), last.end())  # it has gone on to a question of its own
    found = named(text, last.end(), shown)
    return found if found.positions else Found(frozenset(), last.end())


def boxed(text: str, shown: Shown) -> Found | None:
    """What all boxes hold."""
    boxes = list(_BOXED.finditer(text))
    if not boxes:
        return None
    held = [named(plain(box.group(1)), 0, shown).positions for box in boxes]
    denied = any(_DENIED.search(text[max(0, box.start() - 40) : box.start()]) for box in boxes)
    agreed = held[0] if not denied and all(own == held[0] for own in held) else frozenset[int]()
    return Found(agreed, boxes[-1].end())


def label(text: str, shown: Shown) -> Found | None:
    """A label alone on the last line; no other label may stand alone on another line, and the line before deny none."""
    bare = [word.strip() for word in shown.labels]
    raw = [line.strip() for line in text.splitlines() if line.strip()]
    lines = [line.strip(" \t()[]{}.:,;'") for line in raw]
    if not lines or lines[-1] not in bare:
        return None
    alone = {bare.index(line) for line in lines if line in bare}
    alone |= {i for i, option in enumerate(shown.options) if plain(option).rstrip(".!").strip() == lines[-1]}
    if len(raw) > 1 and _REFUSED.search(raw[-2]):
        return Found(frozenset(), len(text))
    return Found(frozenset(alone), len(text))


def option(text: str, shown: Shown) -> Found | None:
    """An option's whole text on the last line, with nothing but its own label before it, and no other option's on a line:
    who lists the options has not answered."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not _whole(lines[-1], shown) or (len(lines) > 1 and _REFUSED.search(lines[-2])):
        return None
    return Found(frozenset[int]().union(*(_whole(line, shown) for line in lines)), len(text))


def _whole(line: str, shown: Shown) -> frozenset[int]:
    """Positions of the options that a line is the whole text of, with or without the label."""
    line, found = line.rstrip(".! "), set()
    for position, (word, own) in enumerate(zip(shown.labels, shown.options, strict=True)):
        match = re.match(rf"[(\[]?{re.escape(word.strip())}[)\].:,]+\s*", line)
        if any(_option_at(line, start, own) == len(line) for start in (0, match.end() if match else 0)):
            found.add(position)
    return frozenset(found)


RULES: dict[str, Callable[[str, Shown], Found | None]] = {"stated": stated, "boxed": boxed, "label": label, "option": option}


def final_answer(reply: str, labels: Sequence[str], options: Sequence[str]) -> tuple[int | None, str]:
    """(position, rules that found it) or (None, why not) of a whole reply. ``labels``, ``options``: by position."""
    text, shown = plain(without_thoughts(reply))[-LONGEST:], Shown(labels, options)
    found = {name: one for name, rule in RULES.items() if (one := rule(text, shown)) is not None}
    if not found:
        return None, NO_ANSWER
    if all(not one.positions for one in found.values()):
        return None, NO_ANSWER
    positions = frozenset[int]().union(*(one.positions for one in found.values()))
    if len(positions) != 1 or not all(one.positions for one in found.values()):
        return None, TWO_ANSWERS
    (position,) = positions
    rest = text[max(one.end for one in found.values()) :]
    others = [re.escape(word.strip()) for i, word in enumerate(labels) if i != position]
    if _TAKEN_BACK.search(rest) or re.search(rf"(?<![\w'’])(?:{'|'.join(others)})(?!\w)", rest):
        return None, TWO_ANSWERS
    return position, "+".join(found)
