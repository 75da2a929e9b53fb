"""From a file of weights to a network in memory: one function per architecture. Safetensors only.

Each takes the path that ``WeightStore.served`` gives and returns a module in eval mode, float32, on the CPU, without
gradients. Architectures of controlnet-aux are built empty and given the file's tensors as they are; a weight that is
missing is an error, for else it would silently be random, and so is one left over, save in OpenPose's files.

Raises, all of them: ModelLoadFailed (damaged, or another network's weights), UnsafeModel (asks for code).
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from serve_app.annotators.isolation import efficientnet, part
from serve_app.errors import ModelLoadFailed, UnsafeModel
from serve_app.models.building import ONE_AT_A_TIME

State = Mapping[str, Tensor]
M = TypeVar("M", bound=nn.Module)

_COUNTER = "num_batches_tracked"
"""A buffer of batch normalisation that only training reads and that old checkpoints lack."""


def hed(path: Path) -> nn.Module:
    return _filled(hed_module, path)


def hed_module() -> nn.Module:
    network: nn.Module = part("hed").ControlNetHED_Apache2()
    return network


def pidinet(path: Path) -> nn.Module:
    return _filled(pidinet_module, path)


def pidinet_module() -> nn.Module:
    network: nn.Module = part("pidi.model").pidinet()
    return network


def mlsd(path: Path) -> nn.Module:
    return _filled(mlsd_module, path)


def mlsd_module() -> nn.Module:
    network: nn.Module = part("mlsd.models.mbv2_mlsd_large").MobileV2_MLSD_Large()
    return network


def lineart(path: Path) -> nn.Module:
    return _filled(lineart_module, path)


def lineart_module() -> nn.Module:
    """Input (1, 3, H, W) in 0..1, output (1, 1, H, W): 1 is paper. Three residual blocks, as in the checkpoints."""
    network: nn.Module = part("lineart").Generator(3, 1, 3)
    return network


def lineart_anime(path: Path) -> nn.Module:
    state = _state(path)
    width = state["model.model.0.weight"].shape[0] if "model.model.0.weight" in state else 64
    return _filled(partial(lineart_anime_module, width), path, state)


def lineart_anime_module(width: int = 64) -> nn.Module:
    """A U-Net with 8 levels; ``width``: channels of the first, 64 in the published checkpoint."""
    norm = partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)
    network: nn.Module = part("lineart_anime").UnetGenerator(3, 1, 8, width, norm_layer=norm)
    return network


def normal_bae(path: Path) -> nn.Module:
    return _filled(normal_bae_module, path)


def normal_bae_module() -> nn.Module:
    """NNET of controlnet-aux, put together here: its constructor prints and goes through ``torch.hub``."""
    efficientnets = efficientnet()
    with efficientnets.config.set_no_jit(True):
        backbone = efficientnets.tf_efficientnet_b5_ap(pretrained=False)
    backbone.global_pool = nn.Identity()
    backbone.classifier = nn.Identity()
    encoder = _bare(part("normalbae.nets.submodules.encoder").Encoder)
    encoder.original_model = backbone
    network = _bare(part("normalbae.nets.NNET").NNET)
    network.encoder = encoder
    sampling = SimpleNamespace(architecture="BN", sampling_ratio=0.4, importance_ratio=0.7)  # the ratios: training only
    network.decoder = part("normalbae.nets.submodules.decoder").Decoder(sampling)
    return network


def leres(path: Path) -> nn.Module:
    """Input ImageNet-normalised, output (1, 1, H, W): relative depth, far is large."""
    return _filled(leres_module, path).get_submodule("depth_model")


def leres_module() -> nn.Module:
    """What the file names its tensors after: a wrapper that can't be called, whose ``depth_model`` is the network."""
    network: nn.Module = part("leres.leres.multi_depth_model_woauxi").RelDepthModel("resnext101")
    return network


def openpose_body(path: Path) -> nn.Module:
    return _filled(openpose_body_module, path, layers_only=True)


def openpose_body_module() -> nn.Module:
    network: nn.Module = part("open_pose.model").bodypose_model()
    return network


def openpose_hand(path: Path) -> nn.Module:
    return _filled(openpose_hand_module, path, layers_only=True)


def openpose_hand_module() -> nn.Module:
    network: nn.Module = part("open_pose.model").handpose_model()
    return network


def openpose_face(path: Path) -> nn.Module:
    return _filled(openpose_face_module, path)


def openpose_face_module() -> nn.Module:
    network: nn.Module = part("open_pose.face").FaceNet()
    return network


def depth_anything(path: Path) -> nn.Module:
    return _transformer("DepthAnythingForDepthEstimation", path)


def midas(path: Path) -> nn.Module:
    """DPT-Hybrid, for pictures of any size: transformers has the interpolation of positions and does not ask for it."""
    network = _transformer("DPTForDepthEstimation", path)
    if not network.config.is_hybrid:
        raise ModelLoadFailed(f"{path.parent}: not a hybrid DPT")
    embeddings = network.dpt.embeddings
    embeddings.forward = partial(embeddings.forward, interpolate_pos_encoding=True)
    return network


def zoe(path: Path) -> nn.Module:
    return _transformer("ZoeDepthForDepthEstimation", path)


def upernet(path: Path) -> nn.Module:
    return _transformer("UperNetForSemanticSegmentation", path)


def _filled(
    build: Callable[[], nn.Module], path: Path, state: State | None = None, *, layers_only: bool = False
) -> nn.Module:
    """``layers_only``: the file names layers without the block they are in, as OpenPose's Caffe models do.

    What else such a file holds is left alone, as ``util.transfer`` of controlnet-aux does.
    """
    state = _state(path) if state is None else state
    with torch.device("meta"):  # no memory and no time for numbers that the file replaces
        network = build()
    wanted = network.state_dict()
    names = {name: name.partition(".")[2] if layers_only else name for name in wanted}
    missing = [name for name, key in names.items() if key not in state and not name.endswith(_COUNTER)]
    extra = [] if layers_only else sorted(set(state) - set(names.values()))
    if missing or extra:
        raise ModelLoadFailed(
            f"{path}: not the weights of this network: {len(missing)} of {len(wanted)} are missing, "
            f"{len(extra)} left over: {', '.join([*missing, *extra][:3])} ..."
        )
    tensors = {name: _plain(state[key]) if key in state else torch.zeros(()).long() for name, key in names.items()}
    try:
        network.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ModelLoadFailed(f"{path}: {error}") from error
    return network.eval().requires_grad_(requires_grad=False)


def _state(path: Path) -> State:
    try:
        state: State = load_file(path, device="cpu")
    except (SafetensorError, OSError) as error:
        raise ModelLoadFailed(f"{path}: {error}") from error
    return state


def _plain(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _bare(kind: type[M]) -> M:
    """A module of this class without what its constructor does."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    return module


def _transformer(name: str, path: Path) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = path.parent
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadFailed(f"{folder / 'config.json'}: {error}") from error
    if "auto_map" in config:
        raise UnsafeModel(f"{folder / 'config.json'}: auto_map names code that comes with the model")
    expected = config.get("architectures", [name])
    if expected != [name]:
        raise ModelLoadFailed(f"{folder}: holds {expected}; allowed: {name}")
    try:
        with ONE_AT_A_TIME:
            network, report = getattr(transformers, name).from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except Exception as error:  # the library raises anything for a broken file
        raise ModelLoadFailed(f"{folder}: {error}") from error
    lacking = [*report["missing_keys"], *report["mismatched_keys"]]
    if lacking:
        names = ", ".join(str(key) for key in lacking[:3])
        raise ModelLoadFailed(f"{folder}: {len(lacking)} weights are missing or of the wrong shape: {names} ...")
    return network.eval().requires_grad_(requires_grad=False)
