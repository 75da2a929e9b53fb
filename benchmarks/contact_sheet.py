"""What the demo model draws: a sheet of prompts x control maps, drawn by a running server over HTTP.

    python benchmarks/contact_sheet.py

Starts its own server on a free port with a fresh data folder, unless --url and --key name a running one. Three columns
are outlines as a hand would draw them, sent as control maps (``auto_hint: no``); two are photographs, of whose edges
the server makes the maps. The photographs come with scikit-image: coins and a cup, free of copyright as its data's
README says. Writes results/contact_sheet.jpg beside this file, the maps in the first row.
"""

import argparse
import base64
import io
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from report import RESULTS
from server import Server, own_server
from skimage import data

SIDE = 512
SHOWN = 192
"""Pixels a picture is wide on the sheet."""
MARGIN = 34

Points = Sequence[tuple[float, float]]
Picture = NDArray[np.uint8]

HEART: Points = (
    (0.5, 0.86), (0.3, 0.66), (0.15, 0.45), (0.17, 0.27), (0.31, 0.18), (0.45, 0.24), (0.5, 0.34), (0.56, 0.23),
    (0.7, 0.17), (0.84, 0.28), (0.85, 0.46), (0.7, 0.66), (0.5, 0.86),
)  # fmt: skip
FISH: Points = (
    (0.88, 0.33), (0.72, 0.47), (0.55, 0.35), (0.34, 0.31), (0.18, 0.41), (0.11, 0.5), (0.2, 0.6), (0.36, 0.69),
    (0.55, 0.65), (0.72, 0.53), (0.89, 0.68), (0.84, 0.5), (0.88, 0.33),
)  # fmt: skip
TREE: Points = (
    (0.45, 0.9), (0.46, 0.63), (0.31, 0.62), (0.2, 0.5), (0.28, 0.36), (0.35, 0.2), (0.5, 0.12), (0.66, 0.19),
    (0.72, 0.35), (0.81, 0.49), (0.7, 0.62), (0.55, 0.63), (0.56, 0.9), (0.45, 0.91),
)  # fmt: skip


def scribbled(points: Points, seed: int) -> Picture:
    """A smooth line through points given in sides of the picture, thick and unsteady, white on black (H, W, 3)."""
    random = np.random.default_rng(seed)
    corners = np.array(points) * SIDE + random.normal(0, SIDE / 120, (len(points), 2))
    place = np.linspace(0, len(corners) - 1, 24 * len(corners))
    smooth = [np.interp(place, np.arange(len(corners)), corners[:, axis]) for axis in (0, 1)]
    kernel = np.hanning(31) / np.hanning(31).sum()
    line = np.stack([np.convolve(np.pad(one, 15, mode="edge"), kernel, "valid") for one in smooth], axis=1)
    drawn = np.zeros((SIDE, SIDE, 3), np.uint8)
    cv2.polylines(drawn, [np.round(line).astype(np.int32)], isClosed=False, color=(255,) * 3, thickness=7)
    return drawn


def square(photo: Picture, left: int, top: int, side: int) -> Picture:
    """A square of a photo, (SIDE, SIDE, 3)."""
    cut = photo[top : top + side, left : left + side]
    rgb = cut if cut.ndim > 2 else np.repeat(cut[:, :, None], 3, axis=2)
    return np.asarray(cv2.resize(rgb, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC), np.uint8)


def columns() -> list[tuple[str, Mapping[str, object]]]:
    """What is in the map, and the fields of a request that bring it."""
    sent = [("heart", scribbled(HEART, 1)), ("fish", scribbled(FISH, 2)), ("tree", scribbled(TREE, 3))]
    photos = [
        ("circle", square(data.coins(), 298, 3, 80), {"low_threshold": 60, "high_threshold": 120}),
        ("circle", square(data.coffee(), 110, 0, 400), {"low_threshold": 150, "high_threshold": 255}),
    ]
    return [
        *(
            (name, {"controlnet_model": "scribble", "auto_hint": "no", "init_image": encoded(map_)})
            for name, map_ in sent
        ),
        *(
            (name, {"controlnet_model": "canny", "init_image": encoded(photo), "annotator_params": params})
            for name, photo, params in photos
        ),
    ]


def prompts(shape: str) -> list[str]:
    """One per row."""
    return [
        f"a red {shape} on a white background",
        f"a yellow {shape} on a blue background",
        f"a green {shape} on a pink background",
        f"an orange {shape}, black background",
    ]


def encoded(picture: Picture) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def draw(server: Server, fields: Mapping[str, object], prompt: str) -> tuple[Picture, Picture]:
    """The control map and the picture, as the server hands them out."""
    common = {
        "model_id": "demo",
        "prompt": prompt,
        "width": SIDE,
        "height": SIDE,
        "num_inference_steps": 20,
        "scheduler": "DPMSolverMultistepScheduler",
        "guidance_scale": 3,
        "seed": 3,
        "return_control_maps": "yes",
    }
    answer = server.draw({**common, **fields})
    map_, picture = (
        np.asarray(Image.open(io.BytesIO(server.picture(answer[field][0]))).convert("RGB"))
        for field in ("control_maps", "output")
    )
    return map_, picture


def laid_out(rows: Sequence[Sequence[Picture]], titles: Sequence[str]) -> Image.Image:
    """Rows of pictures, each with its title above."""
    height = SHOWN + MARGIN
    sheet = Image.new("RGB", (SHOWN * len(rows[0]), height * len(rows)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, (row, title) in enumerate(zip(rows, titles, strict=True)):
        pen.text((8, number * height + 8), title, "black", font)
        for column, picture in enumerate(row):
            shrunk = Image.fromarray(picture).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)
            sheet.paste(shrunk, (column * SHOWN, number * height + MARGIN))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--key", help="its API key")
    parser.add_argument("--output", type=Path, default=RESULTS / "contact_sheet.jpg")
    arguments = parser.parse_args()
    if arguments.url:
        make(Server(arguments.url, arguments.key), arguments.output)
    else:
        with own_server() as (url, key):
            make(Server(url, key), arguments.output)


def make(server: Server, output: Path) -> None:
    chosen = columns()
    titles = prompts("[shape]")
    wanted = [(fields, prompt) for shape, fields in chosen for prompt in prompts(shape)]
    begin = time.perf_counter()
    first = draw(server, *wanted[0])
    print(f"the first picture, models not loaded yet: {time.perf_counter() - begin:.1f} s")
    begin = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        drawn = [first, *pool.map(lambda one: draw(server, *one), wanted[1:])]
    seconds = time.perf_counter() - begin
    print(f"{len(wanted) - 1} more, four at a time: {seconds:.1f} s, {seconds / (len(wanted) - 1):.2f} s each")
    maps = [drawn[column * len(titles)][0] for column in range(len(chosen))]
    pictures = [[drawn[column * len(titles) + row][1] for column in range(len(chosen))] for row in range(len(titles))]
    sheet = laid_out([maps, *pictures], ["control maps: three sent as they are, two from photographs", *titles])
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, quality=88)
    print(output)


if __name__ == "__main__":
    main()
