"""Each publisher is notified of a champion once, and again after a failure."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from support import builders
from support.published import finished_run
from tercet.artifacts.registry import register, serve
from tercet.pipeline import publishers
from tercet.pipeline.publishers import notify
from tercet.storage import Storage, open_storage


class Listener(BaseHTTPRequestHandler):
    """Answers with `code`, and keeps the bodies of requests."""

    code: ClassVar[int] = 200
    got: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).got.append(json.loads(body))
        self.send_response(type(self).code)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    Listener.code, Listener.got = 200, []
    server = HTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hook"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path / "store"))


def crown(storage: Storage, run_id: str, before: Any = None) -> Any:
    version = register(storage, "made", finished_run(storage, run_id), "me")
    return serve(storage, version, before, "by hand", "it is better", "me")


def config(**publish: str) -> Any:
    return builders.config(nightly={"publish": publish})


def test_a_webhook_is_notified_of_each_champion_once(storage: Storage, url: str) -> None:
    said: list[str] = []
    assert notify(storage, config(webhook=url), said.append) == {}
    assert Listener.got == []  # there is no champion yet
    first = crown(storage, "a")
    for _ in range(2):
        assert notify(storage, config(webhook=url), said.append) == {}
    [news] = Listener.got
    assert news == {
        "model": "made",
        "generation": 1,
        "version": 1,
        "kind": "by hand",
        "reason": "it is better",
        "run_id": "a",
        "model_uri": storage.uri_of("runs/a/best"),
    }
    crown(storage, "b", first)
    notify(storage, config(webhook=url), said.append)
    assert [news["generation"] for news in Listener.got] == [1, 2]
    assert said == [f"notified: webhook {url}"] * 2


def test_a_failure_is_reported_and_tried_again(storage: Storage, url: str) -> None:
    crown(storage, "a")
    said: list[str] = []
    Listener.code = 503
    assert notify(storage, config(webhook=url), said.append) == {
        "webhook": "HTTPError: HTTP Error 503: Service Unavailable"
    }
    assert said[0].endswith("the next night will try again")
    Listener.code = 200
    assert notify(storage, config(webhook=url), said.append) == {}
    assert len(Listener.got) == 2
    assert notify(storage, config(webhook="http://127.0.0.1:1/none"), said.append) == {}  # notified already


def test_a_failing_publisher_does_not_stop_the_others(
    storage: Storage, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str, __: Any) -> str:
        raise RuntimeError("no quota\nand more")

    monkeypatch.setitem(publishers.PUBLISHERS, "huggingface", broken)
    crown(storage, "a")
    problems = notify(storage, config(huggingface="me/it", webhook=url), lambda _: None)
    assert problems == {"huggingface": "RuntimeError: no quota"}
    assert len(Listener.got) == 1


def test_the_whole_model_is_pushed(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested up to the calls of the Hub's client, which nothing here can answer."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo: str, **options: Any) -> None:
            calls.append((repo, options))

        def upload_folder(self, **options: Any) -> Any:
            files = sorted(path.name for path in Path(options["folder_path"]).rglob("*") if path.is_file())
            calls.append(("files", {"names": files, "message": options["commit_message"]}))
            return type("Done", (), {"commit_url": "https://hub/me/it/commit/1"})

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    crown(storage, "a")
    said: list[str] = []
    assert notify(storage, config(huggingface="me/it"), said.append) == {}
    assert calls[0] == ("me/it", {"private": True, "exist_ok": True})
    assert calls[1][1] == {"names": ["config.json", "model.safetensors"], "message": "generation 1: it is better"}
    assert said == ["notified: huggingface https://hub/me/it/commit/1"]


def test_mlflow_alias_points_to_the_champion(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a folder, with MLflow itself if it is installed (pip install mlflow-skinny)."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (tmp_path / "mlflow").as_uri()
    first = crown(storage, "a")
    assert notify(storage, config(mlflow=uri), lambda _: None) == {}
    crown(storage, "b", first)
    assert notify(storage, config(mlflow=uri), lambda _: None) == {}
    version = mlflow.MlflowClient(uri, uri).get_model_version_by_alias("made", "champion")
    assert (str(version.version), version.source) == ("2", storage.uri_of("runs/b/best"))
    assert version.tags["generation"] == "2"
