"""After the pointer moved: an ONNX export, and others are told: a webhook, the Hugging Face Hub, an MLflow registry.

Each may fail without undoing anything. What failed is tried again on the next night, also on one with nothing to do.
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
    """One publisher knows of one champion."""

    once_unsealed: ClassVar[bool] = True

    publisher: str
    generation: int
    where: str
    unix_seconds: float


class Announcement(NamedTuple):
    """What is told: the champion, its version, and where its model lies."""

    champion: Champion
    version: Version
    model_uri: str
    storage: Storage
    folder: Path
    """To work in."""

    def model_dir(self) -> Path:
        """The model on this machine, verified."""
        return download(self.storage, self.version, self.folder / "model")

    def document(self) -> dict[str, str | int]:
        """For a program that listens."""
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
    """Tell every publisher of the recipe that does not know of the present champion. What went wrong, by publisher."""
    targets = config.nightly.publish.model_dump()
    wanted = {name: targets[name] for name in PUBLISHERS if targets[name]}
    if not wanted or read_champion(storage, config.name) is None:
        return {}
    champion, version = resolve(storage, config.name)
    problems = {}
    with tempfile.TemporaryDirectory(prefix="tercet-publish-") as folder:
        news = Announcement(champion, version, storage.uri_of(version.commit.folder), storage, Path(folder))
        for name, target in wanted.items():
            key = layout.notification_key(config.name, name, champion.generation)
            if storage.exists(key):
                continue
            try:
                where = PUBLISHERS[name](target, news)
            except Exception as error:  # noqa: BLE001 - of whatever library: the night is over, and stands
                problems[name] = f"{type(error).__name__}: {first_line(error)}"
                say(f"not told: {name} {target}: {problems[name]}; the next night tries again")
                continue
            told = Notification(publisher=name, generation=champion.generation, where=where, unix_seconds=time.time())
            storage.put(key, seal(told))
            say(f"told: {name} {where}")
    return problems


def webhook(url: str, news: Announcement) -> str:
    """POST the news as JSON. Raises URLError, also for an answer that is not 2xx."""
    data = json.dumps(news.document()).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method="POST")
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
        return url


def huggingface(repo: str, news: Announcement) -> str:
    """Push the model to a repository of the Hub; where there is none, a private one is made. HF_TOKEN has the token."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, private=True, exist_ok=True)
    message = f"generation {news.champion.generation}: {news.champion.reason}"
    done = api.upload_folder(
        repo_id=repo, folder_path=news.model_dir(), commit_message=message[:200], delete_patterns="*"
    )
    return str(done.commit_url)


def mlflow(tracking_uri: str, news: Announcement) -> str:
    """A version of the registered model of the same name, which the alias `champion` then names. Its source is where
    the model lies in storage; no file is copied."""
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise ConfigError("nightly.publish.mlflow needs MLflow", hint="pip install 'tercet[mlflow]'") from None
    client, name = MlflowClient(tracking_uri, tracking_uri), news.champion.name
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {key: str(value) for key, value in news.document().items()}
    version = client.create_model_version(name, news.model_uri, tags=tags, description=news.champion.reason)
    client.set_registered_model_alias(name, ALIAS, version.version)
    return f"{tracking_uri} {name} {version.version}"


def onnx(_: str, news: Announcement) -> str:
    """See onnx_export.py."""
    from tercet.pipeline.onnx_export import export

    return export(news.storage, news.version, news.model_dir(), news.folder / "onnx")


# Told in this order: whoever listens to the webhook finds the rest.
PUBLISHERS: dict[str, Callable[[str, Announcement], str]] = {
    "onnx": onnx,
    "huggingface": huggingface,
    "mlflow": mlflow,
    "webhook": webhook,
}
