"""What happens once per request, before its first step: prompts, init image, mask and control maps become tensors.

Runs on the engine's thread, between two steps. A helper thread would not help: on a CPU it would take its cores from
the running step, on a GPU its kernels would queue behind the step's anyway.
"""

from collections import OrderedDict

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from serve_app.engine.request import Control, GenerationRequest, Picture, RunningRequest
from serve_app.engine.samplers import Source, sampler
from serve_app.errors import JobError
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.tasks import ControlInput, ControlMap, ImageArray, Mode

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

    def rows(self, request: GenerationRequest) -> Tensor:
        """The text rows of a request, (2, n * 77, d) with the unconditional one first, or (1, n * 77, d).

        Up to 75 tokens this is what diffusers' ``encode_prompt`` computes, clip_skip on the positive prompt alone
        included. Longer prompts are cut into pieces of 75 tokens that are encoded one by one and put in a row; the
        shorter prompt is filled up with empty pieces.
        """
        task = request.task
        positive = self._encode(request.base, task.prompt, task.clip_skip)
        if not request.guided:
            return positive
        negative = self._encode(request.base, task.negative_prompt, None)
        length = max(positive.shape[1], negative.shape[1])
        return torch.cat(
            [
                self._filled(request.base, negative, length, None),
                self._filled(request.base, positive, length, task.clip_skip),
            ]
        )

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


def encode_source(request: GenerationRequest) -> Source:
    """What the pictures of a request start from: nothing but a shape, or the init image and mask in latent space.

    Images are resized as diffusers' pipelines do (``VaeImageProcessor``, lanczos); the mask is cut at one half.
    """
    base, task = request.base, request.task
    height, width = request.latent_size
    shape = (1, int(base.vae.config.latent_channels), height, width)
    scale = float(base.vae.config.scaling_factor)
    if task.mode is Mode.TEXT or request.init_image is None:
        return Source(shape, base.device, base.dtype, scale)
    picture = Image.fromarray(request.init_image)
    pixels = VaeImageProcessor(vae_scale_factor=base.vae_scale).preprocess(picture, task.height, task.width)
    image = _encode(base, pixels)
    if task.mode is Mode.IMAGE or request.mask is None:
        return Source(shape, base.device, base.dtype, scale, image)
    mask = _mask_pixels(base, request.mask, task.height, task.width)
    masked = _encode(base, pixels * (mask < 0.5)) if request.inpaint_unet else None  # noqa: PLR2004  - one half
    cells = torch.nn.functional.interpolate(mask, size=(height, width)).to(base.device, base.dtype)
    return Source(shape, base.device, base.dtype, scale, image, cells, masked)


def _mask_pixels(base: BaseComponents, mask: ImageArray, height: int, width: int) -> Tensor:
    """(1, 1, H, W) float32 of zeros and ones."""
    processor = VaeImageProcessor(
        vae_scale_factor=base.vae_scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    return processor.preprocess(Image.fromarray(mask), height, width)


def _encode(base: BaseComponents, pixels: Tensor) -> DiagonalGaussianDistribution:
    """``pixels``: (1, 3, H, W) in -1..1."""
    return base.vae.encode(pixels.to(base.device, base.dtype)).latent_dist


def encode_map(drawn: ControlMap, net: NetComponents) -> Tensor:
    """A control map (H, W, 3), through the net's own embedding: (1, c, h, w), what every step of the net adds.

    uint8 maps become 0..1; float32 maps are taken as they are, for they may hold -1 (the inpaint net's 'masked').
    """
    values = drawn.astype(np.float32) / 255.0 if drawn.dtype == np.uint8 else drawn
    pixels = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))[None]
    if net.net.config.controlnet_conditioning_channel_order == "bgr":
        pixels = pixels.flip(1)
    return net.net.controlnet_cond_embedding(pixels.to(net.net.device, net.net.dtype))


def prepare(request: GenerationRequest, prompts: PromptEncoder, turn: int) -> RunningRequest:
    """Everything a request needs before its first step; its pictures have drawn their noise and ask for predictions.

    Raises:
        JobError: the task cannot be done with this model.
    """
    source = encode_source(request)
    pictures = [
        Picture(sampler(request.base.scheduler_config, request.task, source, seed), turn) for seed in request.task.seeds
    ]
    running = RunningRequest(request, prompts.rows(request), _controls(request), pictures)
    for picture in pictures:
        picture.begin()
    return running


def _controls(request: GenerationRequest) -> tuple[Control, ...]:
    asked = zip(request.task.controls, request.nets, request.maps, strict=True)
    return tuple(_control(request, *one) for one in asked)


def _control(request: GenerationRequest, control: ControlInput, net: NetComponents, drawn: ControlMap) -> Control:
    guess = request.task.guess_mode
    return Control(
        net=net,
        hint=encode_map(drawn, net),
        scale=control.scale,
        start=control.start,
        end=control.end,
        conditional_only=guess or net.global_pool,
        fading=guess and not net.global_pool,
    )
