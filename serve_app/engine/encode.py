"""What happens once per request, before its first step: prompts, init image, mask and control maps become tensors.

Runs on the engine's thread, between two steps. A helper thread would not help: on a CPU it would take its cores from
the running step, on a GPU its kernels would queue behind the step's anyway.
"""

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor

from serve_app.engine.prompts import PromptEncoder
from serve_app.engine.request import Control, GenerationRequest, Picture, RunningRequest
from serve_app.engine.samplers import Source, sampler
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.tasks import ControlInput, ControlMap, ImageArray, Mode


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
