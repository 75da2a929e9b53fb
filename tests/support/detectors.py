"""Random weights for every detector, in the file formats of the real ones, and a stand-in for mediapipe.

Pickles are written as they are published, with their outer keys and prefixes, and go through the product's converter.
Networks whose size is fixed have it; those of transformers, and the anime U-Net, say their size in their files and are
small here. Numbers are drawn in the scale of a usual initialisation, quickly: from one block that repeats.
"""

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, Self

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from serve_app.annotators import ANNOTATORS, annotate, networks
from serve_app.annotators.convert import convert
from serve_app.annotators.detectors import DetectorHost
from serve_app.annotators.isolation import part
from serve_app.annotators.weights import NETWORKS, WEIGHTS, Weights, WeightStore
from serve_app.controls import CONTROL_TYPES
from serve_app.tasks import AnnotationInfo, AnnotationTask, ControlMap, ImageArray, JsonScalar
from support.people import see_people

Build = Callable[[], nn.Module]
NOTHING: Mapping[str, Build] = MappingProxyType({})

PICKLES: Mapping[str, Build] = {
    "hed": networks.hed_module,
    "pidinet": networks.pidinet_module,
    "mlsd": networks.mlsd_module,
    "lineart": networks.lineart_module,
    "lineart_coarse": networks.lineart_module,
    "lineart_anime": lambda: networks.lineart_anime_module(width=8),
    "normal_bae": networks.normal_bae_module,
    "leres": lambda: part("leres.leres.multi_depth_model_woauxi").RelDepthModel("resnext101"),
    "openpose_body": networks.openpose_body_module,
    "openpose_hand": networks.openpose_hand_module,
    "openpose_face": networks.openpose_face_module,
}
"""Weights that are published as pickles, and the network each is of."""

_LAYERS_ONLY = {"openpose_body", "openpose_hand"}
TASK = b"not a model, but its hash is checked"


def published_state(name: str, build: Build | None = None) -> dict[str, Tensor]:
    """A random state dict with the names that the published file has."""
    with torch.device("meta"):
        network: nn.Module = (build or PICKLES[name])()
    wanted: dict[str, Tensor] = network.state_dict()
    block = _block(len(name))
    scale = 0.1 if name.startswith("openpose") else 1  # so that few points are found, instead of thousands
    state = {}
    for index, (key, tensor) in enumerate(wanted.items()):
        plain = key.partition(".")[2] if name in _LAYERS_ONLY else key
        state[WEIGHTS[name].prefix + plain] = _random(key, tensor, block[97 * index % 4096 :] * scale).clone()
    if name == "openpose_body":
        see_people(state)
    return state


def write_pickle(folder: Path, name: str, build: Build | None = None) -> Weights:
    """The published file of random numbers, and the row of WEIGHTS that has its hash."""
    row = WEIGHTS[name]
    value: dict[str, Any] = published_state(name, build)
    for key in reversed(row.inner):
        value = {key: value}
    path = folder / row.repo / row.file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path)
    return replace(row, sha256=sha256(path))


def write_transformer(folder: Path, name: str, build: Build | None = None) -> None:
    """A small model folder in the layout of the hub's cache, as ``weights fetch`` leaves it."""
    row = WEIGHTS[name]
    revision = row.revision or "f" * 40
    cached = folder / f"models--{row.repo.replace('/', '--')}"
    torch.manual_seed(len(name))
    network: Any = (build or TRANSFORMERS[name])()
    network.eval().save_pretrained(cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)


def write_task(folder: Path) -> Weights:
    row = WEIGHTS["face_landmarker"]
    path = folder / row.repo / row.file
    path.parent.mkdir(parents=True)
    path.write_bytes(TASK)
    return replace(row, sha256=sha256(path))


def make_store(folder: Path, *names: str, builders: Mapping[str, Build] = NOTHING) -> WeightStore:
    """Weights of these names, or of all, ready to be served; pickles are converted and deleted.

    ``builders``: other networks than the small ones, by name of their weights.
    """
    table = dict(WEIGHTS)
    for name in names or tuple(WEIGHTS):
        if name in TRANSFORMERS:
            write_transformer(folder, name, builders.get(name))
        elif name == "face_landmarker":
            table[name] = write_task(folder)
        else:
            table[name] = write_pickle(folder, name, builders.get(name))
            store = WeightStore(folder, table)
            assert convert(store, name) is not None
            (folder / table[name].repo / table[name].file).unlink()
    return WeightStore(folder, table)


class Detectors:
    """A host whose random weights are made when they are first needed."""

    def __init__(self, folder: Path, budget_bytes: int = 4 * 1024**3) -> None:
        self._table = dict(WEIGHTS)
        self._made: set[str] = set()
        self.store = WeightStore(folder, self._table)
        self.host = DetectorHost(self.store, "cpu", budget_bytes)

    def annotate(
        self,
        name: str,
        image: ImageArray,
        size: tuple[int, int] = (96, 64),
        mask: ImageArray | None = None,
        **params: JsonScalar,
    ) -> tuple[ControlMap, AnnotationInfo]:
        """The map of one annotator, or of ``none``, at ``size``, width and height."""
        for network in ANNOTATORS[name].networks if name != "none" else ():
            self.need(NETWORKS[network].weights)
        kind = next(kind for kind, row in CONTROL_TYPES.items() if name in row.annotators)
        task = AnnotationTask(control_type=kind, annotator=name, width=size[0], height=size[1], params=params)
        return annotate(task, image, mask, self.host)

    def need(self, weights: str) -> None:
        if weights not in self._made:
            self._table.update({weights: make_store(self.store.folder, weights).table[weights]})
            self._made.add(weights)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _block(seed: int) -> Tensor:
    return torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))


def _random(key: str, tensor: Tensor, block: Tensor) -> Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.zeros((), dtype=torch.long)
    if key.endswith("running_var") or (tensor.ndim == 1 and key.endswith("weight")):
        return torch.ones(tensor.shape)
    if tensor.numel() > block.numel():
        block = block.repeat(math.ceil(tensor.numel() / block.numel()))
    fan_in = tensor[0].numel() if tensor.ndim > 1 else 10_000
    return block[: tensor.numel()].reshape(tensor.shape) * math.sqrt(2 / fan_in)


def _depth_anything() -> nn.Module:
    backbone = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=70,
        patch_size=14,
        out_indices=[1, 2, 3, 4],
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    sizes = {"reassemble_hidden_size": 32, "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8}
    config = transformers.DepthAnythingConfig(backbone_config=backbone, head_hidden_size=8, patch_size=14, **sizes)
    return _spread(transformers.DepthAnythingForDepthEstimation(config))


def _midas() -> nn.Module:
    backbone = transformers.BitConfig(
        global_padding="same",
        layer_type="bottleneck",
        depths=[1, 1, 1],
        hidden_sizes=[16, 32, 64],
        embedding_size=8,
        num_groups=4,
        out_features=["stage1", "stage2", "stage3"],
        embedding_dynamic_padding=True,
    )
    config = transformers.DPTConfig(
        is_hybrid=True,
        backbone_config=backbone,
        backbone_featmap_shape=[1, 64, 4, 4],
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[16, 32, 16, 16],
        fusion_hidden_size=8,
        neck_ignore_stages=[0, 1],
        readout_type="project",
    )
    return _spread(transformers.DPTForDepthEstimation(config))


def _zoe() -> nn.Module:
    backbone = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=16,
        use_relative_position_bias=True,
        reshape_hidden_states=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    sizes = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "bottleneck_features": 8}
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone, num_relative_features=8, bin_embedding_dim=8, num_attractors=[4, 4, 2, 1], **sizes
    )
    return _spread(transformers.ZoeDepthForDepthEstimation(config))


def _upernet() -> nn.Module:
    backbone = transformers.ConvNextConfig(
        hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=150, auxiliary_in_channels=32, auxiliary_channels=8
    )
    return _spread(transformers.UperNetForSemanticSegmentation(config))


def _spread(network: nn.Module) -> nn.Module:
    """Weights as large as in a usual initialisation: those of transformers are so small that outputs are constant."""
    block = _block(1)
    with torch.no_grad():
        for index, parameter in enumerate(network.parameters()):
            if parameter.ndim > 1:
                parameter.copy_(_random("", parameter, block[97 * index % 4096 :]))
    return network


TRANSFORMERS: Mapping[str, Build] = {
    "depth_anything_v2": _depth_anything,
    "midas": _midas,
    "zoe": _zoe,
    "upernet": _upernet,
}


class Looked(Exception):
    """A network has seen what it is shown."""


class Looking(nn.Module):
    """A network of any detector that keeps what it is shown and answers nothing."""

    def __init__(self, patch_size: int = 16, image_size: int = 384) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(patch_size=patch_size, backbone_config=SimpleNamespace(image_size=image_size))
        self.dpt = self.depth_model = self.infer = self.forward
        self.seen: Tensor | None = None

    def forward(self, pixels: Tensor, **_: object) -> Any:
        self.seen = pixels.detach().clone()
        raise Looked

    def shown(self, detect: Callable[[], object]) -> Tensor:
        """What ``detect`` shows this network first."""
        with suppress(Looked):
            detect()
        assert self.seen is not None
        return self.seen


class Planted(Looking):
    """A network that answers what ``answer`` makes of its input."""

    def __init__(self, answer: Callable[[Tensor], Any], patch_size: int = 16, image_size: int = 384) -> None:
        super().__init__(patch_size, image_size)
        self.answer = answer

    def forward(self, pixels: Tensor, **_: object) -> Any:
        self.seen = pixels.detach().clone()
        return self.answer(pixels)


@contextmanager
def reference_library(mediapipe: ModuleType | None = None) -> Iterator[ModuleType]:
    """controlnet_aux itself, whose detectors ours are compared with. ``mediapipe``: what it takes for that package."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setitem(sys.modules, "mediapipe", mediapipe)
        patch.setenv("KMP_DUPLICATE_LIB_OK", "TRUE")  # its __init__ sets it: taken back afterwards
        warnings.simplefilter("ignore")
        import controlnet_aux

        yield controlnet_aux


Landmarks = list[tuple[float, float]]
"""478 points of one face, (x, y) in 0..1."""
CONFIDENCES = (0.3, 0.95, 0.7, 0.9)
"""How sure the stand-in for mediapipe is of each face."""


def faces_of(image: Any) -> list[Landmarks]:
    """Three faces, spirals one in another; their place follows from the picture."""
    middle = 0.4 + 0.2 * float(np.asarray(image, dtype=np.float64)[:, :, 0].mean()) / 255
    angles = np.linspace(0, 40, 478)
    return [
        [(middle + size * 0.3 * t / 40 * math.cos(t), 0.5 + size * 0.4 * t / 40 * math.sin(t)) for t in angles]
        for size in (1.2, 1.0, 1.1)
    ]


def confident(faces: list[Landmarks], least: float, most: int) -> list[Landmarks]:
    """The first ``most`` of the faces that are surer than ``least``."""
    return [face for face, sure in zip(faces, CONFIDENCES, strict=False) if sure >= least][:most]


def fake_mediapipe(found: Callable[[Any], list[Landmarks]] = faces_of) -> ModuleType:
    """A module with the part of mediapipe >= 1.0 that we use. ``found``: pixels to the landmarks of each face."""

    class FaceLandmarker:
        def __init__(self, options: SimpleNamespace) -> None:
            assert options.base_options.model_asset_buffer == TASK
            self._options = options

        @classmethod
        def create_from_options(cls, options: SimpleNamespace) -> "FaceLandmarker":
            return cls(options)

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None: ...

        def detect(self, picture: SimpleNamespace) -> SimpleNamespace:
            options = self._options
            faces = confident(found(picture.data), options.min_face_detection_confidence, options.num_faces)
            return SimpleNamespace(face_landmarks=[[SimpleNamespace(x=x, y=y) for x, y in face] for face in faces])

    module: Any = ModuleType("mediapipe")
    module.__spec__ = ModuleSpec("mediapipe", None)
    module.Image = SimpleNamespace
    module.ImageFormat = SimpleNamespace(SRGB=1)
    vision = SimpleNamespace(FaceLandmarker=FaceLandmarker, FaceLandmarkerOptions=SimpleNamespace)
    module.tasks = SimpleNamespace(BaseOptions=SimpleNamespace, vision=vision)
    made: ModuleType = module
    return made
