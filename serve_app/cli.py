"""controlnet-serve: keys, models, weights, jobs, configuration, migrations, and one picture without a server."""

import asyncio
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from serve_app import cli_weights
from serve_app.cli_options import ConfigOption, DataOption, read_config
from serve_app.config import AppConfig, ModelSource
from serve_app.errors import ServeError
from serve_app.resources import Resources, open_resources

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
keys_app = typer.Typer(help="API keys.", no_args_is_help=True)
models_app = typer.Typer(help="The model catalogue.", no_args_is_help=True)
jobs_app = typer.Typer(help="Jobs.", no_args_is_help=True)
config_app = typer.Typer(help="The configuration.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(models_app, name="models")
app.add_typer(jobs_app, name="jobs")
app.add_typer(config_app, name="config")
app.add_typer(cli_weights.app, name="weights")


def main() -> None:
    """Run the command line; errors that a user can mend become one line on standard error and exit status 1."""
    try:
        app()
    except ServeError as error:
        print(f"error: {error.message}", file=sys.stderr)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        print(f"error: {'; '.join(problems)}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
    else:
        return
    sys.exit(1)


@contextmanager
def _resources(config: Path | None, data: Path | None) -> Iterator[Resources]:
    resources = open_resources(read_config(config, data))
    try:
        yield resources
    finally:
        resources.database.close()


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="What the key is for.")] = "cli",
    tenant: Annotated[str, typer.Option(help="Who owns the jobs made with it.")] = "default",
    scope: Annotated[list[str] | None, typer.Option(help="generate, admin; may be repeated.")] = None,
    key: Annotated[str | None, typer.Option(help="Accept this key instead of making one.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Make a key and print it, for the only time."""
    with _resources(config, data) as resources:
        plain, _ = resources.keys.create(name, tenant, scope or ["generate"], key)
    print(plain)


@keys_app.command("list")
def keys_list(config: ConfigOption = None, data: DataOption = None) -> None:
    """List keys: id, tenant, scopes, name, state. The keys themselves are not stored."""
    with _resources(config, data) as resources:
        for record in resources.keys.list():
            state = "revoked" if record.revoked_at is not None else "active"
            print(f"{record.id}  {record.tenant}  {','.join(sorted(record.scopes))}  {record.name}  {state}")


@keys_app.command("revoke")
def keys_revoke(key_id: str, config: ConfigOption = None, data: DataOption = None) -> None:
    """Revoke the key with this id."""
    with _resources(config, data) as resources:
        if not resources.keys.revoke(key_id):
            print(f"error: there is no active key {key_id}", file=sys.stderr)
            raise typer.Exit(1)


@models_app.command("add")
def models_add(
    name: Annotated[str, typer.Argument(help="Id under which clients name the model.")],
    path: Annotated[Path, typer.Argument(help="Folder in diffusers layout, or a repository folder of a HF hub cache.")],
    family: Annotated[str | None, typer.Option(help="Base family; default: read from the model.")] = None,
    control_type: Annotated[str | None, typer.Option(help="Built-in id a ControlNet answers to, e.g. canny.")] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Verify, hash and publish a model; a running server offers it at once."""
    from serve_app.models.publish import publish

    source = ModelSource(id=name, path=path, family=family, control_type=control_type)
    with _resources(config, data) as resources:
        entry = publish(resources.catalog, source)
    print(f"{entry.id}  {entry.type}  {entry.family}  {entry.hash[:12]}  {entry.size_bytes} bytes")


@models_app.command("list")
def models_list(config: ConfigOption = None, data: DataOption = None) -> None:
    """List published models: id, type, family, control type, hash, folder."""
    with _resources(config, data) as resources:
        for entry in resources.catalog.list():
            facts = (entry.id, entry.type, entry.family, entry.control_type or "-", entry.hash[:12], entry.location)
            print("  ".join(facts))


@models_app.command("remove")
def models_remove(name: str, config: ConfigOption = None, data: DataOption = None) -> None:
    """Take a model out of the catalogue; its files stay."""
    with _resources(config, data) as resources:
        resources.catalog.get(name)
        resources.catalog.delete(name)


@jobs_app.command("show")
def jobs_show(job_id: int, config: ConfigOption = None, data: DataOption = None) -> None:
    """Print a job's record as JSON."""
    with _resources(config, data) as resources:
        job = resources.jobs.get(job_id)
        if job is None:
            print(f"error: there is no job {job_id}", file=sys.stderr)
            raise typer.Exit(1)
        print(job.model_dump_json(indent=2))


@config_app.command("check")
def config_check(config: ConfigOption = None, data: DataOption = None) -> None:
    """Check a configuration file and print the effective tree as JSON; it holds no secrets."""
    print(json.dumps(read_config(config, data).model_dump(mode="json"), indent=2))


@app.command()
def migrate(config: ConfigOption = None, data: DataOption = None) -> None:
    """Bring the database schema up to date."""
    with _resources(config, data):
        print("the database is up to date")


@app.command()
def generate(
    image: Annotated[Path, typer.Argument(help="PNG, JPEG or WebP to take the control map from.", exists=True)],
    output: Annotated[Path, typer.Argument(help="Where to write the PNG.")],
    prompt: Annotated[str, typer.Option()] = "",
    model: Annotated[str, typer.Option(help="Base model id.")] = "demo",
    control: Annotated[str, typer.Option(help="controlnet_model: one id or a comma list.")] = "canny",
    steps: Annotated[int, typer.Option(min=1, max=50)] = 20,
    seed: Annotated[int | None, typer.Option()] = None,
    config: ConfigOption = None,
    data: DataOption = None,
) -> None:
    """Draw one picture in this process, through the same API and job story as the server, without Ray."""
    from base64 import b64encode

    body = {
        "model_id": model,
        "controlnet_model": control,
        "prompt": prompt,
        "guess_mode": "no" if prompt else "yes",
        "init_image": b64encode(image.read_bytes()).decode(),
        "num_inference_steps": steps,
        "seed": seed,
    }
    output.write_bytes(asyncio.run(_generate(read_config(config, data), body)))
    print(output)


async def _generate(config: AppConfig, body: dict[str, str | int | None]) -> bytes:
    """Submit to an in-process server and return the PNG. Raises ServeError with the server's message."""
    import httpx2

    from serve_app.local import local_server

    async with (
        local_server(config) as server,
        httpx2.AsyncClient(transport=httpx2.ASGITransport(server.application), base_url=config.public_url) as client,
    ):
        key, principal = server.resources.keys.create("cli", "default", ["generate"])
        answer = (await client.post("/api/v1/enterprise/controlnet", json=body | {"key": key}, timeout=None)).json()
        while answer["status"] == "processing":
            await asyncio.sleep(0.2)
            answer = (await client.post(answer["fetch_result"], json={"key": key})).json()
        server.resources.keys.revoke(principal.key_id)
        if answer["status"] != "success":
            raise ServeError(json.dumps(answer["message"]))
        return (await client.get(answer["output"][0])).content
