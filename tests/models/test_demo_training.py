"""The training of the demo model: what it draws and says, and that a hundredth of it already learns."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from serve_app.models.catalog import ModelType
from serve_app.models.demo import captions, latents
from serve_app.models.demo.autoencoder import as_pixels
from serve_app.models.demo.control_maps import CLASS_COLOURS, GROUND_COLOUR, MAKERS, as_hint
from serve_app.models.demo.diffusion import ITEM_WEIGHT, MIN_SNR, NOISE_OFFSET, Batch, NoiseSource
from serve_app.models.demo.export import export
from serve_app.models.demo.networks import make_net, make_unet, make_vae
from serve_app.models.demo.scenes import COLOURS, JITTER, Item, Scene, render, sample_scene
from serve_app.models.demo.shapes import SHAPES, TEXTURES
from serve_app.models.demo.tokenizer import build_tokenizer
from serve_app.models.demo.train import PLAN, diffusion_model, encoder, run
from serve_app.models.demo.training import Schedule, curve
from serve_app.models.sources import resolve

SHORT = PLAN.shortened(0.01)


def item(shape: str, **changes: object) -> Item:
    given = {"colour": "red", "rgb": (200, 40, 40), "texture": None, "x": 0.5, "y": 0.5, "radius": 0.3, "angle": 0.0}
    return Item(shape=shape, period=0.1, **given | changes)  # type: ignore[arg-type]


def only(*items: Item) -> Scene:
    return Scene("blue", (45, 90, 210), 0.0, items)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_drawn_in_its_colour_on_the_ground(shape: str) -> None:
    drawn = render(only(item(shape)), 96, 128)
    assert drawn.image.shape == (96, 128, 3)
    inside = drawn.owner == 1
    assert 0.1 < inside[20:76, 36:92].mean() < 1.0  # within 0.3 x 96 = 29 pixels of the middle
    assert not inside[:16].any()
    assert not inside[:, :32].any()
    assert (drawn.image[~inside] == (45, 90, 210)).all(axis=-1).mean() > 0.9  # the rest are smooth edges
    assert (drawn.image[inside] == (200, 40, 40)).all(axis=-1).mean() > 0.4


def test_a_scene_is_the_same_at_any_size() -> None:
    scene = sample_scene(np.random.default_rng(5))
    small, large = render(scene, 64, 64).image, render(scene, 256, 256).image
    shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    assert np.abs(shrunk - small).mean() < 4


def test_areas_are_those_of_geometry() -> None:
    drawn = render(only(item("circle"), item("square", x=0.9, y=0.9, radius=0.1)), 200, 200)
    assert (drawn.owner == 1).sum() == pytest.approx(np.pi * 60**2, rel=0.025)
    assert (drawn.owner == 2).sum() == pytest.approx((0.85 * 40) ** 2, rel=0.1)


@pytest.mark.parametrize("texture", TEXTURES)
def test_textures_have_two_tones(texture: str) -> None:
    drawn = render(only(item("square", texture=texture)), 128, 128)
    tones = np.unique(drawn.image[drawn.owner == 1], axis=0, return_counts=True)[1]
    assert (np.sort(tones)[-2:] > 0.2 * (drawn.owner == 1).sum()).all()


def test_scenes_keep_their_promises() -> None:
    for seed in range(200):
        scene = sample_scene(np.random.default_rng(seed))
        assert 1 <= len(scene.items) <= 3
        for each in scene.items:
            assert each.colour != scene.ground
            assert np.abs(np.array(each.rgb) - COLOURS[each.colour]).max() <= JITTER
            assert each.radius <= each.x <= 1 - each.radius
        gaps = [
            np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius
            for index, a in enumerate(scene.items)
            for b in scene.items[:index]
        ]
        assert min(gaps, default=1.0) > 0
    assert sample_scene(np.random.default_rng(3)) == sample_scene(np.random.default_rng(3))


def test_captions_say_what_is_there_and_every_word_is_one_token() -> None:
    tokenizer = build_tokenizer()
    for seed in range(200):
        random = np.random.default_rng(seed)
        scene = sample_scene(random)
        text = captions.caption(scene, random).replace("gray", "grey")
        for each in scene.items:
            assert each.colour in text
            assert each.shape in text
        said = {word.strip(",") for word in text.split()}
        shown = {scene.ground, *(each.colour for each in scene.items)}
        assert said & set(COLOURS) <= shown
        assert len(tokenizer.tokenize(text)) == len(text.replace(",", " ,").split()), text


@pytest.mark.parametrize("control_type", MAKERS)
def test_maps_have_the_pictures_size_and_show_the_scene(control_type: str) -> None:
    scene = only(item("circle"))
    drawn = render(scene, 128, 128)
    maps = [MAKERS[control_type](scene, drawn, np.random.default_rng(seed)) for seed in range(6)]
    for made in maps:
        assert made.shape == (128, 128, 3)
        assert made.dtype == (np.float32 if control_type == "inpaint" else np.uint8)
        hint = as_hint(made)
        assert hint.shape == (1, 3, 128, 128)
        assert hint.min() >= (-1 if control_type == "inpaint" else 0)
        assert hint.max() <= 1
        assert made.std() > 0
    if control_type in {"canny", "scribble", "lineart"}:
        y, x = np.nonzero(maps[0][..., 0] > 127)
        distance = np.hypot(x - 63.5, y - 63.5)
        assert np.abs(distance - 0.3 * 128).mean() < 6


def test_segmentation_colours_are_far_apart() -> None:
    colours = np.array([GROUND_COLOUR, *CLASS_COLOURS.values()], float)
    distances = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e9 * np.eye(len(colours))
    assert distances.min() > 40


@pytest.mark.parametrize("beta_end", [0.012, 0.022])
def test_noise_follows_the_schedule(beta_end: float) -> None:
    """0.012 is Stable Diffusion's."""
    source = NoiseSource(beta_end)
    torch.manual_seed(0)
    noised = source.add(torch.ones(1000, 4, 8, 8))
    betas = torch.linspace(0.00085**0.5, beta_end**0.5, 1000, dtype=torch.float64) ** 2
    alphas = (1 - betas).cumprod(dim=0)[noised.timesteps].float()[:, None, None, None]
    noise = alphas.sqrt() * noised.target + (1 - alphas).sqrt() * noised.latents
    latents = alphas.sqrt() * noised.latents - (1 - alphas).sqrt() * noised.target
    assert torch.allclose(latents, torch.ones_like(latents), atol=1e-4)
    assert float(noise.std()) == pytest.approx((1 + NOISE_OFFSET**2) ** 0.5, rel=0.01)
    assert float((noised.timesteps < 500).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert int(noised.timesteps.max()) == 999
    assert noised.weights.max() == 1
    assert noised.weights.min() == pytest.approx((MIN_SNR + 1) * float(1 - alphas.max()), rel=1e-3)
    assert noised.loss(noised.target, torch.ones(1000, 1, 8, 8)) == 0


def test_cells_of_items_count_for_more() -> None:
    batch = Batch(128, [only(item("square")), only()], torch.zeros(2, 4, 16, 16))
    cells = batch.cells
    assert cells.shape == (2, 1, 16, 16)
    assert float(cells.mean()) == pytest.approx(1)
    assert float(cells[0, 0, 8, 8] / cells[0, 0, 0, 0]) == pytest.approx(ITEM_WEIGHT)
    assert (cells[1] == cells[0, 0, 0, 0]).all()


def test_a_net_starts_without_a_say() -> None:
    torch.manual_seed(0)
    unet = make_unet()
    net = make_net(unet)
    hint, latent = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        down, middle = net(latent, 10, torch.zeros(1, 77, 96), hint, return_dict=False)
    assert max(float(each.abs().max()) for each in (*down, middle)) == 0
    assert torch.equal(net.conv_in.weight, unet.conv_in.weight)
    assert torch.equal(net.mid_block.resnets[0].conv1.weight, unet.mid_block.resnets[0].conv1.weight)


def test_latents_are_standard_and_the_pictures_stay_the_same() -> None:
    vae = make_vae(3)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        before = vae.decode(vae.encode(pixels).latent_dist.mean).sample
        latents.standardise(vae, side=64, scenes=8)
        encoded = vae.encode(pixels).latent_dist
        after = vae.decode(encoded.mean).sample
        pictures = [render(latents.scene_of(64, index), 64, 64).image for index in range(8)]
        means = torch.cat([vae.encode(as_pixels([image])).latent_dist.mean for image in pictures])
    assert torch.allclose(before, after, atol=1e-3)
    assert torch.allclose(means.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert torch.allclose(means.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3)
    assert vae.config.scaling_factor == 1.0


STAGES = ("autoencoder", "latents", "decoder", *PLAN.phases, "canny")


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundredth of the training, from scratch, to where the first net is trained."""
    work = tmp_path_factory.mktemp("training")
    for stage in STAGES:
        run(stage, work, SHORT, bf16=False)
    return work


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in curve(folder)]


def test_every_stage_runs_and_the_loss_falls(trial: Path) -> None:
    falling = losses(trial / "diffusion")
    assert len(falling) == PLAN.phases["diffusion"].steps // 100
    assert np.mean(falling[-20:]) < 0.75 * np.mean(falling[:5])
    for stage in set(STAGES) - {"latents"}:
        assert np.isfinite(losses(trial / stage)).all()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_a_stopped_training_goes_on_as_if_it_had_not_been(trial: Path, tmp_path: Path) -> None:
    (tmp_path / "latents").symlink_to(trial / "latents")
    (tmp_path / "words").symlink_to(trial / "words")
    saved = []
    for stops in ((2, 4), (4,)):
        for until in stops:
            run("diffusion", tmp_path, SHORT, bf16=False, until=until)
        assert losses(tmp_path / "diffusion") == losses(trial / "diffusion")[:4]
        saved.append((tmp_path / "diffusion" / "checkpoint.pt").rename(tmp_path / f"{stops}.pt"))
        shutil.rmtree(tmp_path / "diffusion")
    stopped, whole = (torch.load(path, weights_only=True) for path in saved)
    for kept in ("average", "weights"):
        torch.testing.assert_close(stopped[kept], whole[kept], rtol=0, atol=0)
    torch.testing.assert_close(stopped["optimiser"]["state"], whole["optimiser"]["state"], rtol=0, atol=0)


def test_latents_are_filled_by_workers_and_kept(trial: Path, tmp_path: Path) -> None:
    vae, side, count = encoder(trial), 64, 150
    latents.fill(vae, tmp_path / "one", side, count, report=lambda _: None)
    for worker in (1, 0):
        latents.fill(vae, tmp_path / "two", side, count, worker=worker, workers=2, report=lambda _: None)
    filled = latents.load(tmp_path / "two", side)
    assert filled.shape == (count, 4, 8, 8)
    assert np.array_equal(filled, latents.load(tmp_path / "one", side))
    kept = min((tmp_path / "two" / str(side)).iterdir()).stat().st_mtime_ns
    latents.fill(vae, tmp_path / "two", side, count, report=lambda _: None)
    assert min((tmp_path / "two" / str(side)).iterdir()).stat().st_mtime_ns == kept


def test_a_stage_out_of_turn_says_which_comes_first(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="autoencoder"):
        run("latents", tmp_path, SHORT, bf16=False)
    with pytest.raises(FileNotFoundError, match="latents"):
        run("words", tmp_path, SHORT, bf16=False)


def test_what_is_exported_loads_and_draws_in_half_the_bytes(trial: Path, tmp_path: Path) -> None:
    export(trial, tmp_path / "out", ("canny",))
    found = resolve(tmp_path / "out" / "demo")
    assert found.type is ModelType.BASE
    assert resolve(tmp_path / "out" / "demo-canny").type is ModelType.CONTROLNET
    unet = diffusion_model(trial).unet
    assert json.loads((tmp_path / "out" / "curves.json").read_text())["diffusion"] == curve(trial / "diffusion")
    shipped = load_file(tmp_path / "out" / "demo" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(shipped[name], value.half()) for name, value in unet.state_dict().items())


def test_rates_rise_then_fall() -> None:
    schedule = Schedule(steps=1000, rate=1.0, warmup=100)
    rates = [schedule.rate_at(step) for step in range(1000)]
    assert rates[99] == max(rates) == 1.0
    assert rates[49] == pytest.approx(0.5)
    assert rates[550] == pytest.approx(0.525, abs=1e-3)
    assert rates[-1] == pytest.approx(0.05, abs=1e-3)
