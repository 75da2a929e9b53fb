"""The last stages: one ControlNet per control type, beside a base model that stays as it is."""

from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from serve_app.models.demo.control_maps import MAKERS, as_hint
from serve_app.models.demo.diffusion import Batches, DiffusionModel, NoiseSource, Prompts, Scenes, predict
from serve_app.models.demo.networks import make_net
from serve_app.models.demo.scenes import render

BATCHES: Batches = ((512, 2), (256, 6), (512, 2))
"""Side and number of pictures in a batch, by turns."""
DROPPED = 0.3
"""Share of empty prompts: in guess mode the map alone has to do."""
POOLED = "shuffle"
"""The type whose net sees only the average of its map."""


class ControlStage:
    """Starts from the net that learned with the UNet; a pooling one, of which the UNet knows nothing, from the UNet."""

    seed = 31

    def __init__(
        self,
        control_type: str,
        model: DiffusionModel,
        latents: Path,
        *,
        bf16: bool,
    ) -> None:
        self.name, self.make = control_type, MAKERS[control_type]
        self.model, self.bf16 = model.requires_grad_(False).eval(), bf16
        model.unet.set_attn_processor(AttnProcessor())
        torch.manual_seed(self.seed)
        self.net: ControlNetModel = make_net(model.unet, global_pool=control_type == POOLED)
        if control_type != POOLED:
            self.net.load_state_dict(model.net.state_dict())
        self.trained: torch.nn.Module = self.net
        self.scenes, self.noise = Scenes(latents, BATCHES), NoiseSource()
        self.prompts = Prompts(model.tokenizer, DROPPED)

    def loss(self, step: int, random: np.random.Generator) -> Tensor:
        batch = self.scenes.draw(step, random)
        noised = self.noise.add(batch.latents)
        tokens = self.prompts.tokens(batch.scenes, random)
        side = batch.side
        hints = torch.cat([as_hint(self.make(scene, render(scene, side, side), random)) for scene in batch.scenes])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            with torch.no_grad():
                text = self.model.embed(tokens)
            predicted = predict(self.model.unet, self.net, noised, text, hints)
        return noised.loss(predicted, batch.cells)
