"""The registry over a local folder, moto and a real S3 server: races, lost replies, readers beside writers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.published import decision, finished_run
from support.s3_server import FaultyProxy, S3Server
from tercet.artifacts.champion import Champion, history, read_champion
from tercet.artifacts.registry import Lineage, download, list_versions, promote, read_version, register, resolve, serve
from tercet.errors import ChampionMoved
from tercet.storage import Storage, open_storage


def runs(storage: Storage, number: int) -> list[Lineage]:
    return [finished_run(storage, f"r{index}") for index in range(number)]


def test_promotions_rollback_and_download(storage: Storage, tmp_path: Path) -> None:
    first, second = (
        promote(storage, "m", lineage, lambda _: decision(), "night").champion for lineage in runs(storage, 2)
    )
    assert first is not None
    assert resolve(storage, "m")[0] == second
    back = serve(storage, read_version(storage, "m", first.version), second, "rollback", "worse on mails", "me")
    assert history(storage, "m") == [back, second, first]
    with pytest.raises(ChampionMoved):
        serve(storage, read_version(storage, "m", 2), second, "by hand", "too late", "me")
    folder = download(storage, resolve(storage, "m")[1], tmp_path)
    assert (folder / "model.safetensors").read_bytes() == b"r0" * 500


def test_concurrent_publishers_get_a_number_each(storage: Storage) -> None:
    barrier = threading.Barrier(6, timeout=120)

    def publish(lineage: Lineage) -> int:
        barrier.wait()
        return register(storage, "m", lineage, "me").number

    with ThreadPoolExecutor(6) as pool:
        assert sorted(pool.map(publish, runs(storage, 6))) == [1, 2, 3, 4, 5, 6]


def test_concurrent_promotions_are_gated_against_the_champion_they_replace(storage: Storage) -> None:
    """Every candidate is better than any champion, so all become the champion, one after the other."""
    barrier, against = threading.Barrier(4, timeout=120), dict[str, list[int]]()

    def night(lineage: Lineage) -> Champion | None:
        def decide(present: Champion | None) -> object:
            if not against.setdefault(lineage.run_id, []):
                barrier.wait()
            against[lineage.run_id].append(present.generation if present else 0)
            return decision(sentence=f"{lineage.run_id} is better than {against[lineage.run_id][-1]}.")

        return promote(storage, "m", lineage, decide, lineage.run_id).champion  # type: ignore[arg-type]

    with ThreadPoolExecutor(4) as pool:
        champions = list(pool.map(night, runs(storage, 4)))
    chain = history(storage, "m")
    assert len(chain) == 4
    assert {champion.nonce for champion in champions if champion} == {champion.nonce for champion in chain}
    for champion in chain:
        assert champion.reason == f"{champion.who} is better than {champion.generation - 1}."
        assert against[champion.who][-1] == champion.generation - 1
    assert sum(map(len, against.values())) > 4, "nobody was gated again"


def test_a_reader_beside_writers_sees_whole_models(storage: Storage, tmp_path: Path) -> None:
    versions = [register(storage, "m", lineage, "me") for lineage in runs(storage, 3)]
    serve(storage, versions[0], None, "by hand", "first", "me")
    ended = threading.Event()

    def read(reader: int) -> list[int]:
        seen = []
        while not ended.is_set() or not seen:
            champion, version = resolve(storage, "m")
            folder = download(storage, version, tmp_path / str(reader) / str(len(seen)))
            assert (folder / "model.safetensors").read_bytes() == version.lineage.run_id.encode() * 500
            seen.append(champion.generation)
        return seen

    with ThreadPoolExecutor(2) as pool:
        readers = [pool.submit(read, reader) for reader in range(2)]
        try:
            for turn in range(12):
                serve(storage, versions[turn % 3], read_champion(storage, "m"), "by hand", "next", "me")
        finally:
            ended.set()
        for reader in readers:
            seen = reader.result()
            assert seen == sorted(seen), "a reader went back in time"
    assert len(history(storage, "m")) == 13


@pytest.fixture
def proxy(s3: S3Server) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(s3)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("fault", ["lose_reply", "refuse"])
def test_each_write_of_a_promotion_survives_a_lost_reply(s3: S3Server, proxy: FaultyProxy, fault: str) -> None:
    """Nine PUTs: the decision; the version and its index, three; the champion before and the new one, filed and marked,
    four; and the swap. The first promotion makes the index."""
    uri = f"{s3.new_bucket()}/p"
    direct, behind = open_storage(uri), open_storage(uri, proxy.endpoint_url)
    for number, lineage in enumerate(runs(direct, 9)):
        for _ in range(number):
            proxy.fail("PUT", "pass")
        proxy.fail("PUT", fault)
        promotion = promote(behind, "m", lineage, lambda _, n=number: decision(sentence=f"{n}"), "night")
        assert proxy.faults == []
        assert promotion.champion == read_champion(direct, "m")
    assert [champion.version for champion in history(direct, "m")] == [*range(9, 0, -1)]
    assert list_versions(direct, "m") == [*range(1, 10)]


def test_a_lost_reply_to_a_swap_and_another_swap_before_the_retry(s3: S3Server, proxy: FaultyProxy) -> None:
    """The limit of `compare_and_swap` does not affect champions: the other publisher filed this one."""
    uri = f"{s3.new_bucket()}/p"
    direct, behind = open_storage(uri), open_storage(uri, proxy.endpoint_url)
    versions = [register(direct, "m", lineage, "me") for lineage in runs(direct, 3)]
    first = serve(direct, versions[0], None, "by hand", "first", "me")
    done: list[Champion] = []

    def decide(method: str, path: str) -> str | None:
        swaps = [request for request in proxy.requests if request.startswith("PUT") and "champion.json" in request]
        if method != "PUT" or "champion.json" not in path or done:
            return None
        if len(swaps) == 1:
            return "lose_reply"
        done.append(serve(direct, versions[2], read_champion(direct, "m"), "by hand", "third", "other"))
        return None

    proxy.decide = decide
    second = serve(behind, versions[1], first, "by hand", "second", "me")
    assert done, "no retry came"
    assert history(direct, "m") == [done[0], second, first]
