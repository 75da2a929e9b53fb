"""Which model configurations the engine's forward covers. What it does not cover is refused, never silently wrong."""

from collections.abc import Collection, Mapping
from typing import Any

from serve_app.errors import FamilyMismatch, ModelLoadFailed
from serve_app.models.components import BaseComponents, NetComponents

_BLOCKS = frozenset({"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"})

_SHARED: Mapping[str, Collection[Any]] = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "addition_embed_type": (None, "text_time"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "mid_block_type": (None, "UNetMidBlock2D", "UNetMidBlock2DCrossAttn"),
}
"""Option -> the values that are covered. An option that a configuration does not name has a covered default."""

_UNET: Mapping[str, Collection[Any]] = {
    **_SHARED,
    "in_channels": (4, 9),
    "out_channels": (4,),
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "dual_cross_attention": (False,),
    "time_cond_proj_dim": (None,),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "attention_type": ("default",),
    "cross_attention_norm": (None,),
    "mid_block_only_cross_attention": (None, False),
}

_NET: Mapping[str, Collection[Any]] = {
    **_SHARED,
    "in_channels": (4,),
    "conditioning_channels": (3,),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
}

_SIZES = 6
"""Numbers by which SDXL's UNet is told original size, crop corner and target size; its refiner has five."""


def check_base(base: BaseComponents) -> None:
    """Raises ModelLoadFailed, with every option that is not covered."""
    config = base.unet.config
    problems = _problems(config, _UNET)
    if config.addition_embed_type == "text_time":
        problems += _text_time_problems(base)
    if problems:
        raise ModelLoadFailed(f"The UNet of {base.id!r} cannot be served: {'; '.join(problems)}.")


def check_net(net: NetComponents) -> None:
    """Raises ModelLoadFailed, with every option that is not covered."""
    allowed = {**_NET, "controlnet_conditioning_channel_order": ("rgb",)} if net.union else _NET
    problems = _problems(net.net.config, allowed)
    if problems:
        raise ModelLoadFailed(f"The ControlNet {net.id!r} cannot be served: {'; '.join(problems)}.")


def check_fit(base: BaseComponents, net: NetComponents) -> None:
    """Raises FamilyMismatch for a net that another shape of UNet was made with, distilled ones for example."""
    unet = base.unet
    wanted = {
        "channels of the skip connections": _skip_channels(unet),
        "channels in the middle": [] if unet.mid_block is None else [unet.mid_block.resnets[-1].out_channels],
        "cross_attention_dim": unet.config.cross_attention_dim,
        "addition_embed_type": unet.config.addition_embed_type,
    }
    model = net.net
    found = {
        "channels of the skip connections": [layer.out_channels for layer in model.controlnet_down_blocks],
        "channels in the middle": [model.controlnet_mid_block.out_channels],
        "cross_attention_dim": model.config.cross_attention_dim,
        "addition_embed_type": model.config.addition_embed_type,
    }
    for what, value in wanted.items():
        if found[what] != value:
            raise FamilyMismatch(
                f"The ControlNet {net.id!r} does not fit the model {base.id!r}: {what} {found[what]}, wanted {value}."
            )


def _skip_channels(unet: Any) -> list[int]:
    channels = [unet.conv_in.out_channels]
    for block in unet.down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [downsampler.out_channels for downsampler in block.downsamplers or ()]
    return channels


def _problems(config: Mapping[str, Any], allowed: Mapping[str, Collection[Any]]) -> list[str]:
    problems = [
        f"{option} is {config[option]!r}, served: {', '.join(map(repr, values))}"
        for option, values in allowed.items()
        if option in config and config[option] not in values
    ]
    for option in ("down_block_types", "up_block_types"):
        unknown = sorted({name.removeprefix("UNetRes") for name in config.get(option, ())} - _BLOCKS)
        if unknown:
            problems.append(f"{option} has {', '.join(unknown)}, served: {', '.join(sorted(_BLOCKS))}")
    only_cross = config.get("only_cross_attention", False)
    if any(only_cross) if isinstance(only_cross, list | tuple) else only_cross:
        problems.append(f"only_cross_attention is {only_cross!r}, served: False")
    return problems


def _text_time_problems(base: BaseComponents) -> list[str]:
    if base.text_encoder_2 is None:
        return ["addition_embed_type is 'text_time', and the model has no second text encoder"]
    config = base.unet.config
    wanted = config.projection_class_embeddings_input_dim
    given = base.text_encoder_2.config.projection_dim + _SIZES * config.addition_time_embed_dim
    if wanted != given:
        return [f"it wants {wanted} numbers of pooled text and sizes, SDXL's base model gives {given}"]
    return []
