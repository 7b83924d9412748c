"""A script of this folder that runs in a process of its own, against a Hub on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path


HERE = Path(__file__).parent


def run_script(hub, name, *arguments, home, token=None, **variables):
    """
    Runs a script of this folder in a fresh process, which reads HF_ENDPOINT when it imports huggingface_hub.

    Args:
        hub: A `LoopbackHub`.
        name: Of the script.
        arguments: Its arguments, the last of which is the folder that it works in.
        home: Folder for the cache of the Hub.
        token: Of the Hub.
        variables: Further ones of the environment.

    Returns:
        What it left in `report.json`.
    """
    dropped = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
    environment = {key: value for key, value in os.environ.items() if key not in dropped}
    environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent))),
    }
    environment |= variables
    if token is not None:
        environment["HF_TOKEN"] = token
    result = subprocess.run(
        [sys.executable, str(HERE / name), *map(str, arguments)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-6000:]
    return json.loads(Path(arguments[-1], "report.json").read_text())
