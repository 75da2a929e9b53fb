"""Starts Ray and Serve on this machine with the embedded defaults: what ``make serve`` runs.

Environment: PORT, DATA (folder for everything it writes), KEY (API key to accept), CONFIG (a YAML file). Stops all it
started on SIGINT or SIGTERM.
"""

import json
import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TypeVar

import psutil

from deployments.environment import environment
from serve_app.config import AppConfig, LaunchSettings, ReplicaConfig, launch_settings, set_environment
from serve_app.errors import ConfigError, ServeError

MAX_RAY_FOLDER = 40
"""Characters: Ray puts unix sockets 65 characters below its folder, and their path may have 107."""

SHUTDOWN_S = 4.0
CHILDREN_S = 3.0

R = TypeVar("R", bound=ReplicaConfig)

QUIET_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    # The demo takes Serve's own proxy: HAProxy listens on fixed ports of all interfaces.
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def main() -> int:
    """Returns the exit status: 0 after a requested stop, 2 when the settings are wrong, 1 when it could not start."""
    started = time.monotonic()
    try:
        settings = launch_settings()
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    if port_is_taken(settings.port):
        print(f"error: port {settings.port} of 127.0.0.1 is in use; choose another with PORT=", file=sys.stderr)
        return 2
    stop = Stop()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop.request)
    data = settings.config.data_folder
    # Keys' hashes and people's pictures lie here, and Ray opens its own folder below to everybody.
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix="ray-") as spare:
        folder = data / "ray" if len(str(data / "ray")) <= MAX_RAY_FOLDER else Path(spare)
        try:
            return run(settings, folder, stop, started)
        except ServeError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 0  # asked to stop while it was starting
        finally:
            end_children()


def end_children() -> None:
    """End what is left of the processes that this one started: Ray loses some when its start is interrupted."""
    left = psutil.Process().children(recursive=True)
    for process in left:
        process.terminate()
    _, stubborn = psutil.wait_procs(left, timeout=CHILDREN_S)
    for process in stubborn:
        process.kill()


class Stop:
    """A request to stop, by signal. While the server starts it interrupts; later it is waited for."""

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._serving = False

    def request(self, _signal: int, _frame: FrameType | None) -> None:
        """The signal handler. Only the first signal counts: the others would interrupt the cleaning up."""
        if not self._requested.is_set():
            self._requested.set()
            if not self._serving:
                raise KeyboardInterrupt

    def wait(self) -> None:
        """The server has started: wait for the request."""
        self._serving = True
        self._requested.wait()


def run(settings: LaunchSettings, ray_folder: Path, stop: Stop, started: float) -> int:
    """Serve until ``stop`` is requested, then end every process that was started here."""
    token = ray_folder / "auth_token"
    ray_folder.mkdir(parents=True, exist_ok=True)
    set_environment(QUIET_RAY | environment(1) | ray_authentication(token))
    # Ray reads its environment when it is imported.
    import ray
    from ray import serve

    from serve_app import app
    from serve_app.keys import ADMIN, GENERATE
    from serve_app.resources import open_resources

    resources = open_resources(settings.config)
    key, principal = resources.keys.create("make serve", "default", (GENERATE, ADMIN), settings.key)
    try:
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",  # what Ray tells its own processes to connect to
            _temp_dir=str(ray_folder),
        )
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": settings.port})
        gpus = int(ray.cluster_resources().get("GPU", 0))
        serve.run(app(for_this_machine(settings.config, gpus)), name="controlnet", route_prefix="/")
        print(banner(settings, key, time.monotonic() - started), flush=True)
        stop.wait()
    finally:
        print("stopping ...", flush=True)
        if settings.key is None:
            resources.keys.revoke(principal.key_id)  # it was made for this run
        resources.database.close()
        if ray.is_initialized():
            serve.shutdown()
        ray.shutdown()
    return 0


def port_is_taken(port: int) -> bool:
    """Whether another server listens there already. Ray would only say so after a minute."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def ray_authentication(token_file: Path) -> dict[str, str]:
    """Token authentication for the local Ray, with a token of its own that only this user can read."""
    import secrets

    if not token_file.exists():
        token_file.touch(mode=0o600)
        token_file.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def for_this_machine(config: AppConfig, gpus: int) -> AppConfig:
    """The configuration of a server that runs as long as its terminal.

    The engine gets all cores but one, unless the configuration says how many threads it takes, and where nothing is
    said of GPUs and there are enough, each of its replicas gets one. Ctrl-C does not wait for long jobs: the next start
    on the same data runs them again, once their leases have run out.
    """
    spare = max(1, (os.cpu_count() or 2) - 1)
    default = ReplicaConfig().threads

    def quick(replica: R) -> R:
        return replica.model_copy(update={"graceful_shutdown_timeout_s": SHUTDOWN_S})

    unsaid = not any(own.num_gpus or own.device != "auto" or own.autoscaling_config for own in config.denoisers)
    each = unsaid and sum(own.replicas for own in config.denoisers) <= gpus
    denoisers = tuple(
        quick(own).model_copy(
            update={
                "threads": spare if own.threads == default else own.threads,
                "num_gpus": 1 if each else own.num_gpus,
            }
        )
        for own in config.denoisers
    )
    return config.model_copy(
        update={
            "gateway": quick(config.gateway),
            "dispatcher": quick(config.dispatcher),
            "annotator": quick(config.annotator),
            "registry": quick(config.registry),
            "denoisers": denoisers,
        }
    )


def banner(settings: LaunchSettings, key: str, seconds: float) -> str:
    """What a newcomer needs: address, key, and a curl that works as it stands."""
    url = settings.config.public_url
    body = json.dumps(
        {
            "key": key,
            "model_id": "demo",
            "controlnet_model": "canny",
            "prompt": "a red circle on a blue ground",
            "init_image": sample_image(),
            "width": 512,
            "height": 512,
            "num_inference_steps": 20,
        }
    )
    endpoint = shlex.quote(f"{url}/api/v1/enterprise/controlnet")
    return f"""Ready in {seconds:.0f} s.
  address  {url}
  API key  {key}
Try it: the answer's "output" is the picture's address.
  curl -s {endpoint} -H 'Content-Type: application/json' -d {shlex.quote(body)}
Ctrl-C stops everything."""


def sample_image() -> str:
    """A small drawing as a data URI, so that the printed curl needs no file."""
    from base64 import b64encode
    from io import BytesIO

    from PIL import Image, ImageDraw

    picture = Image.new("1", (64, 64), 1)
    ImageDraw.Draw(picture).ellipse((14, 14, 50, 50), fill=0)
    buffer = BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(buffer.getvalue()).decode()


if __name__ == "__main__":
    sys.exit(main())
