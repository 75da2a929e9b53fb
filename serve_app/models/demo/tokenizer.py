"""CLIP's tokenizer made by code: byte-level BPE, so that any text has tokens, with merges for common prompt words.

And the text encoder of its vocabulary.
"""

from collections.abc import Iterable
from itertools import pairwise

from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 77
"""Context of CLIP, start and end token included."""

_WORDS = """
a an the of in on at with and by for from to over under near into without very no not photo photograph picture image
painting drawing sketch portrait poster render illustration watercolor oil pencil ink cat dog horse bird fish tiger
lion fox bear owl dragon robot astronaut knight wizard queen king girl boy man woman child face eyes hair hand hands
people person crowd house city street castle bridge tower room kitchen door window wall tree forest mountain river
lake sea ocean beach desert island garden flower flowers grass field sky cloud clouds sun moon stars space planet
night day morning evening sunset sunrise winter summer autumn spring rain snow fog fire water ice red green blue
yellow orange purple pink black white grey brown gold silver colorful dark bright soft sharp warm cold old new big
small tall long young beautiful ugly cute realistic detailed highly ultra professional cinematic dramatic light
lighting shadow studio natural focus style art digital concept anime fantasy modern vintage abstract minimal car train
ship boat bicycle plane rocket chair table lamp book clock cup bottle hat dress coat glasses sword crown best quality
low worst blurry deformed text watermark signature bad cropped extra missing masterpiece award winning
turquoise gray circle square triangle star heart diamond ring cross hexagon striped dotted checkered background ground
front render simple
"""


def build_tokenizer() -> CLIPTokenizer:
    """The vocabulary in CLIP's order: 256 byte symbols, their word-final forms, merges, then the two specials.

    The end token has the highest id, which is where CLIP's text model looks for the pooled state.
    """
    symbols = list(_byte_symbols())
    merges = _merges(_WORDS.split())
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, *, mlp_width: int, heads: int) -> CLIPTextModel:
    """An encoder of two layers, its weights as transformers draws them."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=mlp_width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _byte_symbols() -> Iterable[str]:
    """One printable character per byte, as GPT-2 assigns them: printable Latin-1 is itself, other bytes follow 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    yield from (chr(byte) for byte in sorted(printable))
    yield from (chr(256 + index) for index in range(256 - len(printable)))


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merge rules, strongest first, by which every word that is given becomes a single token."""
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            pair = min(pairs, key=lambda each: ranks.get(each, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            at = pairs.index(pair)
            parts[at : at + 2] = ["".join(pair)]
    return list(ranks)
