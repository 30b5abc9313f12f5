from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compression.data import DataSpec
from tasks.stage import Stage, stage_kinds
from tasks.store.identity import Machine, digest, identity_document, library_versions, seed_of

DATA = DataSpec.model_validate({"text": "embedded", "questions": "embedded"})
REQUIRED: dict[str, dict[str, Any]] = {  # parameters without a default
    "prune.lottery": {"sparsity": 0.5}, "prune.rigl": {"sparsity": 0.5}, "prune.unstructured": {"sparsity": 0.5}, "prune.width": {"keep": 0.5},
}  # fmt: skip
INPUTS = {"parent": "1" * 64, "teacher": "2" * 64}

# What each kind's default parameters, its version and its libraries come to. A digest that changes means that stored results are lost:
# where the bytes a kind writes changed, raise its version; where only its parameters did, write the new digest down.
GOLDEN = {
    "distill": "e800310bb638abcfa829b6cd2ccf51b53f1ca65985d14080482b8f2b83ef8efe",
    "export.executorch": "b2143a3c4508b686acc1f41bf12f51175d9f2cc90a3d5964523c4ff1aac17c01",
    "export.genai": "68e0bea857019433b2ab75d0b2a25c91d122f205338b7661aec71c6992b8f560",
    "export.gguf": "8a8eacd925e5f15ada9294c4f024b347e6759a44483638fcea766a2c6244fa39",
    "export.onnx": "da707aa91cfeb14304bb361b7b7d647d67d6d35240b444b744981823ac931c52",
    "export.openvino": "b90341da6b1d51e9f99a77fe718029f5ae87580ab983c396ce3fc9701929e0af",
    "finetune": "09e20e20906b333a5b582a51d38e2fb917affa1682832af1bac96651a508b2e2",
    "prune.depth": "1d551370fa16c7ceabf40ed7e0a9e6e8dc49d15d51ba8f6ab696bb58cd67e3a5",
    "prune.lottery": "d5b00a37c378cef74c643e2c787c24ca5e00fdad1b9ec220da72da2d3461c584",
    "prune.rigl": "dbe64f6e3923cb435b79ca371f07e805141ae6f2b5e7d8aaeaf957e17c97dce2",
    "prune.unstructured": "fae28c9a70a9a9551aa490b93f7c0250b588887a0dead9ab58950d453ed7b516",
    "prune.width": "e011368149d8447233b6201c73fe51096a28143645b97df4bf3e358bab6b738a",
    "quantize.awq": "136ad5d73d9a7c49732947c4fd7beb5566dcd093113cbaa22e3ef4f1c0958ab3",
    "quantize.fp8": "570eb78859a8bc7f5566719f2a374bd63faa8e3962173dba068976324a152359",
    "quantize.gptq": "0c9491a40e3a82d460372dfc450a829ee444e3c9d7a2f98444d1bc1db4753394",
    "quantize.rtn": "73df249100ceded97c6798d8c77db2fd146452a030fe399654a40298d1618363",
    "quantize.smoothquant": "bf465b06e09bd2b9bacc39cd10e04a251efdb060a98e6b278b0c0d9ba6b363eb",
    "synthesize": "6238a0351c9d337506e236a684ff009bd77a6ab84a37bdd890bfa354e7b9cebd",
}


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same versions on every machine."""
    monkeypatch.setattr("tasks.store.identity.library_versions", lambda names: dict.fromkeys(names, "1.0"))


def stage(uses: str, **parameters: Any) -> Stage:
    return stage_kinds()[uses].model_validate({"uses": uses, **REQUIRED.get(uses, {}), **parameters})


def identity(made: Stage, inputs: Mapping[str, str] = INPUTS, data: DataSpec = DATA, seed: int = 0, machine: Machine = Machine()) -> str:  # noqa: B008
    part = made.data_read()
    return digest(identity_document(made, inputs, None if part == "nothing" else f"{part} of {data.length}", seed, machine))


def test_golden_digests() -> None:
    assert {uses: identity(stage(uses)) for uses in stage_kinds()} == GOLDEN


@given(st.permutations(["alpha", "beta", "gamma", "temperature", "steps"]), st.permutations(list(INPUTS)))
def test_order_does_not_matter(keys: list[str], roles: list[str]) -> None:
    values = {"alpha": 0.5, "beta": 0.25, "gamma": 0.125, "temperature": 4.0, "steps": 7}
    made = stage("distill", **{key: values[key] for key in keys})
    assert identity(made, {role: INPUTS[role] for role in roles}) == identity(stage("distill", **values))


def other(value: Any) -> Any:
    """Another value of the same type, that bounds allow."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 + 0.01
    return f"{value}x"


@pytest.mark.parametrize("uses", sorted(stage_kinds()))
def test_every_parameter_changes_it(uses: str) -> None:
    made = stage(uses)
    for name in set(type(made).model_fields) - {"uses", *made.other_inputs()}:
        changed = made.model_copy(update={name: other(getattr(made, name))})
        assert identity(changed) != identity(made), name


@given(st.text("0123456789abcdef", min_size=8, max_size=8), st.sampled_from(sorted(INPUTS)))
def test_every_input_changes_it(content: str, role: str) -> None:
    assert identity(stage("distill"), {**INPUTS, role: content}) != identity(stage("distill"))
    assert identity(stage("distill"), {**INPUTS, "another": content}) != identity(stage("distill"))


@given(st.integers(1, 2**31))
def test_seed_and_threads_change_it(number: int) -> None:
    assert identity(stage("prune.width"), seed=number) != identity(stage("prune.width"))
    assert identity(stage("prune.width"), machine=Machine("cpu", number + 1)) != identity(stage("prune.width"))


def test_device_type_changes_it_not_number() -> None:
    made = stage("prune.width")
    assert identity(made, machine=Machine("cuda:0")) == identity(made, machine=Machine("cuda:1")) != identity(made)


def test_kinds_version_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identity(stage("prune.width"))
    monkeypatch.setattr(stage_kinds()["prune.width"], "version", 99)
    assert identity(stage("prune.width")) != before


def test_library_version_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = stage("quantize.gptq")
    before = identity(made)
    for changed in type(made).libraries:
        monkeypatch.setattr(
            "tasks.store.identity.library_versions", lambda names, c=changed: {n: "2.0" if n == c else "1.0" for n in names}
        )
        assert identity(made) != before


def test_missing_library_has_a_version() -> None:
    assert library_versions(("torch", "no-such-distribution"))["no-such-distribution"] == "absent"
    assert library_versions(("torch",))["torch"][0].isdigit()


def test_only_data_it_reads_changes_it() -> None:
    longer = DATA.model_copy(update={"length": 128})
    same = {uses for uses in stage_kinds() if identity(stage(uses), data=longer) == identity(stage(uses))}
    assert same == {uses for uses in stage_kinds() if stage(uses).data_read() == "nothing"}
    assert {"distill", "finetune", "quantize.gptq", "quantize.awq"}.isdisjoint(same)


def test_teachers_name_is_excluded() -> None:
    """Its identity is, as an input."""
    assert identity(stage("distill", teacher="pruned")) == identity(stage("distill", teacher="thin"))


@given(st.text("0123456789abcdef", min_size=64, max_size=64))
def test_seeds_fit_every_generator(text: str) -> None:
    assert 0 <= seed_of(text) < 2**31


def test_digest_is_sha256_of_canonical_json() -> None:
    import hashlib

    assert digest({"b": "ü", "a": [1, 2.5]}) == hashlib.sha256(b'{"a":[1,2.5],"b":"\\u00fc"}').hexdigest()
