"""controlnet-serve weights: get the annotators' weights onto this machine in the form that services read."""

from collections.abc import Callable
from typing import Annotated

import typer

from serve_app.annotators import readiness
from serve_app.annotators.weights import WEIGHTS, Missing, WeightStore
from serve_app.cli_options import ConfigOption, DataOption, read_config
from serve_app.errors import ServeError

app = typer.Typer(help="Weights of the annotators.", no_args_is_help=True)

NamesArgument = Annotated[list[str] | None, typer.Argument(help=f"Any of: {', '.join(WEIGHTS)}.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]


@app.command("list")
def weights_list(config: ConfigOption = None, data: DataOption = None) -> None:
    """List weights (name, state, licence, where they are published), then the annotators that can't run yet."""
    store = WeightStore(read_config(config, data).annotator_weights)
    for name, row in store.table.items():
        state = "ready" if store.served(name) is not None else "missing"
        typer.echo(f"{name}  {state}  {row.licence}  {row.url or row.label}  {row.revision or 'not pinned'}")
    for annotator, state_of in readiness(store).items():
        if isinstance(state_of, Missing):
            typer.echo(f"{annotator} can't run: {state_of.reason}")


@app.command("fetch")
def weights_fetch(
    names: NamesArgument = None, everything: AllOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    """Download weights at their pinned revision and check their hash. Mind the licences: see ``weights list``."""
    from serve_app.annotators.convert import fetch

    loaded = read_config(config, data)
    store = WeightStore(loaded.annotator_weights)
    _each(names, everything, lambda name: f"{fetch(store, name, loaded.fetch)} ({store.row(name).licence})")


@app.command("convert")
def weights_convert(
    names: NamesArgument = None,
    everything: AllOption = False,
    allow_unpinned: Annotated[
        bool, typer.Option(help="Also read pickles for which no hash is known; compare it with the hub's first.")
    ] = False,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Read pickles that were fetched, as tensors only, and write them as safetensors."""
    from serve_app.annotators.convert import convert

    store = WeightStore(read_config(config, data).annotator_weights)
    _each(names, everything, lambda name: str(convert(store, name, allow_unpinned=allow_unpinned) or "nothing to do"))


@app.command("verify")
def weights_verify(
    names: NamesArgument = None, everything: AllOption = False, config: ConfigOption = None, data: DataOption = None
) -> None:
    """Check the hashes that are known and load each network once."""
    from serve_app.annotators.convert import verify

    store = WeightStore(read_config(config, data).annotator_weights)
    _each(names, everything, lambda name: str(verify(store, name)))


def _each(names: list[str] | None, everything: bool, act: Callable[[str], str]) -> None:
    """Do it for every name, tell each result in one line, and end with exit status 1 if one failed."""
    wanted = tuple(WEIGHTS) if everything else tuple(names or ())
    if not wanted:
        typer.echo(f"error: name what you want, or say --all. Allowed: {', '.join(WEIGHTS)}.", err=True)
        raise typer.Exit(1)
    failed = False
    for name in wanted:
        try:
            typer.echo(f"{name}: {act(name)}")
        except ServeError as error:
            typer.echo(f"error: {name}: {error.message}", err=True)
            failed = True
    if failed:
        raise typer.Exit(1)
