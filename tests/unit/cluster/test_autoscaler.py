"""Questions to Ray's autoscaler, with a client that plays it. tests/faults/test_autoscaler.py asks a real one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, GetClusterStatusReply

from tercet.cluster import autoscaler
from tercet.cluster.autoscaler import _ask, can_have

BUNDLE = {"CPU": 1.0, "GPU": 1.0}
NODE = "node_" + "f" * 56


class Head:
    """A head with an autoscaler, which sees a request after `delay` looks and can have `most` GPUs."""

    def __init__(self, most: int = 0, delay: int = 2, silent: bool = False, joins_at: int | None = None) -> None:
        self.most, self.delay, self.silent, self.joins_at = most, delay, silent, joins_at
        self.requests: list[tuple[dict[str, float], int]] = []
        self.version, self.num_looks, self.since = 7, 0, 0
        self.report: dict[str, Any] | None = None

    def request_cluster_resource_constraint(
        self, bundles: list[dict[str, float]], selectors: list[dict[str, str]], counts: list[int], timeout_s: float
    ) -> None:
        assert len(bundles) == len(selectors) == len(counts)
        assert timeout_s > 0
        self.requests, self.since = list(zip(bundles, counts, strict=True)), self.num_looks
        self.version += 1

    def get_cluster_status(self, timeout_s: float) -> bytes:  # noqa: ARG002
        self.num_looks += 1
        reply = GetClusterStatusReply()
        reply.cluster_resource_state.cluster_resource_state_version = self.version
        if self.joins_at is not None and self.num_looks >= self.joins_at:
            reply.cluster_resource_state.node_states.add().total_resources["GPU"] = 8
        constraint = ClusterResourceConstraint()
        for bundle, count in self.requests:
            request = constraint.resource_requests.add(count=count)
            request.request.resources_bundle.update(bundle)
        if self.requests:
            reply.cluster_resource_state.cluster_resource_constraints.append(constraint)
        if not self.silent and self.num_looks - self.since > self.delay:
            reply.autoscaling_state.last_seen_cluster_resource_state_version = self.version
            if sum(bundle["GPU"] * count for bundle, count in self.requests) > self.most:
                reply.autoscaling_state.infeasible_cluster_resource_constraints.append(constraint)
        return reply.SerializeToString()

    def internal_kv_get(self, key: bytes, namespace: None, timeout: float) -> bytes | None:
        assert key == b"__autoscaling_status"
        assert namespace is None
        assert timeout > 0
        return None if self.report is None else json.dumps(self.report).encode()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoscaler, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(autoscaler, "ANSWER_SECONDS", 0.1)


@pytest.mark.parametrize(
    ("head", "answer"),
    [
        (Head(most=4), True),
        (Head(most=3), False),
        (Head(silent=True), None),
        (Head(most=0, joins_at=6), True),
        (Head(most=4, delay=9), True),
    ],
)
def test_the_answer_is_the_one_to_this_question(head: Head, answer: bool | None) -> None:
    assert _ask(head, BUNDLE, 4) is answer
    assert head.requests == []


def test_requests_of_others_are_kept() -> None:
    head = Head(most=5)
    head.requests = [({"GPU": 2.0}, 1)]
    assert _ask(head, BUNDLE, 3) is True
    assert head.requests == [({"GPU": 2.0}, 1)]
    assert _ask(head, BUNDLE, 4) is False  # beside the other's


@pytest.mark.parametrize(
    ("report", "answer"),
    [
        ({"active_nodes": {NODE: 1}, "idle_nodes": None}, False),
        ({"active_nodes": {}, "idle_nodes": {NODE: 2}}, False),
        ({"active_nodes": {"head": 1}, "idle_nodes": None}, None),  # the older autoscaler answers no questions
        ({"active_nodes": {}, "idle_nodes": None}, None),
        (None, None),
    ],
)
def test_a_cluster_that_nothing_scales(report: dict[str, Any] | None, answer: bool | None) -> None:
    head = Head(silent=True)
    head.report = {"autoscaler_report": report} if report else {}
    assert _ask(head, BUNDLE, 1) is answer


def test_an_interface_that_has_changed_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray._raylet.GcsClient", lambda **_: object())
    can_have.cache_clear()
    assert can_have("10.0.0.1:6379", 1, 1, 1) is None
    can_have.cache_clear()
