"""Fields that were renamed in code keep their names in storage: documents of earlier versions are read and written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tercet.artifacts.decision import BASE_MODEL, CANDIDATE, GateDecision, Origin, Role
from tercet.config.sections import GateConfig
from tercet.evaluation.gate import decide
from tercet.evaluation.measurement import Measurement
from tercet.evaluation.paired import Paired
from tercet.storage.documents import seal, unseal

DECISION = (
    '{"verdict":"undecided","reasons":["too_few_groups"],"sentence":"Too few.","against":"base model",'
    '"metric":"ndcg@10","estimate":{"metric":"ndcg@10","num_rows":5,"num_groups":4,"num_different_groups":3,'
    '"num_better":2,"num_worse":2,"champion":0.5,"candidate":0.55,"effect":0.05,"lower":null,"upper":null,'
    '"confidence":0.99},"p_better":0.5,"mcnemar_p":null,"minimum_detectable_effect":2.26398332573635,"others":[],'
    '"out_of_domain":[],"slices":[{"name":"ndcg@10/de","estimate":{"metric":"ndcg@10","num_rows":3,"num_groups":3,'
    '"num_different_groups":2,"num_better":1,"num_worse":1,"champion":0.5,"candidate":0.75,"effect":0.25,'
    '"lower":null,"upper":null,"confidence":0.95},"max_loss":0.05,"p_not_worse":0.39,"p_worse":0.764,"alpha":0.05,'
    '"state":"undecided"}],"origin":{"weights_sha256":"ab","other_weights_sha256":"cd","num_leaked_rows":0,'
    '"learned_nothing":false,"num_non_finite_weights":0},"results_sha256":{"ndcg@10":'
    '"dd2b452f5566f815177efa0eacf0b48541ea1df88835763b959b45ec93ca5d6c"},"config":{"alpha":0.01,'
    '"minimum_effect":0.005,"guard_alpha":0.05,"max_loss":0.02,"max_loss_out_of_domain":0.02,'
    '"max_loss_in_slice":0.05,"min_groups":50,"slices":{},"out_of_domain":[],"num_resamples":999,"seed":0}}'
)

MEASURED = b"""{"sha256": "95bec7bd15d59165533fc2076e55053c4d57dbed02e04ae705570e74eeef9b33",
 "request": {
  "who": "champion-3",
  "commit": {
   "step": 8,
   "epoch": 1.0,
   "lineage": [
    {
     "name": "a",
     "generation": 1,
     "first_step": 0,
     "world_size": 1
    }
   ],
   "folder": "runs/r/best",
   "metrics": {},
   "files": {
    "model.safetensors": {
     "sha256": "ab",
     "num_bytes": 3
    }
   }
  },
  "out_of_domain": {
   "far": "v"
  }
 },
 "files": {},
 "num_corpus_texts": 2,
 "seconds_per_text": 0.5,
 "num_non_finite_weights": 0,
 "num_leaked_rows": 1
}
"""


def test_a_decision() -> None:
    decision = GateDecision.model_validate_json(DECISION)
    assert json.loads(decision.model_dump_json()) == {"format": 1, **json.loads(DECISION)}
    assert decision.reference == "base model"
    assert decision.estimate is not None
    assert decision.estimate.reference == 0.5
    assert decision.origin.reference_weights_sha256 == "cd"


def test_the_same_results_give_the_same_decision() -> None:
    """The hash of what was compared too."""
    reference, candidate = np.array([0, 0, 1, 1, 0.5]), np.array([1, 0.5, 1, 0, 0.25])
    paired = Paired.of("ndcg@10", reference, candidate, ["a", "a", "b", "c", "d"], {"de": [1, 0, 1, 0, 1]})
    origin = Origin(weights_sha256="ab", reference_weights_sha256="cd")
    config = GateConfig(num_resamples=999)
    decision = decide({"ndcg@10": paired}, "ndcg@10", config, origin=origin, reference="base model")
    assert decision.model_copy(update={"sentence": "Too few."}) == GateDecision.model_validate_json(DECISION)


def test_a_measurement() -> None:
    measured = unseal(Measurement, MEASURED, "")
    assert measured.request.role == Role("champion", 3)
    before, after = (json.loads(b"{" + data.split(b"\n", 1)[1]) for data in (MEASURED, seal(measured)))
    before["format"] = before["request"]["commit"]["format"] = 1  # fields that came later
    before["request"]["commit"]["throughput"], before["precision"] = None, "fp32"
    assert after == before


def test_names_of_roles() -> None:
    keys = {CANDIDATE: "candidate", BASE_MODEL: "base", Role("champion", 12): "champion-12"}
    for role, key in keys.items():
        assert role.key == key
        assert Role.from_key(key) == role
    for key in ("", "champion", "champion-", "champion-x", "base model", "other"):
        with pytest.raises(ValueError, match="is no role"):
            Role.from_key(key)
    with pytest.raises(ValueError, match="a champion has a generation"):
        Role("champion")
    with pytest.raises(ValueError, match="nothing else has one"):
        Role("candidate", 1)
