"""Publishers and readers of a model, killed at random, on a real S3 server behind a network that loses answers.

python benchmarks/registry.py [--rounds 1000] [--seed 0]

Four processes publish: each writes a model, gates it (7 of 10 candidates are "better"), and promotes it. Four read:
each resolves the champion, downloads it and checks every byte. About every two seconds one of the eight gets SIGKILL,
wherever it is, and another takes over its work. Of all requests, 2 % are carried out without an answer and 1 % are
refused; of reads, 1 % are cut and 1 % have a bit flipped. A round is a candidate that was promoted or rejected; every
20 rounds a new model begins, so that many chains are started.

At the end, without the bad network, it counts: chains that are not a line, promotions that were acknowledged but are
not in the chain at that place, candidates that are in it twice, champions that were gated against another one than they
replaced, and reads that were torn, of another model, or older than an earlier read.
"""

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from support.published import decision, finished_run  # noqa: E402
from support.s3_server import FaultyProxy, Gateway  # noqa: E402
from tercet.artifacts.champion import Champion, history  # noqa: E402
from tercet.artifacts.decision import GateDecision  # noqa: E402
from tercet.artifacts.registry import (  # noqa: E402
    download,
    list_models,
    list_versions,
    promote,
    read_decision,
    read_version,
    resolve,
)
from tercet.errors import ChampionMoved, CorruptObject, ObjectNotFound  # noqa: E402
from tercet.storage import Storage, open_storage  # noqa: E402

ROUNDS_PER_MODEL = 20
SHARE_BETTER = 0.7
FAULTS = {
    "PUT": {"lose_reply": 0.02, "refuse": 0.01},
    "GET": {"lose_reply": 0.02, "refuse": 0.01, "cut": 0.01, "flip": 0.01},
}
SECONDS_BETWEEN_KILLS = (0.5, 3.5)
SECONDS_BETWEEN_READS = 0.3


def say(log: Path, *words: object) -> None:
    """Write one line with one call, so that a kill leaves whole lines."""
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, (" ".join(map(str, words)) + "\n").encode())
    os.close(descriptor)


def current_model(log: Path) -> str:
    """Name of the present model."""
    return log.with_name("model").read_text()


def publisher(storage: Storage, log: Path, name: str, seed: int) -> None:
    """Publish until killed."""
    rng = random.Random(seed)
    for number in range(1_000_000):
        model, run_id = current_model(log), f"{name}-{number}"

        def decide(present: Champion | None) -> GateDecision:
            better = rng.random() < SHARE_BETTER
            generation = 0 if present is None else present.generation
            return decision("promote" if better else "keep", f"{run_id} against {generation}")  # noqa: B023

        try:
            promotion = promote(storage, model, finished_run(storage, run_id), decide, run_id)
        except ChampionMoved:
            say(log, "gave-up", model, run_id)
            continue
        champion = promotion.champion
        if champion is not None and champion.who == run_id:
            say(log, "promoted", model, run_id, champion.generation)
        else:
            say(log, "kept", model, run_id)


def reader(storage: Storage, log: Path, name: str, seed: int) -> None:
    """Read until killed. Files of a killed reader stay in the folder."""
    rng, last = random.Random(seed), ("", 0)
    while True:
        model = current_model(log)
        try:
            champion, version = resolve(storage, model)
        except ObjectNotFound:  # no champion yet
            time.sleep(SECONDS_BETWEEN_READS)
            continue
        folder = download(storage, version, log.with_name(f"cache-{rng.randrange(3)}"))
        run_id = version.lineage.run_id
        whole = (folder / "model.safetensors").read_bytes() == run_id.encode() * 500
        whole &= (folder / "1_Pooling" / "config.json").read_text() == f'{{"of": "{run_id}"}}'
        older = last[0] == model and champion.generation < last[1]
        last = model, champion.generation
        say(log, "torn" if not whole else "older" if older else "read", model, name, champion.generation)
        time.sleep(SECONDS_BETWEEN_READS)


def work(
    kind: Callable[[Storage, Path, str, int], None], uri: str, endpoint: str, log: Path, name: str, seed: int
) -> None:
    """Work in a process of its own. An unexpected error is recorded, and ends it."""
    with log.with_name(f"{name}.err").open("w") as errors:
        os.dup2(errors.fileno(), 2)  # warnings of retries
    try:
        kind(open_storage(uri, endpoint), log, name, seed)
    except BaseException:  # noqa: BLE001 - it is counted
        say(log, "error", name, repr(traceback.format_exc()))


def problems(storage: Storage, lines: list[list[str]]) -> Counter[str]:
    """Counts that must be 0, from storage and from the lines of the processes."""
    kinds = ("torn", "older", "error", "broken chain", "lost", "twice", "gated against another", "numbers")
    found: Counter[str] = Counter(dict.fromkeys(kinds, 0))
    found.update(words[0] for words in lines if words[0] in found)
    for model in list_models(storage):
        try:
            chain = {champion.generation: champion for champion in history(storage, model)}
        except CorruptObject:
            found["broken chain"] += 1
            continue
        numbers = list_versions(storage, model)
        found["numbers"] += numbers != list(range(1, len(numbers) + 1))
        found["twice"] += len(chain) - len(
            {read_version(storage, model, champion.version).lineage.run_id for champion in chain.values()}
        )
        for generation, champion in chain.items():
            expected = f"{champion.who} against {generation - 1}"
            assert champion.decision is not None
            sentences = {champion.reason, read_decision(storage, champion.decision).sentence}
            found["gated against another"] += sentences != {expected}
        for words in lines:
            if words[:2] == ["promoted", model]:
                place = chain.get(int(words[3]))
                found["lost"] += place is None or place.who != words[2]
    return found


def main() -> None:
    """Print the figures of one run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, network = random.Random(arguments.seed), random.Random(arguments.seed + 1)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tercet.artifacts.registry", "tercet.storage.s3", "s3fs", "support.published"])
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        gateway = Gateway(folder / "rgw")
        server = gateway.start(die_with_parent=True)
        os.environ |= {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
        os.environ |= {
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        proxy, faults = FaultyProxy(server), Counter[str]()

        def decide(method: str, path: str) -> str | None:  # noqa: ARG001
            kinds = FAULTS.get(method, {})
            fault = network.choices([*kinds, None], [*kinds.values(), 1 - sum(kinds.values())])[0]
            faults[fault or "none"] += 1
            return fault

        proxy.decide = decide
        uri = server.new_bucket() + "/p"
        storage = open_storage(uri, server.endpoint_url)
        log = folder / "log"
        log.touch()

        def start(slot: int, incarnation: int) -> BaseProcess:
            kind = publisher if slot < 4 else reader
            seed = rng.randrange(2**32)
            place = folder / f"slot-{slot}"
            place.mkdir(exist_ok=True)
            process = processes.Process(
                target=work, args=(kind, uri, proxy.endpoint_url, log, f"p{slot}-{incarnation}", seed)
            )
            process.start()
            return process

        log.with_name("model").write_text("model-0")
        started, num_kills = time.monotonic(), 0
        workers = [start(slot, 0) for slot in range(8)]
        try:
            next_kill, num_rounds = time.monotonic() + 5, 0
            while num_rounds < arguments.rounds:
                time.sleep(0.1)
                num_rounds = sum(
                    line.startswith(("promoted ", "kept ", "gave-up ")) for line in log.read_text().splitlines()
                )
                model = f"model-{num_rounds // ROUNDS_PER_MODEL}"
                if model != current_model(log):
                    staged = log.with_name("next")
                    staged.write_text(model)
                    staged.rename(log.with_name("model"))
                for slot, worker in enumerate(workers):
                    if not worker.is_alive():  # it recorded an error
                        workers[slot] = start(slot, 1_000_000 + num_kills)
                if time.monotonic() > next_kill:
                    slot = rng.randrange(8)
                    os.kill(workers[slot].pid or 0, signal.SIGKILL)
                    workers[slot].join()
                    num_kills += 1
                    workers[slot] = start(slot, num_kills)
                    next_kill = time.monotonic() + rng.uniform(*SECONDS_BETWEEN_KILLS)
        finally:
            for worker in workers:
                worker.kill()
                worker.join()
        seconds = time.monotonic() - started
        proxy.close()
        lines = [line.split(" ", 4) for line in log.read_text().splitlines()]
        said = Counter(words[0] for words in lines)
        print(
            f"{said['promoted']} promotions acknowledged, {said['kept']} candidates kept out, {said['gave-up']} gave up"
        )
        print(f"{len(list_models(storage))} chains; {said['read']} reads; {num_kills} SIGKILLs; {dict(faults)}")
        print("must be 0:", dict(problems(storage, lines)))
        for words in lines:
            if words[0] == "error":
                print(" ".join(words)[-300:])
        print(f"seed {arguments.seed}, {seconds:.0f} s")
        gateway.stop()


if __name__ == "__main__":
    main()
