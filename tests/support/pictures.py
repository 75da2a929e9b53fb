"""Draws with the demo model, through the engine in this process, and measures what is in the pictures."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from serve_app.engine.request import GenerationRequest
from serve_app.errors import ServeError
from serve_app.models.catalog import ModelEntry, ModelType
from serve_app.models.components import BaseComponents, NetComponents
from serve_app.models.demo import DEMO_FAMILY, DEMO_ID, demo_net_id
from serve_app.models.demo.scenes import COLOURS, Item, Rendering, Scene, render
from serve_app.models.loading import load_base, load_net
from serve_app.models.sources import resolve
from serve_app.tasks import AttemptRef, ControlInput, ControlMap, GenerationTask, ImageArray, Mode
from support.tiny import run, tiny_engine

CPU = torch.device("cpu")
TOLERANCE = 2.0
"""Pixels."""


@dataclass(frozen=True, slots=True, eq=False)
class Wish:
    """One picture; what is left out is as a client would have it."""

    prompt: str
    control: str | None = None
    drawn: ControlMap | None = None
    """The map of ``control``."""
    scale: float = 1.0
    negative: str = ""
    seed: int = 1
    guidance: float = 3.0
    guess: bool = False
    init: ImageArray | None = None
    mask: ImageArray | None = None
    strength: float = 0.6
    scheduler: str = "DPMSolverMultistepScheduler"
    steps: int = 20


class Demo:
    """The demo model in memory."""

    def __init__(self, folders: Mapping[str, Path]) -> None:
        """``folders``: catalogue id to folder, as ``install_demo`` returns it."""
        self.base: BaseComponents = load_base(_entry(DEMO_ID, folders[DEMO_ID], ModelType.BASE), CPU, torch.float32)
        self.nets: dict[str, NetComponents] = {
            name: load_net(_entry(name, folder, ModelType.CONTROLNET), CPU, torch.float32)
            for name, folder in folders.items()
            if name != DEMO_ID
        }

    def draw(self, side: int, *wishes: Wish) -> list[ImageArray]:
        """(side, side, 3) each, drawn side by side."""
        requests = [self._request(side, wish, number) for number, wish in enumerate(wishes)]
        outcomes = run(tiny_engine(max_rows=8), [(0, request) for request in requests])
        pictures = []
        for request in requests:
            outcome = outcomes[request]
            if isinstance(outcome, ServeError):
                raise outcome
            pixels = outcome.pictures[0].pixels
            assert pixels is not None
            pictures.append(pixels)
        return pictures

    def _request(self, side: int, wish: Wish, number: int) -> GenerationRequest:
        net = None if wish.control is None else demo_net_id(wish.control)
        controls = () if net is None else (ControlInput(net=net, control_type=str(wish.control), scale=wish.scale),)
        mode = Mode.TEXT if wish.init is None else Mode.IMAGE if wish.mask is None else Mode.MASKED
        task = GenerationTask(
            model=DEMO_ID,
            family=DEMO_FAMILY,
            prompt=wish.prompt,
            negative_prompt=wish.negative,
            width=side,
            height=side,
            seed=wish.seed,
            scheduler=wish.scheduler,
            steps=wish.steps,
            guidance_scale=wish.guidance,
            strength=wish.strength if mode is Mode.IMAGE else 1.0,
            use_karras_sigmas=False,
            guess_mode=wish.guess,
            controls=controls,
            mode=mode,
        )
        return GenerationRequest(
            ref=AttemptRef(job_id=number + 1, attempt=1),
            task=task,
            base=self.base,
            nets=() if net is None else (self.nets[net],),
            init_image=wish.init,
            mask=wish.mask,
            maps=() if wish.drawn is None else (wish.drawn,),
        )


def _entry(name: str, folder: Path, kind: ModelType) -> ModelEntry:
    found = resolve(folder)
    return ModelEntry(
        id=name,
        type=kind,
        family=DEMO_FAMILY,
        control_type=None,
        location=str(found.folder),
        hash=name,
        size_bytes=found.size_bytes,
    )


def single(shape: str, colour: str = "red", ground: str = "white", radius: float = 0.3) -> Scene:
    """One shape in the middle, in the palette's own colours."""
    item = Item(shape, colour, COLOURS[colour], None, 0.5, 0.5, radius, 0.0, 0.1)
    return Scene(ground, COLOURS[ground], 0.0, (item,))


def inside(drawn: Rendering, margin: float = 0.03) -> NDArray[np.bool_]:
    """(H, W): pixels of the first item, farther than ``margin`` sides from its outline."""
    distance = cv2.distanceTransform((drawn.owner == 1).astype(np.uint8), cv2.DIST_L2, 5)
    deep: NDArray[np.bool_] = distance > margin * len(drawn.owner)
    return deep


def outside(drawn: Rendering, margin: float = 0.03) -> NDArray[np.bool_]:
    """(H, W): pixels of the ground, farther than ``margin`` sides from every item."""
    distance = cv2.distanceTransform((drawn.owner == 0).astype(np.uint8), cv2.DIST_L2, 5)
    deep: NDArray[np.bool_] = distance > margin * len(drawn.owner)
    return deep


def colour_name(image: ImageArray, where: NDArray[np.bool_]) -> str:
    """The palette's colour that is nearest, in CIELAB, to the mean of the pixels ``where``."""
    mean = image[where].mean(axis=0)
    colours = np.array([mean, *COLOURS.values()], np.float32)[None] / 255
    lab = cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[0]
    return list(COLOURS)[int(np.linalg.norm(lab[1:] - lab[0], axis=1).argmin())]


def edges_of(image: ImageArray) -> NDArray[np.bool_]:
    """Of what stands out from the grain that a small model leaves everywhere."""
    edges: NDArray[np.bool_] = cv2.Canny(cv2.GaussianBlur(image, (0, 0), 2), 60, 120) > 0
    return edges


def edge_f1(image: ImageArray, wanted: NDArray[np.bool_]) -> float:
    """Harmonic mean of the shares of found edges near a wanted one and of wanted edges near a found one."""
    found = edges_of(image)
    if not found.any() or not wanted.any():
        return 0.0
    precision = float((_distance(wanted)[found] <= TOLERANCE).mean())
    recall = float((_distance(found)[wanted] <= TOLERANCE).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def difference(image: ImageArray, other: ImageArray, where: NDArray[np.bool_] | None = None) -> float:
    """Mean absolute difference, 0..255."""
    apart = np.abs(image.astype(np.float32) - other)
    return float(apart.mean() if where is None else apart[where].mean())


def _distance(edges: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(H, W): pixels to the nearest edge."""
    distance: NDArray[np.float32] = cv2.distanceTransform((~edges).astype(np.uint8), cv2.DIST_L2, 5)
    return distance


def rendered(scene: Scene, side: int) -> Rendering:
    return render(scene, side, side)
