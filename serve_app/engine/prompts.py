"""Prompts to text embeddings."""

from collections import OrderedDict

import torch
from torch import Tensor

from serve_app.engine.request import Conditioning, GenerationRequest
from serve_app.errors import JobError
from serve_app.models.components import BaseComponents

_CACHE_BYTES = 256 * 2**20
"""On the device. A piece of 77 x 768 takes 118 kB in float16: room for 2,000 short prompts, or for 16 of the longest
that the API takes (20,000 characters are at most 267 pieces) in float16. The empty one is in nearly every request."""

_PIECES_AT_ONCE = 8
"""Pieces of one prompt in one forward of the text encoder, so that a long prompt needs no more memory than a few."""


class PromptEncoder:
    """CLIP text embeddings, kept by model, prompt and clip_skip while they fit; the least recently used goes first."""

    def __init__(self, cache_bytes: int = _CACHE_BYTES) -> None:
        self._cache: OrderedDict[tuple[str, str, str, int | None], Tensor] = OrderedDict()
        self._cache_bytes = cache_bytes
        self._cached_bytes = 0

    def rows(self, request: GenerationRequest) -> Conditioning:
        """The text of a request: (2, n * 77, d) with the unconditional row first, or (1, n * 77, d).

        Up to 75 tokens this is what diffusers' ``encode_prompt`` computes, clip_skip on the positive prompt alone
        included. Longer prompts are cut into pieces of 75 tokens that are encoded one by one and put in a row; the
        shorter prompt is filled up with empty pieces.
        """
        task = request.task
        positive = self._encode(request.base, task.prompt, task.clip_skip)
        if not request.guided:
            return Conditioning(positive)
        negative = self._encode(request.base, task.negative_prompt, None)
        length = max(positive.shape[1], negative.shape[1])
        rows = (
            self._filled(request.base, negative, length, None),
            self._filled(request.base, positive, length, task.clip_skip),
        )
        return Conditioning(torch.cat(rows))

    def _filled(self, base: BaseComponents, rows: Tensor, length: int, clip_skip: int | None) -> Tensor:
        missing = (length - rows.shape[1]) // base.tokenizer.model_max_length
        return torch.cat([rows, *(self._encode(base, "", clip_skip) for _ in range(missing))], dim=1)

    def _encode(self, base: BaseComponents, prompt: str, clip_skip: int | None) -> Tensor:
        key = (base.id, base.hash, prompt, clip_skip)
        if key not in self._cache:
            rows = encode_prompt(base, prompt, clip_skip)
            self._make_room(rows.nbytes)
            if rows.nbytes > self._cache_bytes:
                return rows
            self._cache[key] = rows
            self._cached_bytes += rows.nbytes
        self._cache.move_to_end(key)
        return self._cache[key]

    def _make_room(self, wanted_bytes: int) -> None:
        while self._cache and self._cached_bytes + wanted_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._cached_bytes -= oldest.nbytes


def encode_prompt(base: BaseComponents, prompt: str, clip_skip: int | None) -> Tensor:
    """(1, n * 77, d): the text encoder's last hidden state, or the one ``clip_skip`` layers before it.

    Raises:
        JobError: the text encoder has not that many layers.
    """
    ids, attended = _token_pieces(base, prompt)
    chunks = zip(ids.split(_PIECES_AT_ONCE), attended.split(_PIECES_AT_ONCE), strict=True)
    states = [_encode_pieces(base, *chunk, clip_skip) for chunk in chunks]
    return torch.cat(states).flatten(0, 1).unsqueeze(0)


def _encode_pieces(base: BaseComponents, ids: Tensor, attended: Tensor, clip_skip: int | None) -> Tensor:
    """Token ids and attention mask (n, 77) -> (n, 77, d) in the model's dtype."""
    encoder = base.text_encoder
    mask = attended.to(base.device) if getattr(encoder.config, "use_attention_mask", False) else None
    if clip_skip is None:
        return encoder(ids.to(base.device), attention_mask=mask).last_hidden_state.to(base.dtype)
    layers = encoder(ids.to(base.device), attention_mask=mask, output_hidden_states=True).hidden_states
    if clip_skip >= len(layers):
        raise JobError(f"clip_skip {clip_skip} is too large: the text encoder has {len(layers) - 1} layers.")
    return encoder.final_layer_norm(layers[-(clip_skip + 1)]).to(base.dtype)


def _token_pieces(base: BaseComponents, prompt: str) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (n, 77): pieces framed by the start and end token, then padding."""
    tokenizer = base.tokenizer
    words = tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
    room = tokenizer.model_max_length - 2
    ids, attended = [], []
    for begin in range(0, max(len(words), 1), room):
        piece = [tokenizer.bos_token_id, *words[begin : begin + room], tokenizer.eos_token_id]
        padding = tokenizer.model_max_length - len(piece)
        ids.append(piece + [tokenizer.pad_token_id] * padding)
        attended.append([1] * len(piece) + [0] * padding)
    return torch.tensor(ids), torch.tensor(attended)
