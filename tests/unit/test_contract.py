"""Values are checked where they are born; identities are stable."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.contract import record
from workers.contract.engine import EngineSettings, Speculative
from workers.contract.errors import Crashed, Infeasible, OutOfMemory, TrialError
from workers.contract.fingerprint import canonical, fingerprint
from workers.contract.layout import Layout
from workers.contract.measure import Measure
from workers.contract.model import Model, Prune
from workers.contract.trial import Trial
from workers.contract.workload import Workload

REQUIRED = """
schema_version sweep run_id trial_id group_id attempt outcome outcome_reason oom_stage oom_scope
oom_bytes skipped_by profile measured engine engine_version torch_version device device_count
host started_at finished_at engine_load_s
model weights num_layers hidden_size ffn_dim num_experts top_k shared_experts dtype quantization
prune_kind prune_ratio params_total params_active tensor_parallel pipeline_parallel
data_parallel expert_parallel
batch_size input_tokens output_tokens seed repeats
ttft_s ttft_paper_s itl_s itl_paper_s tpot_s e2e_s e2e_s_ci_low e2e_s_ci_high throughput_tok_s
throughput_tok_s_ci_low throughput_tok_s_ci_high output_throughput_tok_s requests_s samples_s
weights_gib kv_cache_gib peak_memory_gib memory_limit_gib
mbu mfu s_mbu s_mbu_paper s_mfu activated_experts_decode activated_experts_prefill
predicted_e2e_s predicted_ttft_s predicted_memory_gib
power_w energy_j energy_source cost_usd_per_mtok purchase_cost_usd accuracy accuracy_task
acceptance_rate
""".split()


def test_every_promised_column_is_there_and_explained() -> None:
    assert set(REQUIRED) <= set(record.RECORDS.names)
    for schema in record.TABLES.values():
        assert len(set(schema.names)) == len(schema.names)
        assert all(field.metadata[b"doc"] for field in schema)


def test_rows_are_null_where_nothing_is_known_and_refuse_unknown_columns() -> None:
    batch = record.rows(record.RECORDS, [{"sweep": "s", "outcome": "oom"}])
    assert batch.schema.equals(record.RECORDS)
    assert batch.column("e2e_s")[0].as_py() is None
    with pytest.raises(KeyError, match="no such column: throughput"):
        record.rows(record.RECORDS, [{"throughput": 1.0}])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Layout(tensor=0), "layout.tensor is 0, but must be at least 1"),
        (lambda: Workload(batch_size=-1), "workload.batch_size is -1"),
        (lambda: Model(name=" "), "model.name is ' '"),
        (lambda: Model(name="a\nb"), "printable"),
        (lambda: Model(name="a", scale=0.0, weights="dummy"), "model.scale is 0.0"),
        (lambda: Model(name="a", scale=0.5), "needs model.weights: dummy"),
        (lambda: Prune(ratio=1.0), "model.prune.ratio is 1.0"),
        (lambda: Speculative(model="x", tokens=0), "engine.speculative.tokens is 0"),
        (lambda: EngineSettings(memory_limit_gib=math.nan), "memory_limit_gib is nan"),
        (lambda: Measure(repeats=5, max_repeats=4), "max_repeats is 4, below measure.repeats 5"),
        (lambda: Measure(ci_width=0.0), "measure.ci_width is 0.0"),
    ],
)
def test_wrong_values_are_refused_at_birth(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


def test_repeats_have_a_bound() -> None:
    assert Measure(repeats=5).most_repeats == 5
    assert Measure(repeats=5, ci_width=0.02).most_repeats == 15
    assert Measure(repeats=5, ci_width=0.02, max_repeats=7).most_repeats == 7


def test_identity_is_stable_over_versions_and_covers_every_field() -> None:
    trial = Trial(model=Model(name="mixtral-8x7b", weights="dummy", ffn_dim=1792))
    assert trial.named_id == "23898ef82d91eeba"  # a change here disowns every old result
    assert trial.named_id != Trial(model=Model(name="mixtral-8x7b", ffn_dim=1792)).named_id
    counted = replace(trial, measure=Measure(activation=True))
    assert counted.named_id == "5fb3be40e57e3c2d"
    looked_up = replace(trial, measure=Measure(activation="sheet"))
    assert len({trial.named_id, counted.named_id, looked_up.named_id}) == 3
    assert looked_up.engine_key == trial.engine_key
    other_load = Trial(model=trial.model, workload=Workload(batch_size=2))
    assert other_load.named_id != trial.named_id
    assert other_load.engine_key == trial.engine_key
    other_engine = Trial(model=trial.model, engine=EngineSettings(eager=True))
    assert other_engine.engine_key != trial.engine_key


def test_a_default_spelt_out_is_the_same_trial() -> None:
    assert fingerprint(Layout()) == fingerprint(Layout(tensor=1))
    assert fingerprint(EngineSettings(args={"a": 1, "b": 2})) == fingerprint(
        EngineSettings(args={"b": 2, "a": 1})
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, {1}, b"x", {1: 2}, object(), 1j])
def test_values_without_a_stable_spelling_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="value"):
        canonical(value)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(_JSON)
def test_equal_data_have_equal_fingerprints(value: object) -> None:
    assert fingerprint(value) == fingerprint(canonical(value))
    assert len(fingerprint(value)) == 16


def test_integers_floats_and_booleans_are_told_apart() -> None:
    assert len({fingerprint(value) for value in (1, 1.0, True, "1")}) == 4


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory("7 GiB", stage="load", scope="device", requested_bytes=7 * 2**30),
        OutOfMemory("no words", stage="run", scope="host"),
        Crashed("signal 11"),
        Infeasible("3 does not divide 32"),
    ],
    ids=lambda error: str(error),
)
def test_outcomes_travel_between_processes(error: TrialError) -> None:
    other = pickle.loads(pickle.dumps(error))  # noqa: S301  our own
    assert (type(other), str(other), vars(other)) == (type(error), str(error), vars(error))


def test_records_survive_a_file() -> None:
    batch = record.rows(record.SAMPLES, [{"trial_id": "t", "token_s": [[0.5, 0.25], [0.125]]}])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, record.SAMPLES) as writer:
        writer.write_batch(batch)
    again = pa.ipc.open_file(sink.getvalue()).read_all()
    assert again.column("token_s")[0].as_py() == [[0.5, 0.25], [0.125]]
