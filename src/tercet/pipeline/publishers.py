"""Notify others of a new champion: an ONNX export, the Hugging Face Hub, an MLflow registry, a webhook.

The champion serves already, so a publisher that fails undoes nothing. It is tried again on the next night, even if that
night has nothing else to do.
"""

from __future__ import annotations

import json
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NamedTuple

from tercet.artifacts.champion import Champion, read_champion
from tercet.artifacts.registry import Version, download, resolve
from tercet.config.recipe import Config
from tercet.errors import ConfigError, first_line
from tercet.storage import Storage, layout
from tercet.storage.documents import Document, seal

TIMEOUT_SECONDS = 30
ALIAS = "champion"


class Notification(Document):
    """Record that a publisher was notified of a champion."""

    once_unsealed: ClassVar[bool] = True

    publisher: str
    generation: int
    where: str
    unix_seconds: float


class Announcement(NamedTuple):
    """What publishers are notified of: the champion, its version, and where its model is stored."""

    champion: Champion
    version: Version
    model_uri: str
    storage: Storage
    folder: Path
    """Working folder on this machine."""

    def model_dir(self) -> Path:
        """Download the model, verified, and return its folder."""
        return download(self.storage, self.version, self.folder / "model")

    def document(self) -> dict[str, str | int]:
        """Return the JSON body of a webhook."""
        return {
            "model": self.champion.name,
            "generation": self.champion.generation,
            "version": self.version.number,
            "kind": self.champion.kind,
            "reason": self.champion.reason,
            "run_id": self.version.lineage.run_id,
            "model_uri": self.model_uri,
        }


def notify(storage: Storage, config: Config, say: Callable[[str], None]) -> dict[str, str]:
    """Notify every publisher of the recipe that was not notified of the present champion yet.

    Returns the errors by publisher. `say` gets a line for each publisher."""
    targets = config.nightly.publish.model_dump()
    wanted = {name: targets[name] for name in PUBLISHERS if targets[name]}
    if not wanted or read_champion(storage, config.name) is None:
        return {}
    champion, version = resolve(storage, config.name)
    problems = {}
    with tempfile.TemporaryDirectory(prefix="tercet-publish-") as folder:
        announcement = Announcement(champion, version, storage.uri_of(version.commit.folder), storage, Path(folder))
        for name, target in wanted.items():
            key = layout.notification_key(config.name, name, champion.generation)
            if storage.exists(key):
                continue
            try:
                where = PUBLISHERS[name](target, announcement)
            except Exception as error:  # noqa: BLE001 - any library may fail here, and the night is over already
                problems[name] = f"{type(error).__name__}: {first_line(error)}"
                say(f"could not notify {name} {target}: {problems[name]}; the next night will try again")
                continue
            notification = Notification(
                publisher=name, generation=champion.generation, where=where, unix_seconds=time.time()
            )
            storage.put(key, seal(notification))
            say(f"notified: {name} {where}")
    return problems


def webhook(url: str, announcement: Announcement) -> str:
    """POST the announcement as JSON. Raises URLError, also for a response that is not 2xx."""
    data = json.dumps(announcement.document()).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
        return url


def huggingface(repo: str, announcement: Announcement) -> str:
    """Push the model to a repository of the Hub, which is created private if it does not exist. Needs HF_TOKEN."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=True, exist_ok=True)
    message = f"generation {announcement.champion.generation}: {announcement.champion.reason}"
    done = api.upload_folder(
        repo_id=repo, folder_path=announcement.model_dir(), commit_message=message[:200], delete_patterns="*"
    )
    return str(done.commit_url)


def mlflow(tracking_uri: str, announcement: Announcement) -> str:
    """Add a version to the registered model of the same name, and point its alias `champion` to it.

    The version's source is the model's URI in storage; no file is copied."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise ConfigError(
            "nightly.publish.mlflow needs MLflow, which is not installed", hint="pip install 'tercet[mlflow]'"
        ) from None
    client, name = MlflowClient(tracking_uri, tracking_uri), announcement.champion.name
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {key: str(value) for key, value in announcement.document().items()}
    version = client.create_model_version(
        name, announcement.model_uri, tags=tags, description=announcement.champion.reason
    )
    client.set_registered_model_alias(name, ALIAS, version.version)
    return f"{tracking_uri} {name} {version.version}"


def onnx(_: str, announcement: Announcement) -> str:
    """Export the model as an ONNX file, see onnx_export.py. Needs no target."""
    from tercet.pipeline.onnx_export import export

    return export(announcement.storage, announcement.version, announcement.model_dir(), announcement.folder / "onnx")


# In this order: a program that the webhook notifies finds everything else done.
PUBLISHERS: dict[str, Callable[[str, Announcement], str]] = {
    "onnx": onnx,
    "huggingface": huggingface,
    "mlflow": mlflow,
    "webhook": webhook,
}
