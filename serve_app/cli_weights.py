"""controlnet-serve weights: get the annotators' weights onto this machine in the form that services read."""

from collections.abc import Callable, Iterable, Sequence
from textwrap import shorten
from typing import Annotated

import typer

from serve_app.annotators import ANNOTATORS, readiness
from serve_app.annotators.weights import NETWORKS, WEIGHTS, Missing, WeightStore, package_problem
from serve_app.cli_options import ConfigOption, DataOption, read_config
from serve_app.errors import ServeError

_LONGEST = 1000
"""Characters of an error's line; libraries list every tensor of a damaged file."""

app = typer.Typer(help="Weights of the annotators.", no_args_is_help=True)

NamesArgument = Annotated[list[str] | None, typer.Argument(help=f"Any of: {', '.join(WEIGHTS)}.")]
AllOption = Annotated[bool, typer.Option("--all", help="All of them.")]
MirrorOption = Annotated[
    str | None,
    typer.Option(
        envvar="CONTROLNET_SERVE_WEIGHTS_MIRROR",
        help="s3://bucket/prefix with a copy of a weights folder (prefix/owner/name/file), asked instead of the places "
        "where weights are published. Credentials, region and endpoint are boto3's own settings.",
    ),
]


@app.command("list")
def weights_list(config: ConfigOption = None, data: DataOption = None) -> None:
    """List weights and the annotators they enable, then the annotators that can't run yet, and what to run for them.

    STATE: ready; unreadable (this user may not read a file); to convert (a pickle is there: weights convert);
    incomplete (a file beside them lacks); missing.
    SHA-256: whether weights verify has a published hash to compare with.
    """
    store = WeightStore(read_config(config, data).annotator_weights)
    rows = [("NAME", "STATE", "ANNOTATORS", "LICENCE", "SHA-256", "PUBLISHED AS")]
    for name, row in store.table.items():
        known = "known" if row.sha256 or row.pickle_sha256 else "unknown"
        revision = f" @ {row.revision[:12]}" if row.revision else ""
        where = row.url or f"{row.label}{revision}"
        rows.append((name, store.state(name), ", ".join(_enabled(name)), row.licence, known, where))
    for line in _aligned(rows):
        typer.echo(line)
    unavailable = [name for name, state in readiness(store).items() if isinstance(state, Missing)]
    if unavailable:
        typer.echo(f"\nNot available yet: {', '.join(unavailable)}")
    for verb, states in (("fetch", {"missing", "incomplete"}), ("convert", {"to convert"})):
        names = [name for name in store.table if store.state(name) in states]
        if names:
            typer.echo(f"run: controlnet-serve weights {verb} {' '.join(names)}")
    for problem in filter(None, map(package_problem, NETWORKS)):
        typer.echo(problem)


@app.command("fetch")
def weights_fetch(
    names: NamesArgument = None,
    everything: AllOption = False,
    mirror: MirrorOption = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Download weights at their pinned revision and check their hash. Mind the licences: see ``weights list``."""
    from serve_app.annotators.fetch import fetch
    from serve_app.annotators.mirror import Mirror

    loaded = read_config(config, data)
    store = WeightStore(loaded.annotator_weights)
    opened = Mirror.open(mirror, loaded.fetch) if mirror else None

    def get(name: str) -> str:
        path = opened.fetch(store, name) if opened else fetch(store, name, loaded.fetch)
        served = store.served(name)
        then = f"; services read {served}" if served not in {path, None} else ""
        if store.state(name) == "to convert":
            then = f"; run: controlnet-serve weights convert {name}"
        return f"{path} ({store.row(name).licence}){then}"

    _each(names, everything, get)


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

    def check(name: str) -> str:
        found = verify(store, name)
        return f"{found.path}" if found.compared else f"{found.path} (it loads; {found.uncompared})"

    _each(names, everything, check)


def _enabled(weights: str) -> list[str]:
    """The annotators that need these weights."""
    networks = {name for name, row in NETWORKS.items() if row.weights == weights}
    return [name for name, row in ANNOTATORS.items() if networks & set(row.networks)]


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """One line a row, two blanks between the columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _each(names: list[str] | None, everything: bool, act: Callable[[str], str]) -> None:
    """Do it for every name, tell each result in one line, and end with exit status 1 if one failed."""
    wanted = tuple(WEIGHTS) if everything else tuple(names or ())
    if not wanted:
        typer.echo(f"error: name what you want, or say --all. Allowed: {', '.join(WEIGHTS)}.", err=True)
        raise typer.Exit(1)
    failed = False
    for name in wanted:
        try:
            result = act(name)
        except (ServeError, OSError) as error:
            message = error.message if isinstance(error, ServeError) else str(error)
            typer.echo(shorten(f"error: {name}: {message}", _LONGEST, placeholder=" ..."), err=True)
            failed = True
        else:  # outside: a terminal that is gone is no fault of the file
            typer.echo(f"{name}: {result}")
    if failed:
        raise typer.Exit(1)
