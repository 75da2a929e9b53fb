"""Trains the demo model: ``python -m serve_app.models.demo.train STAGE --work FOLDER``.

Stages, in order: autoencoder, latents, decoder, words, diffusion, served-size, guided, large, one per control type;
``all`` is all of them. Each continues where it was stopped. The decoder needs nothing of the stages after it and may
run beside them; so may the control types beside each other.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL

from serve_app.models.demo import latents
from serve_app.models.demo.autoencoder import AutoencoderStage, DecoderStage, decoder_of
from serve_app.models.demo.control import ControlStage
from serve_app.models.demo.control_maps import MAKERS
from serve_app.models.demo.diffusion import PHASES, DiffusionModel, DiffusionStage
from serve_app.models.demo.networks import make_vae
from serve_app.models.demo.training import Schedule, Stage, Training, restore

_BATCH_PIXELS = 800_000
"""No batch has more."""
_PHASES = tuple(phase.name for phase in PHASES)
STAGES = ("autoencoder", "latents", "decoder", *_PHASES, *MAKERS)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long every stage takes, and how many scenes the later ones see."""

    autoencoder: Schedule
    decoder: Schedule
    phases: Mapping[str, Schedule]
    """Of the base model, by name."""
    net: Schedule
    scenes: Mapping[int, int]
    """Side of the picture to number of scenes."""

    def shortened(self, share: float) -> "Plan":
        """The same with a share of the steps and scenes, at least as many as a batch takes."""

        def shorter(schedule: Schedule) -> Schedule:
            return replace(
                schedule,
                steps=max(1, round(schedule.steps * share)),
                warmup=round(schedule.warmup * share),
                save_every=max(1, round(schedule.save_every * share)),
            )

        return Plan(
            autoencoder=shorter(self.autoencoder),
            decoder=shorter(self.decoder),
            phases={name: shorter(schedule) for name, schedule in self.phases.items()},
            net=shorter(self.net),
            scenes={side: max(_BATCH_PIXELS // side**2, round(count * share)) for side, count in self.scenes.items()},
        )


PLAN = Plan(
    autoencoder=Schedule(steps=700, rate=1.5e-3, warmup=20, decay=0.99, save_every=50),
    decoder=Schedule(steps=1400, rate=1e-3, warmup=20, decay=0.995, save_every=50),
    phases={
        "words": Schedule(steps=500, rate=1e-3, decay=0.99),
        "diffusion": Schedule(steps=8000, rate=1e-3, decay=0.995),
        "served-size": Schedule(steps=1200, rate=5e-4, warmup=20, decay=0.99),
        "guided": Schedule(steps=1200, rate=8e-4, warmup=20, decay=0.99),
        "large": Schedule(steps=1500, rate=1e-3, warmup=20, decay=0.99),
    },
    net=Schedule(steps=800, rate=8e-4, warmup=20, decay=0.99),
    scenes={64: 6_000, 128: 6_000, 256: 1_600, 512: 900},
)
"""The shipped weights were trained so, with ``--bf16``; phases before ``large`` had the first 300 scenes of 512 pixels.

``trained/curves.json`` has the losses.
"""


def run(
    stage: str, work: Path, plan: Plan, *, bf16: bool, until: int | None = None, worker: int = 0, workers: int = 1
) -> None:
    """Run or continue one stage, or all of them in order, in the folder ``work``. What is done is passed over.

    Raises:
        FileNotFoundError: an earlier stage has to come first.
    """
    if stage == "all":
        for each in STAGES:
            run(each, work, plan, bf16=bf16, until=until, worker=worker, workers=workers)
    elif stage == "autoencoder":
        _train(AutoencoderStage(bf16=bf16), plan.autoencoder, work, until)
    elif stage == "latents":
        vae = encoder(work)
        for side, count in plan.scenes.items():
            latents.fill(vae, work / "latents", side, count, worker=worker, workers=workers)
    elif stage == "decoder":
        _train(DecoderStage(encoder(work), bf16=bf16), plan.decoder, work, until)
    elif stage in _PHASES:
        _train_phase(stage, plan, work, bf16=bf16, until=until)
    else:
        net = ControlStage(stage, diffusion_model(work), work / "latents", bf16=bf16)
        _train(net, plan.net, work, until)


def encoder(work: Path) -> AutoencoderKL:
    """The autoencoder whose latents the later stages use: after its first stage, standardised."""
    vae = make_vae(AutoencoderStage.seed)
    restore(vae, work / AutoencoderStage.name)
    latents.standardise(vae)
    return vae.eval()


def autoencoder(work: Path) -> AutoencoderKL:
    """The autoencoder with its final decoder."""
    vae = encoder(work)
    restore(decoder_of(vae), work / DecoderStage.name)
    return vae


def diffusion_model(work: Path) -> DiffusionModel:
    model = DiffusionModel()
    restore(model, work / _PHASES[-1])
    return model.eval()


def _train_phase(name: str, plan: Plan, work: Path, *, bf16: bool, until: int | None) -> None:
    number = _PHASES.index(name)
    stage = DiffusionStage(PHASES[number], work / "latents", bf16=bf16)
    if number:
        restore(stage.model, work / _PHASES[number - 1])
    _train(stage, plan.phases[name], work, until)


def _train(stage: Stage, schedule: Schedule, work: Path, until: int | None) -> None:
    Training(stage, schedule, work / stage.name).run(until)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--work", type=Path, required=True, help="folder of checkpoints, latents and loss curves")
    parser.add_argument("--until", type=int, help="stop after this step; the schedule stays as it is")
    parser.add_argument("--share", type=float, default=1.0, help="share of the full training, for a trial")
    parser.add_argument("--worker", type=int, default=0, help="latents: which of the workers this is")
    parser.add_argument("--workers", type=int, default=1, help="latents: how many work side by side")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster where the CPU has AVX512-BF16")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    plan = PLAN if options.share == 1 else PLAN.shortened(options.share)
    run(
        options.stage,
        options.work,
        plan,
        bf16=options.bf16,
        until=options.until,
        worker=options.worker,
        workers=options.workers,
    )


if __name__ == "__main__":
    main()
