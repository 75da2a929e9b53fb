"""What a request's text says to one model, computed once: keys and values for the cross-attentions, added conditions.

No step changes any of it. It is made per request, with the rows of that request alone, so that its last bit does not
depend on who shares a forward.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from serve_app.errors import ModelLoadFailed

KEPT_BYTES = 64 * 2**20
"""Keys and values of one row that are kept at most; what would take more is computed in every forward.

In half precision a prompt of 77 tokens takes 4 MB a row in SD 1.5's UNet and 26 MB in SDXL's. The API's longest
prompt would take 7 GB there: one request must not fill a GPU with what is cheap to compute (0.4% of SD 1.5's forward,
0.8% of SDXL's)."""


@dataclass(frozen=True, slots=True, eq=False)
class Conditions:
    """What the text of some rows says to one model."""

    states: Tensor
    """(R, tokens, n): keys and values of all cross-attentions side by side, or, where they are not kept, the text."""
    places: Mapping[nn.Module, tuple[slice, slice]]
    """Where in ``states`` each cross-attention's keys and values are; empty where they are not kept."""
    added: Tensor | None
    """(R, e): what SDXL's models add to the time embedding; None for families without it."""

    def __len__(self) -> int:
        return len(self.states)

    def last(self, rows: int) -> "Conditions":
        """The last ``rows`` rows; the conditional one is the last of all."""
        return Conditions(self.states[-rows:], self.places, None if self.added is None else self.added[-rows:])

    def keys_values(self, attention: Any) -> tuple[Tensor, Tensor]:
        """(R, tokens, inner) twice, for one cross-attention of the model."""
        if not self.places:
            return attention.to_k(self.states), attention.to_v(self.states)
        keys, values = self.places[attention]
        return self.states[..., keys], self.states[..., values]


def conditions(model: Any, text: Tensor, pooled: Tensor | None, sizes: Tensor | None) -> Conditions:
    """``text``, ``pooled`` and ``sizes`` of a request (see ``request.Conditioning``), as ``model`` takes them.

    ``model`` is a UNet or a ControlNet of diffusers.

    Raises:
        ModelLoadFailed: the model wants pooled text and sizes, and there are none.
    """
    added = _added(model, pooled, sizes, text.dtype)
    attentions = [block.attn2 for block in model.modules() if isinstance(block, BasicTransformerBlock)]
    widths = [attention.inner_kv_dim for attention in attentions]
    if not attentions or 2 * sum(widths) * text.shape[1] * text.element_size() > KEPT_BYTES:
        return Conditions(text, {}, added)
    places, parts, end = {}, [], 0
    for attention, width in zip(attentions, widths, strict=True):
        places[attention] = (slice(end, end + width), slice(end + width, end + 2 * width))
        # Through the modules, not their weights: a LoRA sits in the module.
        parts += [attention.to_k(text), attention.to_v(text)]
        end += 2 * width
    return Conditions(torch.cat(parts, dim=-1), places, added)


def joined(parts: Sequence[Conditions], rows: int) -> Conditions:
    """The rows of ``parts``, of one model, one after another, filled up to ``rows`` with copies of the last."""
    states = filled(torch.cat([part.states for part in parts]) if len(parts) > 1 else parts[0].states, rows)
    added = [part.added for part in parts if part.added is not None]
    return Conditions(states, parts[0].places, filled(torch.cat(added), rows) if added else None)


def filled(rows: Tensor, width: int) -> Tensor:
    """(r, ...) -> (width, ...), filled up with copies of the last row."""
    missing = width - len(rows)
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows


def _added(model: Any, pooled: Tensor | None, sizes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(rows, e): diffusers' ``get_aug_embed`` for ``addition_embed_type`` text_time."""
    if model.config.addition_embed_type is None:
        return None
    if pooled is None or sizes is None:
        raise ModelLoadFailed("The model wants SDXL's pooled text and sizes, which the base model does not give.")
    times = model.add_time_proj(sizes.flatten()).reshape(len(pooled), -1)
    return model.add_embedding(torch.cat([pooled, times], dim=-1).to(dtype))
