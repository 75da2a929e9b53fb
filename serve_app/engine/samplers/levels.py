"""The noise levels a base model was trained on, and what its predictions mean at each."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from serve_app.errors import JobError

_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

_LEAST_ALPHA_BAR = 2.0**-24
"""Stands for a terminal signal of zero, whose sigma is infinite (as in ``EulerDiscreteScheduler``)."""


class Levels:
    """abar(t) of the base model's betas; sigma = sqrt((1 - abar) / abar) is the noise beside a signal of size 1.

    Raises:
        JobError: the base model predicts something unknown.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        scheduler = DDPMScheduler.from_config(dict(config))
        self.prediction_type = str(scheduler.config.prediction_type)
        if self.prediction_type not in _PREDICTION_TYPES:
            allowed = ", ".join(_PREDICTION_TYPES)
            raise JobError(f"The base model predicts {self.prediction_type!r}. Allowed: {allowed}.")
        self.alpha_bar: Tensor = scheduler.alphas_cumprod.clamp(min=_LEAST_ALPHA_BAR)
        """(T,) float32."""
        abar = self.alpha_bar.numpy().astype(np.float64)
        self._sigmas = np.sqrt((1 - abar) / abar)

    @property
    def sigma_min(self) -> float:
        return float(self._sigmas[0])

    @property
    def sigma_max(self) -> float:
        return float(self._sigmas[-1])

    def timestep(self, sigma: float) -> float:
        """The timestep of a noise level, interpolated in log sigma."""
        return float(np.interp(np.log(sigma), np.log(self._sigmas), np.arange(len(self._sigmas))))

    def geometric(self, steps: int) -> list[float]:
        """``steps`` sigmas from the highest to the lowest at equal ratios, then 0."""
        return [*np.geomspace(self.sigma_max, self.sigma_min, steps).tolist(), 0.0]

    def epsilon(self, prediction: Tensor, latent: Tensor, sigma: float | Tensor) -> Tensor:
        """The noise in ``latent``, which is alpha x0 + sigma alpha epsilon with alpha = 1 / sqrt(1 + sigma^2).

        v = alpha epsilon - sigma alpha x0 (Salimans and Ho 2022, appendix D).
        """
        if self.prediction_type == "epsilon":
            return prediction
        alpha = (1 + torch.as_tensor(sigma) ** 2) ** -0.5
        if self.prediction_type == "v_prediction":
            return alpha * prediction + sigma * alpha * latent
        return (latent - alpha * prediction) / (sigma * alpha)
