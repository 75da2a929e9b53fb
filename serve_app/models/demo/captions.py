"""Captions for scenes, from a small grammar; everything a caption says is in the picture."""

from collections.abc import Sequence

import numpy as np

from serve_app.models.demo.scenes import Item, Scene

_OPENINGS = ("a photo of", "a picture of", "a painting of", "an illustration of", "a drawing of", "a render of")
_GROUNDS = ("on a {} background", "on a {} ground", "on {}", "in front of a {} wall", "{} background")
_ENDINGS = ("best quality", "highly detailed", "masterpiece", "simple", "professional", "minimal", "realistic")
_OPENED, _ENDED, _GROUNDED, _TEXTURED, _GREY = 0.5, 0.3, 0.85, 0.9, 0.5


def caption(scene: Scene, random: np.random.Generator) -> str:
    """One of many ways to say what is in ``scene``. The ground and textures are left out now and then."""
    items = [scene.items[index] for index in random.permutation(len(scene.items))]
    said = _join([_noun(item, random) for item in items], random)
    if random.random() < _OPENED:
        said = f"{_one_of(_OPENINGS, random)} {said}"
    if random.random() < _GROUNDED:
        ground = _one_of(_GROUNDS, random).format(_colour(scene.ground, random))
        said = f"{said}, {ground}" if ground.endswith("background") and random.random() < 0.5 else f"{said} {ground}"  # noqa: PLR2004
    if random.random() < _ENDED:
        endings = random.choice(len(_ENDINGS), size=int(random.integers(1, 3)), replace=False)
        said = ", ".join([said, *(_ENDINGS[index] for index in endings)])
    return said


def words() -> frozenset[str]:
    """Words of the grammar's fixed parts, for the vocabulary."""
    phrases = (*_OPENINGS, *(ground.format("") for ground in _GROUNDS), *_ENDINGS)
    return frozenset(word for phrase in phrases for word in phrase.split())


def _noun(item: Item, random: np.random.Generator) -> str:
    words = [_colour(item.colour, random), item.shape]
    if item.texture is not None and random.random() < _TEXTURED:
        words.insert(int(random.integers(2)), item.texture)
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words])


def _join(nouns: Sequence[str], random: np.random.Generator) -> str:
    """a; a and b; a, b and c."""
    if len(nouns) == 1:
        return nouns[0]
    last = " and " if random.random() < 0.8 else ", "  # noqa: PLR2004  - mostly
    return ", ".join(nouns[:-1]) + last + nouns[-1]


def _colour(name: str, random: np.random.Generator) -> str:
    return "gray" if name == "grey" and random.random() < _GREY else name


def _one_of(choices: Sequence[str], random: np.random.Generator) -> str:
    return choices[int(random.integers(len(choices)))]
