"""Seconds per annotator: every row of ANNOTATORS on one photo, with random weights of the real size.

Weights decide the numbers in a map, hardly its time, so none are downloaded: networks get random ones through the real
converter and loaders. What OpenPose costs depends on whom it finds: its weights are those of the tests, which see one
person in the picture of these rows, with two hands and a face. mediapipe is left out, for its weights cannot be made.

    python benchmarks/annotators.py --sizes 512 --threads 2 --json benchmarks/results/annotators.json
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import transformers
from report import machine, write
from skimage.data import astronaut
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from serve_app.annotators import ANNOTATORS, annotate, networks
from serve_app.annotators.detectors import DetectorHost
from serve_app.annotators.weights import NETWORKS, WEIGHTS, WeightStore
from serve_app.controls import CONTROL_TYPES
from serve_app.tasks import AnnotationTask, ImageArray
from support.detectors import make_store

REAL_SIZES: dict[str, Callable[[], nn.Module]] = {
    "lineart_anime": networks.lineart_anime_module,
    "depth_anything_v2": lambda: transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig()),
    "midas": lambda: transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            is_hybrid=True,
            backbone_config=transformers.BitConfig(
                global_padding="same",
                layer_type="bottleneck",
                depths=[3, 4, 9],
                out_features=["stage1", "stage2", "stage3"],
                embedding_dynamic_padding=True,
            ),
            backbone_out_indices=[0, 1, 8, 11],
            neck_hidden_sizes=[256, 512, 768, 768],
            neck_ignore_stages=[0, 1],
            readout_type="project",
        )
    ),
    "zoe": lambda: transformers.ZoeDepthForDepthEstimation(
        transformers.ZoeDepthConfig(neck_hidden_sizes=[256, 512, 1024, 1024])
    ),
    "upernet": lambda: transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(
            backbone_config=transformers.ConvNextConfig(
                depths=[3, 3, 27, 3],
                hidden_sizes=[96, 192, 384, 768],
                out_features=["stage1", "stage2", "stage3", "stage4"],
            ),
            num_labels=150,
        )
    ),
}
"""Of those that are small in the tests, the size that is published."""


def build_host(folder: Path, annotators: Sequence[str]) -> DetectorHost:
    table = dict(WEIGHTS)
    names = {NETWORKS[network].weights for name in annotators for network in ANNOTATORS[name].networks}
    for name in sorted(names):
        table[name] = make_store(folder, name, builders=REAL_SIZES).table[name]
    return DetectorHost(WeightStore(folder, table), "auto", 32 * 1024**3)


def one_person() -> ImageArray:
    """What the weights of the tests take for a person: one white spot."""
    photo = np.zeros((512, 512, 3), np.uint8)
    photo[240:248, 240:248] = 255
    return photo


def measure(host: DetectorHost, name: str, side: int, repetitions: int) -> dict[str, Any]:
    photo = one_person() if name.startswith("openpose") else astronaut()
    kind = next(kind for kind, row in CONTROL_TYPES.items() if name in row.annotators)
    task = AnnotationTask(control_type=kind, annotator=name, width=side, height=side)
    mask = np.zeros(photo.shape[:2], np.uint8)
    begin = time.perf_counter()
    annotate(task, photo, mask, host)
    first = time.perf_counter() - begin
    seconds = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        annotate(task, photo, mask, host)
        seconds.append(time.perf_counter() - begin)
    with host.lease(ANNOTATORS[name].networks) as loaded:
        modules = [one for one in loaded.values() if isinstance(one, nn.Module)]
        size_bytes = sum(tensor.nbytes for module in modules for tensor in module.parameters())
    return {
        "annotator": name,
        "pixels": f"{side}x{side}",
        "seconds": seconds,
        "median_s": statistics.median(seconds),
        "first_s": first,
        "weights_bytes": size_bytes,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512], help="sides of the pictures, pixels")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ANNOTATORS, default=list(ANNOTATORS))
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)
    names = [name for name in options.only if "face_landmarker" not in ANNOTATORS[name].networks]
    rows = []
    described = machine()
    print(f"{'annotator':<20}{'pixels':<12}{'median s':>9}{'first s':>9}{'weights MB':>12}")
    with tempfile.TemporaryDirectory() as folder:
        host = build_host(Path(folder), names)
        for side in options.sizes:
            for name in names:
                row = measure(host, name, side, options.repetitions)
                rows.append(row)
                print(
                    f"{row['annotator']:<20}{row['pixels']:<12}{row['median_s']:>9.2f}{row['first_s']:>9.2f}"
                    f"{row['weights_bytes'] / 1e6:>12.0f}",
                    flush=True,
                )
    if options.json is not None:
        write(options.json, {"threads": options.threads, "repetitions": options.repetitions}, rows, described)


if __name__ == "__main__":
    main(sys.argv[1:])
