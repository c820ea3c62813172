"""Ask Ray's autoscaler whether the cluster can grow.

Ray 2.60 has no public way: docs/decisions/0017-private-names.md."""

from __future__ import annotations

import functools
import json
import re
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

# An autoscaler looks at the cluster every 5 s, and starts a few seconds after its head.
ANSWER_SECONDS = 30.0
POLL_SECONDS = 0.5
_RPC_SECONDS = 10.0

# Without an autoscaler's configuration, Ray's monitor only watches, and names the type of each node after its ID.
_STATUS_KEY = b"__autoscaling_status"
_WATCHED_NODE = re.compile(r"node_[0-9a-f]{56}")


@functools.cache
def can_have(address: str, count: int, cpus: float, gpus: float) -> bool | None:
    """Return whether the cluster can have room for `count` workers, if nothing else ran on it; None if no autoscaler
    answers. The autoscaler begins to start the machines that are missing.

    address: of the head, host:port. cpus, gpus: of each worker. The answer is cached, so that all stages of a night
    get the same one. It takes one or two of the autoscaler's rounds of 5 s, or ANSWER_SECONDS where machines that are
    not there yet may still join."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    try:
        return _ask(GcsClient(address=address), {"CPU": cpus, "GPU": gpus}, count)
    except Exception:  # noqa: BLE001 - whatever a private interface raises, the answer is not known
        return None


def _ask(client: Any, bundle: dict[str, float], count: int) -> bool | None:
    """Set the request of `ray.autoscaler.sdk.request_resources`, wait for the answer, and put the one before back.

    The autoscaler answers it for the whole cluster, whatever runs there at the moment."""
    before = [
        (dict(request.request.resources_bundle), request.count)
        for constraint in _status(client).cluster_resource_state.cluster_resource_constraints
        for request in constraint.resource_requests
    ]
    _request(client, [*before, (bundle, count)])
    try:
        since = _status(client).cluster_resource_state.cluster_resource_state_version
        ends_at, answer = time.monotonic() + ANSWER_SECONDS, None
        while answer is not True and time.monotonic() < ends_at:
            time.sleep(POLL_SECONDS)
            state = _status(client).autoscaling_state
            if state.last_seen_cluster_resource_state_version >= since:
                answer = not state.infeasible_cluster_resource_constraints
            elif _only_watches(client):
                answer = False
            if answer is False and _total(client, "GPU") >= count * bundle["GPU"]:
                answer = True  # machines have joined meanwhile
        return answer
    finally:
        _request(client, before)


def _status(client: Any) -> GetClusterStatusReply:
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    return GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=_RPC_SECONDS))


def _total(client: Any, resource: str) -> float:
    nodes = _status(client).cluster_resource_state.node_states
    return float(sum(node.total_resources.get(resource, 0.0) for node in nodes))


def _request(client: Any, requests: list[tuple[dict[str, float], int]]) -> None:
    bundles = [bundle for bundle, _ in requests]
    counts = [count for _, count in requests]
    client.request_cluster_resource_constraint(bundles, [{} for _ in bundles], counts, timeout_s=_RPC_SECONDS)


def _only_watches(client: Any) -> bool:
    """Return whether the cluster has Ray's older monitor without anything to scale: nodes join by hand only."""
    text = client.internal_kv_get(_STATUS_KEY, None, timeout=_RPC_SECONDS)
    report = json.loads(text).get("autoscaler_report") if text else None
    types = {*report["active_nodes"], *(report["idle_nodes"] or {})} if report else set()
    return bool(types) and all(_WATCHED_NODE.fullmatch(name) for name in types)
