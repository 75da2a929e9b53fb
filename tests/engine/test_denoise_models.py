"""Our forward through diffusers' blocks equals diffusers' forwards, over the configurations that families use."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from serve_app.engine.architecture import check_base, check_net
from serve_app.engine.conditions import conditions
from serve_app.engine.controlnet import run_controlnet
from serve_app.engine.unet import Part, gather, run_unet
from serve_app.errors import ModelLoadFailed
from serve_app.models.components import NetComponents
from support.tiny import Zoo

SMALL: Mapping[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
XL: Mapping[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "sd15": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "upcast_attention": True},
    "sdxl": XL,
    "inpaint": {"in_channels": 9},
    "no attention on the way down": {"down_block_types": ("DownBlock2D",) * 2},
    "attention only in the middle": {
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "layers_per_block": 2,
    },
    "no attention in the middle": {"mid_block_type": "UNetMidBlock2D", "resnet_time_scale_shift": "scale_shift"},
    "no middle": {"mid_block_type": None, "layers_per_block": (2, 1)},
    "many layers": {
        "transformer_layers_per_block": ((2,), (1,)),
        "reverse_transformer_layers_per_block": ((1, 1), (2, 3)),
    },
}


def filled(module: nn.Module, seed: int) -> Any:
    """With random numbers everywhere: zero convolutions, norms and biases would hide what a forward leaves out."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.1 * noise
    return module.eval().requires_grad_(False)


def rows(channels: int, *, height: int = 8, width: int = 8, xl: bool = False) -> dict[str, Any]:
    """Two guided pictures and an unguided one; every row has its own text."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "latents": [normal(1, channels, height, width) for _ in range(3)],
        "timesteps": [981.0, 20.5, 333.0],
        "texts": [normal(2, 7, 12), normal(2, 7, 12), normal(1, 7, 12)],
        "pooled": [normal(2, 10), normal(2, 10), normal(1, 10)] if xl else [None] * 3,
        "sizes": [torch.tensor([[64.0, 48, 0, 0, 64, 48]]).expand(n, -1) for n in (2, 2, 1)] if xl else [None] * 3,
    }


def parts(model: nn.Module, given: dict[str, Any], hints: list[Tensor] | None = None) -> list[Part]:
    said = zip(given["texts"], given["pooled"], given["sizes"], strict=True)
    made = [conditions(model, *one) for one in said]
    pictures = zip(given["latents"], given["timesteps"], made, strict=True)
    return [Part(*one, None if hints is None else hints[n]) for n, one in enumerate(pictures)]


def plain(given: dict[str, Any], hints: list[Tensor] | None = None) -> dict[str, Any]:
    """The same rows as arguments of diffusers' forwards."""
    counts = torch.tensor([2, 2, 1])
    arguments = {
        "sample": torch.cat(given["latents"]).repeat_interleave(counts, dim=0),
        "timestep": torch.tensor(given["timesteps"]).repeat_interleave(counts, dim=0),
        "encoder_hidden_states": torch.cat(given["texts"]),
        "return_dict": False,
    }
    if given["pooled"][0] is not None:
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.cat(given["pooled"]),
            "time_ids": torch.cat(given["sizes"]),
        }
    if hints is not None:
        arguments["controlnet_cond"] = torch.cat(hints).repeat_interleave(counts, dim=0)
    return arguments


def random_residuals(unet: Any, asked: dict[str, Any]) -> list[Tensor]:
    """As ControlNets would give for this forward: one per skip connection, and the middle one."""
    skips: list[Tensor] = []
    hooks = [unet.conv_in.register_forward_hook(lambda *call: skips.append(call[2]))]
    hooks += [block.register_forward_hook(lambda *call: skips.extend(call[2][1])) for block in unet.down_blocks]
    unet(**asked)
    for hook in hooks:
        hook.remove()
    return [torch.randn_like(skip) for skip in (*skips, skips[-1])]


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@torch.inference_mode()
@pytest.mark.parametrize(("size", "pad_to"), [((6, 9), None), ((8, 8), 5), ((6, 4), 7)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_unet(name: str, size: tuple[int, int], pad_to: int | None) -> None:
    unet = filled(UNet2DConditionModel(**{**SMALL, **CONFIGS[name]}), 1)
    given = rows(unet.config.in_channels, height=size[0], width=size[1], xl=name == "sdxl")
    asked = plain(given)
    drawn = random_residuals(unet, asked)
    for residuals in ([], drawn):
        theirs = unet(
            **asked,
            down_block_additional_residuals=residuals[:-1] or None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
        )[0]
        width = 5 if pad_to is None else pad_to
        wide = [torch.cat([one, one[:1].expand(width - 5, -1, -1, -1)]) for one in residuals]
        ours = run_unet(unet, gather(parts(unet, given), pad_to), wide)
        assert len(ours) == width
        same(ours[:5], theirs)
        if pad_to == 5 and name != "sdxl":  # whose added conditions are computed per request, not per forward
            assert torch.equal(ours, theirs)


@torch.inference_mode()
@pytest.mark.parametrize("pad_to", [None, 6], ids=str)
@pytest.mark.parametrize("name", ["sd15", "sd2", "sdxl", "no attention on the way down", "no attention in the middle"])
def test_controlnet(name: str, pad_to: int | None) -> None:
    config = {key: value for key, value in {**SMALL, **CONFIGS[name]}.items() if key != "up_block_types"}
    net = filled(ControlNetModel(conditioning_embedding_out_channels=(4, 8), **config), 2)
    given = rows(4, height=10, width=6, xl=name == "sdxl")
    maps = list(torch.randn(3, 1, 3, 20, 12))
    theirs, middle = net(**plain(given, maps))
    hints = [net.controlnet_cond_embedding(one) for one in maps]
    ours = run_controlnet(net, gather(parts(net, given, hints), pad_to))
    assert len(ours) == len(theirs) + 1
    for level, reference in zip(ours, [*theirs, middle], strict=True):
        same(level[:5], reference)


@torch.inference_mode()
def test_without_room_for_keys_and_values_they_are_computed_in_every_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = filled(UNet2DConditionModel(**SMALL), 1)
    given = rows(4)
    kept = parts(unet, given)
    monkeypatch.setattr("serve_app.engine.conditions.KEPT_BYTES", 0)
    computed = parts(unet, given)
    assert all(part.conditions.places for part in kept)
    assert not any(part.conditions.places for part in computed)
    same(run_unet(unet, gather(computed, None), []), run_unet(unet, gather(kept, None), []))


UNCOVERED: Mapping[str, Mapping[str, Any]] = {
    "class_embed_type": {"class_embed_type": "timestep"},
    "num_class_embeds": {"num_class_embeds": 3},
    "encoder_hid_dim_type": {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"},
    "addition_embed_type": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "down_block_types.*AttnDownBlock2D": {"down_block_types": ("AttnDownBlock2D", "DownBlock2D")},
    "up_block_types.*SimpleCrossAttnUpBlock2D": {"up_block_types": ("UpBlock2D", "SimpleCrossAttnUpBlock2D")},
    "only_cross_attention": {"only_cross_attention": (True, False)},
    "center_input_sample": {"center_input_sample": True},
    "dual_cross_attention": {"dual_cross_attention": True},
    "time_cond_proj_dim": {"time_cond_proj_dim": 8},
    "time_embedding_type": {"time_embedding_type": "fourier"},
    "time_embedding_act_fn": {"time_embedding_act_fn": "silu"},
    "mid_block_type": {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
    "in_channels is 5": {"in_channels": 5},
    "out_channels is 8": {"out_channels": 8},
    "second text encoder": XL,
}


@pytest.mark.parametrize("option", UNCOVERED)
def test_a_unet_that_the_forward_does_not_cover_is_refused_by_the_name_of_the_option(zoo: Zoo, option: str) -> None:
    odd = replace(zoo.base, unet=UNet2DConditionModel(**{**SMALL, **UNCOVERED[option]}))
    with pytest.raises(ModelLoadFailed, match=option):
        check_base(odd)


def test_all_that_is_not_covered_is_listed(zoo: Zoo) -> None:
    odd = UNet2DConditionModel(**{**SMALL, "in_channels": 5, "class_embed_type": "identity"})
    with pytest.raises(ModelLoadFailed, match=r"'base'.*class_embed_type is 'identity'.*in_channels is 5"):
        check_base(replace(zoo.base, unet=odd))


@pytest.mark.parametrize("option", ["in_channels", "conditioning_channels", "class_embed_type"])
def test_a_net_that_the_forward_does_not_cover_is_refused(option: str) -> None:
    odd = {"in_channels": 9, "conditioning_channels": 6, "class_embed_type": "timestep"}
    config = {key: value for key, value in SMALL.items() if key != "up_block_types"}
    net = ControlNetModel(**{**config, option: odd[option]})
    with pytest.raises(ModelLoadFailed, match=f"odd.*{option}"):
        check_net(NetComponents("odd", "sd15", "odd", net, 1))


def test_every_model_of_the_tests_is_covered(zoo: Zoo) -> None:
    for base in (zoo.base, zoo.inpaint):
        check_base(base)
    for net in zoo.nets.values():
        check_net(net)
