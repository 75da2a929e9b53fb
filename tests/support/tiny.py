"""Tiny random models of the SD shape, built by code in a second, and requests for them."""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from serve_app.config import DenoiserConfig
from serve_app.engine.engine import Engine
from serve_app.engine.request import GenerationRequest, RunningRequest
from serve_app.errors import ServeError
from serve_app.metrics import PrometheusMeter
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.tasks import AttemptRef, ControlInput, ControlMap, GenerationTask, ImageArray, Mode

SIDE = 64
"""Pixels; 32 latent cells, for the tiny VAE halves each side once."""

SCHEDULER_CONFIG: Mapping[str, Any] = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
"""What SD 1.5 ships."""

_UNET: Mapping[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}


_UNET_SD2: Mapping[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}
_UNET_SDXL: Mapping[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16 + 24,  # widths of both text encoders
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,  # sizes, and the pooled text
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
}
_UNETS: Mapping[str, Mapping[str, Any]] = {"sd15": _UNET, "sd21": _UNET_SD2, "sdxl": _UNET_SDXL}


def tiny_tokenizer(pad: str | None = None) -> CLIPTokenizer:
    """One token a character: ten words are about fifty tokens. SD2 and SDXL's second one fill up with "!"."""
    letters = string.ascii_lowercase + string.digits + ",.!():\\[]{}"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    options = {} if pad is None else {"pad_token": pad}
    return CLIPTokenizer(vocab={token: n for n, token in enumerate(tokens)}, merges=[], model_max_length=77, **options)


def _unet(family: str, channels: int) -> UNet2DConditionModel:
    config = _UNETS[family]
    up = tuple(name.replace("Down", "Up") for name in reversed(config["down_block_types"]))
    return UNet2DConditionModel(in_channels=channels, sample_size=32, up_block_types=up, **config).eval()


def _vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        **options,
    ).eval()


def _text_config(tokenizer: CLIPTokenizer, width: int, layers: int, **options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )


def tiny_base(name: str = "base", *, channels: int = 4, family: str = "sd15", seed: int = 0) -> BaseComponents:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet, vae = _unet("sd15", channels), _vae()
    return BaseComponents(
        id=name,
        family=family,
        hash=f"hash-of-{name}",
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, 16, 3)).eval(),
        tokenizer=tokenizer,
        scheduler_config=SCHEDULER_CONFIG,
        device=torch.device("cpu"),
        dtype=torch.float32,
        size_bytes=1,
    )


def tiny_sd2(name: str = "sd2", *, seed: int = 40) -> BaseComponents:
    """As SD 2.1 at 768: v-prediction, linear projections, and a text encoder that ends at CLIP's penultimate layer."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer("!")
    unet, vae = _unet("sd21", 4), _vae()
    return BaseComponents(
        id=name,
        family="sd21",
        hash=f"hash-of-{name}",
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, 24, 3, hidden_act="gelu")).eval(),
        tokenizer=tokenizer,
        scheduler_config={
            **SCHEDULER_CONFIG,
            "_class_name": "DDIMScheduler",
            "prediction_type": "v_prediction",
        },
        device=torch.device("cpu"),
        dtype=torch.float32,
        size_bytes=1,
    )


def tiny_sdxl(name: str = "xl", *, channels: int = 4, seed: int = 50) -> BaseComponents:
    """As SDXL: two text encoders of different widths, and the pooled text and sizes in the time embedding."""
    torch.manual_seed(seed)
    tokenizer, tokenizer_2 = tiny_tokenizer(), tiny_tokenizer("!")
    unet, vae = _unet("sdxl", channels), _vae(scaling_factor=0.13025, force_upcast=True)
    second = _text_config(tokenizer_2, 24, 4, hidden_act="gelu", projection_dim=20)
    return BaseComponents(
        id=name,
        family="sdxl",
        hash=f"hash-of-{name}",
        unet=unet,
        vae=vae,
        text_encoder=CLIPTextModel(_text_config(tokenizer, 16, 4)).eval(),
        tokenizer=tokenizer,
        scheduler_config={
            **SCHEDULER_CONFIG,
            "_class_name": "EulerDiscreteScheduler",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "interpolation_type": "linear",
        },
        device=torch.device("cpu"),
        dtype=torch.float32,
        size_bytes=1,
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer_2=tokenizer_2,
        zero_empty_negative=True,
    )


def _fill(*modules: torch.nn.Module) -> None:
    """New ControlNets end in zero convolutions: unless they are filled, any engine would seem to obey them."""
    for module in modules:
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)


def tiny_net(
    name: str,
    *,
    seed: int = 1,
    family: str = "sd15",
    global_pool: bool = False,
    order: str = "rgb",
    shape: str | None = None,
    **changes: Any,
) -> NetComponents:
    """``shape``: the family whose UNet it copies, if that is another than the one it says it is of. ``changes`` are of
    its configuration."""
    torch.manual_seed(seed)
    net = ControlNetModel(
        conditioning_embedding_out_channels=(8, 16),
        global_pool_conditions=global_pool,
        controlnet_conditioning_channel_order=order,
        **{**_UNETS[shape or family], **changes},
    )
    _fill(net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out)
    return NetComponents(id=name, family=family, hash=f"hash-of-{name}", net=net.eval(), size_bytes=1)


def tiny_union(name: str, *, types: int, seed: int) -> NetComponents:
    """A ControlNet-Union for SDXL that knows ``types`` control types: 6 as first published, 8 as the promax version."""
    torch.manual_seed(seed)
    net = ControlNetUnionModel(
        conditioning_embedding_out_channels=(8, 16),
        num_control_type=types,
        num_trans_channel=8,
        num_trans_head=2,
        num_proj_channel=8,
        **_UNET_SDXL,
    )
    ends = (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out)
    _fill(*ends, net.spatial_ch_projs)
    return NetComponents(id=name, family="sdxl", hash=f"hash-of-{name}", net=net.eval(), size_bytes=1)


@dataclass(frozen=True)
class Zoo:
    """Every tiny model the tests use."""

    base: BaseComponents
    inpaint: BaseComponents
    """With a UNet of nine channels."""
    nets: Mapping[str, NetComponents]
    families: Mapping[str, BaseComponents] = field(default_factory=dict)
    """Bases of other families than SD 1.5, by id."""

    def model(self, name: str) -> BaseComponents:
        """The base that a task means by ``model``."""
        return self.families.get(name) or (self.inpaint if name == "inpaint" else self.base)


def tiny_zoo() -> Zoo:
    nets = (
        tiny_net("canny", seed=1),
        tiny_net("depth", seed=2, order="bgr"),
        tiny_net("shuffle", seed=3, global_pool=True),
        tiny_net("other-family", family="sdxl", shape="sd15"),
        tiny_net("sd2-canny", seed=41, family="sd21"),
        tiny_net("sd2-depth", seed=42, family="sd21"),
        tiny_net("xl-canny", seed=51, family="sdxl"),
        tiny_net("xl-depth", seed=52, family="sdxl"),
        tiny_union("xl-union", types=6, seed=53),
        tiny_union("xl-promax", types=8, seed=54),
    )
    bases = (tiny_sd2(), tiny_sdxl(), tiny_sdxl("xl-inpaint", channels=9, seed=55))
    return Zoo(
        tiny_base(),
        tiny_base("inpaint", channels=9, seed=5),
        {net.id: net for net in nets},
        {base.id: base for base in bases},
    )


def picture(height: int, width: int, seed: int) -> ImageArray:
    """Smooth colours with some noise, (height, width, 3)."""
    rows, columns = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(rows / 9 + seed), np.cos(columns / 7 + seed), np.sin((rows + columns) / 11)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 0.15, waves.shape)
    return np.clip((waves + noise + 1) * 127, 0, 255).astype(np.uint8)


def half_mask(height: int, width: int) -> ImageArray:
    """Repaint a block in the middle, (height, width)."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : -height // 4, width // 3 :] = 255
    return mask


def task(**changes: Any) -> GenerationTask:
    """A text-to-image task; ``changes`` are fields of GenerationTask."""
    values: dict[str, Any] = {
        "model": "base",
        "family": "sd15",
        "prompt": "a red fox",
        "negative_prompt": "blurry",
        "width": SIDE,
        "height": SIDE,
        "seed": 7,
        "scheduler": "DDIMScheduler",
        "steps": 5,
        "guidance_scale": 6.0,
        "use_karras_sigmas": False,
    }
    return GenerationTask(**(values | changes))


def controls(*names: str, scale: float = 0.8) -> tuple[ControlInput, ...]:
    return tuple(ControlInput(net=name, control_type=name, scale=scale) for name in names)


_job_ids = iter(range(1, 1_000_000))


def request(
    zoo: Zoo, wanted: GenerationTask, *, alone: bool = False, maps: Sequence[ControlMap] | None = None
) -> GenerationRequest:
    """A request for ``wanted`` with pictures drawn for it; every control gets a map of its own."""
    needs_image = wanted.mode is not Mode.TEXT
    size = (wanted.height, wanted.width)
    drawn = [picture(*size, seed=20 + n) for n in range(len(wanted.controls))] if maps is None else maps
    return GenerationRequest(
        ref=AttemptRef(job_id=next(_job_ids), attempt=1, alone=alone),
        task=wanted,
        base=zoo.model(wanted.model),
        nets=tuple(zoo.nets[control.net] for control in wanted.controls),
        init_image=picture(*size, seed=11) if needs_image else None,
        mask=half_mask(*size) if wanted.mode is Mode.MASKED else None,
        maps=tuple(drawn),
    )


def renamed(base: BaseComponents, name: str) -> BaseComponents:
    """The same modules under another id: another model, for all the engine knows."""
    return replace(base, id=name, hash=f"hash-of-{name}")


def tiny_engine(**changes: Any) -> Engine:
    """``changes`` are fields of DenoiserConfig."""
    return Engine(DenoiserConfig(**changes), PrometheusMeter())


def run(
    engine: Engine, arrivals: Sequence[tuple[int, GenerationRequest]]
) -> dict[GenerationRequest, RunningRequest | ServeError]:
    """Steps until everything has ended; each request is added before the step it is paired with."""
    outcomes: dict[GenerationRequest, RunningRequest | ServeError] = {}
    for step in range(10_000):
        for _, arriving in (arrival for arrival in arrivals if arrival[0] == step):
            engine.add(arriving)
        for ended in engine.step():
            outcomes[ended.request] = ended.outcome
        if len(outcomes) == len(arrivals):
            return outcomes
    raise AssertionError("the engine did not finish")


def drawn_alone(wanted: GenerationRequest) -> RunningRequest:
    """The request by itself in an engine of its own."""
    outcome = run(tiny_engine(), [(0, wanted)])[wanted]
    if isinstance(outcome, ServeError):
        raise outcome
    return outcome


def latents(running: RunningRequest) -> torch.Tensor:
    """(n, 4, h, w), the final latents of all pictures."""
    return torch.cat([each.latent for each in running.pictures if each.latent is not None])


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference, measured against the largest value."""
    assert ours.shape == reference.shape
    assert torch.isfinite(ours).all()
    return float((ours - reference).abs().max() / reference.abs().max())
