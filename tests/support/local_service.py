"""The whole service in one process of its own: ``python -m support.local_service DATA MODELS PORT KEY``.

Prints ``ready`` when it can be asked, serves until its standard input ends. Is the last line there ``import``, it says
what importing controlnet_aux comes to in that process.
"""

import asyncio
import sys
from pathlib import Path

import uvicorn

from serve_app.config import AppConfig
from serve_app.local import local_server


async def serve(data: Path, models: Path, port: int, key: str) -> str:
    """Returns what came by standard input."""
    tree = {"data": data, "models_folder": models, "server": {"public_url": f"http://127.0.0.1:{port}"}}
    async with local_server(AppConfig.model_validate(tree)) as running:
        running.resources.keys.create("tests", "default", ["generate"], key)
        server = uvicorn.Server(uvicorn.Config(running.application, port=port, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  - uvicorn sets a flag
            await asyncio.sleep(0.01)
        print("ready", flush=True)  # noqa: T201  - to whoever started this
        last: str = await asyncio.to_thread(sys.stdin.read)
        server.should_exit = True
        await serving
    return last


def main() -> None:
    data, models, port, key = sys.argv[1:]
    if asyncio.run(serve(Path(data), Path(models), int(port), key)) != "import":
        return
    try:
        import controlnet_aux  # noqa: F401  - what it does at import is the question
    except Exception as error:  # noqa: BLE001  - whatever it is
        print(f"{type(error).__name__}: {error}")  # noqa: T201
    else:
        print("imported")  # noqa: T201


if __name__ == "__main__":
    main()
