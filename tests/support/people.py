"""People for OpenPose's body network: one that sees a planted person, and weights that make the real one see people."""

from collections.abc import MutableMapping
from itertools import product

import numpy as np
import torch
from torch import Tensor

from serve_app.annotators.skeleton import Points

# Limbs and their channels as in OpenPose's model; joints count from 1, channels from 19.
LIMBS = [(2, 3), (2, 6), (3, 4), (4, 5), (6, 7), (7, 8), (2, 9), (9, 10), (10, 11), (2, 12), (12, 13), (13, 14)]
LIMBS += [(2, 1), (1, 15), (15, 17), (1, 16), (16, 18), (3, 17), (6, 18)]
FIELDS = [(31, 32), (39, 40), (33, 34), (35, 36), (41, 42), (43, 44), (19, 20), (21, 22), (23, 24), (25, 26)]
FIELDS += [(27, 28), (29, 30), (47, 48), (49, 50), (53, 54), (51, 52), (55, 56), (37, 38), (45, 46)]
PERSON: Points = [
    *((0.5, 0.2), (0.5, 0.35), (0.38, 0.35), (0.3, 0.5), (0.26, 0.65), (0.62, 0.35), (0.7, 0.5), (0.74, 0.65)),
    *((0.42, 0.62), (0.4, 0.78), (0.4, 0.92), (0.58, 0.62), (0.6, 0.78), (0.6, 0.92)),
    *((0.46, 0.16), (0.54, 0.16), (0.42, 0.19), (0.58, 0.19)),
]


CELLS = (
    *((0, -7), (0, -4), (-3, -4), (-4, -2), (-4, -1), (3, -4), (4, -2), (4, -1), (-2, 1), (-2, 4), (-2, 7), (2, 1)),
    *((2, 4), (2, 7), (-1, -8), (1, -8), (-2, -7), (2, -7)),
)
"""The joints of another, across and down from its middle in cells of the network's grid. Arms are so short and eyes so
close that in small pictures neither hands nor a face are looked for: that takes seconds a hand."""


class PlantedBody(torch.nn.Module):
    """A body network that sees these people: peaks and limbs where the joints are, at an eighth of its input.

    Limbs have one direction anywhere, that of the last person's: the others are the same, moved and scaled.
    """

    def __init__(self, *people: Points) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.people = people

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = pixels.shape[2] // 8, pixels.shape[3] // 8
        heat, fields = torch.zeros(1, 19, height, width), torch.zeros(1, 38, height, width)
        for joints in self.people:
            self._see(joints, heat, fields)
        return fields, heat

    def _see(self, joints: Points, heat: torch.Tensor, fields: torch.Tensor) -> None:
        height, width = heat.shape[2:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = [None if joint is None else (joint[0] * width - 0.5, joint[1] * height - 0.5) for joint in joints]
        for index, place in enumerate(places):
            if place is not None:
                peak = torch.exp(-((columns - place[0]) ** 2 + (rows - place[1]) ** 2) / 2)
                heat[0, index] = torch.maximum(heat[0, index], peak)
        for (first, second), (across, down) in zip(LIMBS, FIELDS, strict=True):
            start, end = places[first - 1], places[second - 1]
            if start is not None and end is not None:
                length = max(1e-6, float(np.hypot(end[0] - start[0], end[1] - start[1])))
                fields[0, across - 19] = (end[0] - start[0]) / length
                fields[0, down - 19] = (end[1] - start[1]) / length


def see_people(state: MutableMapping[str, Tensor]) -> None:
    """Turn random weights of the body network, by their published names, into some that see people.

    A person stands around each spot that is nearly white: one channel of the trunk is the picture's brightness at an
    eighth of its size, the last stage moves it to where each joint is, and answers the directions of the limbs
    anywhere. The other channels and stages stay random and are not asked.
    """
    trunk = [
        f"conv{block}_{layer}" for block, count in ((1, 2), (2, 2), (3, 4), (4, 2)) for layer in range(1, count + 1)
    ]
    for name in (*trunk, "conv4_3_CPM", "conv4_4_CPM"):
        state[f"{name}.bias"][0] = 0
        state[f"{name}.weight"][0] = 0
        state[f"{name}.weight"][0, 0, 1, 1] = 1
    state["conv1_1.weight"][0, :, 1, 1] = torch.tensor([0.5, 1.0, 1.5])
    state["conv1_1.bias"][0] = -1.1
    for layer in range(1, 6):
        weight = state[f"Mconv{layer}_stage6_L2.weight"]
        weight.zero_()
        for joint, move in enumerate(CELLS):
            # Five layers of 7 x 7 move by 3 cells each at most.
            across, down = ((one + layer - 1) // 5 for one in move)
            weight[joint, 57 if layer == 1 else joint, 3 - down, 3 - across] = 1
    for layer, count in ((6, 128), (7, 19)):
        state[f"Mconv{layer}_stage6_L2.weight"].copy_(torch.eye(128)[:count, :, None, None])
    for layer, branch in product(range(1, 8), ("L1", "L2")):
        state[f"Mconv{layer}_stage6_{branch}.bias"].zero_()
    directions = state["Mconv7_stage6_L1.bias"]
    state["Mconv7_stage6_L1.weight"].zero_()
    for limb, channels in zip(LIMBS, FIELDS, strict=True):
        (x0, y0), (x1, y1) = (CELLS[joint - 1] for joint in limb)
        length = float(np.hypot(x1 - x0, y1 - y0))
        directions[channels[0] - 19], directions[channels[1] - 19] = (x1 - x0) / length, (y1 - y0) / length
