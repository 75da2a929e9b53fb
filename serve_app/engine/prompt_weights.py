r"""Weights in prompts: ``(text:1.2)`` gives a part of the prompt more say, or less.

The form is the one that most prompts in circulation use, and only that form counts: ``(text)``, ``[text]``, ``{text}``
and all other brackets stay what they are, so that a prompt without weights is the prompt that diffusers would see.
The libraries for it do otherwise: compel 2.5 has a grammar of its own (``(text)1.2``, ``text++``) and reads
``(text:1.2)`` as plain words; it and diffusion-prompt-embedder 0.4 drop the brackets of plain prompts.

Knows nothing of tokens or models.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

MAX_WEIGHT = 5.0
"""A larger number is no weight, so that ``(16:9)`` stays text; nested weights that multiply to more count as this."""

_MARK = re.compile(r"\\[\\():]|\(|: {0,8}([0-9]{0,8}\.?[0-9]{1,8}) {0,8}\)|\)")
"""An escaped character, an opening bracket, a number that ends a weighted part, any other closing bracket."""


@dataclass(frozen=True, slots=True)
class WeightedText:
    """A prompt without its marks, and how much say each character has."""

    text: str
    weights: Sequence[float]
    """One for each character of ``text``, from 0 to MAX_WEIGHT."""

    @property
    def plain(self) -> bool:
        """Whether no part has a weight of its own."""
        return all(weight == 1 for weight in self.weights)


def parse_weights(prompt: str) -> WeightedText:
    r"""Read every ``(text:number)`` and take its marks out of the prompt.

    Weighted parts may hold others; their weights multiply. ``\(``, ``\)``, ``\:`` and ``\\`` are the characters
    themselves; any other backslash is text. A part without text, an unmatched bracket and a number above MAX_WEIGHT
    are text. Takes time linear in the prompt's length, however deep it nests, and fails for no text.
    """
    marks = list(_MARK.finditer(prompt))
    parts = _weighted_parts(marks)
    text: list[str] = []
    weights: list[float] = []
    around = [1.0]
    end = 0
    for mark in marks:
        said = prompt[end : mark.start()]
        end = mark.end()
        weight = parts.get(mark.start())
        if mark[0].startswith("\\"):
            said += mark[0][1]
        elif weight is None:
            said += mark[0]
        text.append(said)
        weights += [min(around[-1], MAX_WEIGHT)] * len(said)
        if weight is None:
            continue
        if mark[0] == "(":
            around.append(min(around[-1] * weight, 1e30))  # infinity x 0 would be no number
        else:
            around.pop()
    rest = prompt[end:]
    return WeightedText("".join(text) + rest, [*weights, *[1.0] * len(rest)])


def _weighted_parts(marks: Sequence["re.Match[str]"]) -> dict[int, float]:
    """Position of each mark that begins or ends a weighted part -> its weight."""
    parts: dict[int, float] = {}
    opened: list[re.Match[str]] = []
    for mark in marks:
        if mark[0] == "(":
            opened.append(mark)
        elif mark[0].endswith(")") and mark[0] != "\\)" and opened:
            begin = opened.pop()
            if mark[1] is not None and float(mark[1]) <= MAX_WEIGHT and begin.end() < mark.start():
                parts[begin.start()] = parts[mark.start()] = float(mark[1])
    return parts
