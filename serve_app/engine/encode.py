"""What happens once per request, before its first step: prompts, init image, mask and control maps become tensors.

Runs on the engine's thread, between two steps. A helper thread would not help: on a CPU it would take its cores from
the running step, on a GPU its kernels would queue behind the step's anyway.
"""

from collections.abc import Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from serve_app.engine.controlnet import embed_map, union_embedding, union_hint
from serve_app.engine.prompts import PromptEncoder
from serve_app.engine.request import Control, GenerationRequest, Hint, Picture, RunningRequest, union_index
from serve_app.engine.samplers import Source, sampler
from serve_app.engine.vae import encode_image
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.tasks import ControlInput, ControlMap, ImageArray, Mode

_Asked = tuple[ControlInput, NetComponents, ControlMap]
"""A control of a task, its net and its map."""


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
    image = encode_image(base, pixels)
    if task.mode is Mode.IMAGE or request.mask is None:
        return Source(shape, base.device, base.dtype, scale, image)
    mask = _mask_pixels(base, request.mask, task.height, task.width)
    masked = encode_image(base, pixels * (mask < 0.5)) if request.inpaint_unet else None  # noqa: PLR2004  - one half
    cells = torch.nn.functional.interpolate(mask, size=(height, width)).to(base.device, base.dtype)
    return Source(shape, base.device, base.dtype, scale, image, cells, masked)


def _mask_pixels(base: BaseComponents, mask: ImageArray, height: int, width: int) -> Tensor:
    """(1, 1, H, W) float32 of zeros and ones."""
    processor = VaeImageProcessor(
        vae_scale_factor=base.vae_scale, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    return processor.preprocess(Image.fromarray(mask), height, width)


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
    # Here, and not in the forward that many share: what cannot be computed fails this request alone.
    for model in (request.base.unet, *(control.net.net for control in running.controls)):
        running.conditions(model)
    for picture in pictures:
        picture.begin()
    return running


def _controls(request: GenerationRequest) -> tuple[Control, ...]:
    """One for each control; those that name the same union net are one."""
    asked = zip(request.task.controls, request.nets, request.maps, strict=True)
    together: dict[tuple[object, ...], list[_Asked]] = {}
    for place, one in enumerate(asked):
        net = one[1]
        together.setdefault((net.id, net.hash) if net.union else (place,), []).append(one)
    guess = request.task.guess_mode
    return tuple(_control(some, guess) for some in together.values())


def _control(asked: Sequence[_Asked], guess: bool) -> Control:
    net = asked[0][1]
    hints = _union_hints(asked) if net.union else [_hint(control, embed_map(drawn, net)) for control, _, drawn in asked]
    return Control(
        net=net,
        hints=tuple(hints),
        # diffusers: the only control scales the residuals, several scale what enters.
        scale=hints[0].scale if len(hints) == 1 else 1.0,
        conditional_only=guess or net.global_pool,
        fading=guess and not net.global_pool,
        embedding=union_embedding(net.net, set(_indices(asked))) if net.union else None,
    )


def _union_hints(asked: Sequence[_Asked]) -> list[Hint]:
    alone = len(asked) == 1
    return [
        _hint(control, union_hint(net.net, embed_map(drawn, net), index, 1.0 if alone else control.scale))
        for (control, net, drawn), index in zip(asked, _indices(asked), strict=True)
    ]


def _indices(asked: Sequence[_Asked]) -> list[int]:
    known = (union_index(net, control.control_type) for control, net, _ in asked)
    return [index for index in known if index is not None]


def _hint(control: ControlInput, embedded: Tensor) -> Hint:
    return Hint(embedded, control.scale, control.start, control.end)
