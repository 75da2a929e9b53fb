"""Prompts to text embeddings."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from serve_app.engine.prompt_weights import WeightedText, parse_weights
from serve_app.engine.request import Conditioning, GenerationRequest
from serve_app.errors import JobError
from serve_app.models.components import BaseComponents

_CACHE_BYTES = 256 * 2**20
"""On the device. In float16 a piece takes 118 kB for SD 1.5 and 318 kB for SDXL: room for 2,000 or 800 short prompts.
The API's 10,000 bytes are at most 134 pieces. The empty prompt is in nearly every request."""

_PIECES_AT_ONCE = 8
"""Pieces of one prompt in one forward of the text encoder, so that a long prompt needs no more memory than a few."""


class Encoded(NamedTuple):
    """One prompt, as the UNet takes it."""

    text: Tensor
    """(1, n * 77, d)."""
    pooled: Tensor | None
    """(1, p) for SDXL."""

    @property
    def nbytes(self) -> int:
        return self.text.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class PromptEncoder:
    """CLIP text embeddings, kept by model, prompt and clip_skip while they fit; the least recently used goes first."""

    def __init__(self, cache_bytes: int = _CACHE_BYTES) -> None:
        self._cache: OrderedDict[tuple[str, str, str, int | None], Encoded] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0

    def rows(self, request: GenerationRequest) -> Conditioning:
        """The text of a request: (2, n * 77, d) with the unconditional row first, or (1, n * 77, d).

        Up to 75 tokens without weights this is what diffusers' ``encode_prompt`` computes, clip_skip on the positive
        prompt alone included. Longer prompts are cut into pieces of 75 tokens that are encoded one by one and put in a
        row; the shorter prompt is filled up with empty pieces. SDXL's pooled embedding is that of the first piece.

        For models whose ``model_index.json`` asks for it (SDXL's does), an empty negative prompt is zeros. diffusers
        does that when no negative prompt is given at all; in this API an empty one means just that.

        Raises:
            JobError: the text encoders have not as many layers as ``clip_skip`` wants to skip.
        """
        task, base = request.task, request.base
        if task.clip_skip is not None and task.clip_skip > base.max_clip_skip:
            raise JobError(
                f"clip_skip {task.clip_skip} is too large: the model {base.id!r} allows 1 to {base.max_clip_skip}."
            )
        positive = self._encode(base, task.prompt, task.clip_skip)
        sizes = _sizes(request)
        if not request.guided:
            return Conditioning(positive.text, positive.pooled, sizes)
        if base.zero_empty_negative and not task.negative_prompt.strip():
            negative = Encoded(
                torch.zeros_like(positive.text), None if positive.pooled is None else torch.zeros_like(positive.pooled)
            )
        else:
            negative = self._encode(base, task.negative_prompt, None)
        length = max(positive.text.shape[1], negative.text.shape[1])
        text = torch.cat(
            [self._filled(base, negative, length, None), self._filled(base, positive, length, task.clip_skip)]
        )
        if negative.pooled is None or positive.pooled is None or sizes is None:
            return Conditioning(text)
        return Conditioning(text, torch.cat([negative.pooled, positive.pooled]), sizes)

    def clear(self) -> None:
        """Forget everything; the device needs the room."""
        self._cache.clear()
        self._cached_bytes = 0

    def _filled(self, base: BaseComponents, encoded: Encoded, length: int, clip_skip: int | None) -> Tensor:
        missing = (length - encoded.text.shape[1]) // base.tokenizer.model_max_length
        return torch.cat([encoded.text, *(self._encode(base, "", clip_skip).text for _ in range(missing))], dim=1)

    def _encode(self, base: BaseComponents, prompt: str, clip_skip: int | None) -> Encoded:
        key = (base.id, base.hash, prompt, clip_skip)
        if key not in self._cache:
            weighted = parse_weights(prompt)
            empty = None if weighted.plain else self._encode(base, "", clip_skip).text
            encoded = encode_prompt(base, weighted, clip_skip, empty)
            self._make_room(encoded.nbytes)
            if encoded.nbytes > self._cache_bytes:
                return encoded
            self._cache[key] = encoded
            self._cached_bytes += encoded.nbytes
        self._cache.move_to_end(key)
        return self._cache[key]

    def _make_room(self, wanted_bytes: int) -> None:
        while self._cache and self._cached_bytes + wanted_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes


def encode_prompt(
    base: BaseComponents, prompt: WeightedText, clip_skip: int | None, empty: Tensor | None = None
) -> Encoded:
    """The text encoder's last hidden state, or the one ``clip_skip`` layers before it, normalised.

    SDXL: the last but one of both encoders side by side, or those ``clip_skip`` layers before, as they are; and the
    pooled embedding of the second encoder's first piece.

    A token of weight w becomes ``empty + w (text - empty)``, with the empty prompt's state at the same place, as in
    ComfyUI and compel: every other token stays what it was, 0 takes the token's meaning away, and all is well defined.
    (A1111 scales the state itself, and then everything to restore the mean: a weight in one place changes all others,
    and fails where the mean is near zero.) The pooled embedding has no tokens and takes no weights.

    ``empty``: (1, 77, d), the encoded empty prompt; needed where ``prompt`` has weights.
    """
    encode = _encode_sd if base.text_encoder_2 is None else _encode_sdxl
    states, pooled = encode(base, prompt, clip_skip)
    if empty is not None:
        weights = _token_pieces(base.tokenizer, prompt).weights.to(base.device)[..., None]  # (n, 77, 1)
        moved = empty.float() + weights * (states.float() - empty.float())
        states = torch.where(weights == 1, states, moved.to(states.dtype))
    return Encoded(states.flatten(0, 1).unsqueeze(0), pooled)


def _encode_sd(base: BaseComponents, prompt: WeightedText, clip_skip: int | None) -> tuple[Tensor, Tensor | None]:
    """(n, 77, d) in the model's dtype."""
    encoder, states = base.text_encoder, []
    masked = getattr(encoder.config, "use_attention_mask", False)
    for ids, attended in _token_pieces(base.tokenizer, prompt).batches():
        mask = attended.to(base.device) if masked else None
        if clip_skip is None:
            states.append(encoder(ids.to(base.device), attention_mask=mask).last_hidden_state)
        else:
            layers = encoder(ids.to(base.device), attention_mask=mask, output_hidden_states=True).hidden_states
            states.append(encoder.final_layer_norm(layers[-(clip_skip + 1)]))
    return torch.cat(states).to(base.dtype), None


def _encode_sdxl(base: BaseComponents, prompt: WeightedText, clip_skip: int | None) -> tuple[Tensor, Tensor | None]:
    """(n, 77, d1 + d2) and (1, p), in the model's dtype."""
    layer = -2 if clip_skip is None else -(clip_skip + 2)
    first, second = (
        [
            encoder(ids.to(base.device), output_hidden_states=True)
            for ids, _ in _token_pieces(tokenizer, prompt).batches()
        ]
        for tokenizer, encoder in base.text_encoders
    )
    states = torch.cat([torch.cat([part.hidden_states[layer] for part in parts]) for parts in (first, second)], dim=-1)
    return states.to(base.dtype), second[0].text_embeds[:1].to(base.dtype)


class _Pieces(NamedTuple):
    """A prompt in pieces that the text encoder takes, each framed by the start and end token, then padding."""

    ids: Tensor  # (n, 77)
    attended: Tensor  # (n, 77), 1 up to the end token
    weights: Tensor  # (n, 77), 1 for what is no word

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and attention mask of a few pieces at a time."""
        return zip(self.ids.split(_PIECES_AT_ONCE), self.attended.split(_PIECES_AT_ONCE), strict=True)


def _token_pieces(tokenizer: CLIPTokenizer, prompt: WeightedText) -> _Pieces:
    """A token has the weight of its first character, so that weights never change how words are cut into tokens."""
    words = tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = tokenizer.model_max_length - 2
    ids, attended, weights = [], [], []
    for begin in range(0, max(len(words.input_ids), 1), room):
        inner = slice(begin, begin + room)
        piece = [tokenizer.bos_token_id, *words.input_ids[inner], tokenizer.eos_token_id]
        padding = tokenizer.model_max_length - len(piece)
        ids.append(piece + [tokenizer.pad_token_id] * padding)
        attended.append([1] * len(piece) + [0] * padding)
        weights.append(
            [1.0, *(prompt.weights[start] for start, _ in words.offset_mapping[inner]), *[1.0] * (padding + 1)]
        )
    return _Pieces(torch.tensor(ids), torch.tensor(attended), torch.tensor(weights))


def _sizes(request: GenerationRequest) -> Tensor | None:
    """(rows, 6) for SDXL: original height and width, crop corner, target height and width, in diffusers' order."""
    if request.base.text_encoder_2 is None:
        return None
    size = (float(request.task.height), float(request.task.width))
    return torch.tensor([(*size, 0.0, 0.0, *size)] * request.rows, device=request.base.device)
