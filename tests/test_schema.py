"""What an artifact says of itself: whatever else config.json says is refused in one sentence."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from made import ROWS, checkpoint, load, logits
from refusals import edit_config, edit_tensors
from torch import Tensor

from moecc import cli
from moecc.artifact.schema import read_manifest
from moecc.checkpoint.schema import METHOD, METHODS, VERSIONS, Compression
from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.types import Json

torch.set_num_threads(1)
PASSES = "kbvq{rank=4,mean=2},dense{group=16}"
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module", params=["qwen2_moe", "gpt_oss"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoint(folder / "model", request.param)
    args = ["compile", str(model), "--passes", PASSES, "-o", str(folder / "out"), *ROWS]
    assert cli.main(args) == 0
    return folder / "out"


@pytest.fixture
def copied(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copied"))


def said(folder: Path) -> Json:
    """Return the quantization_config of an artifact."""
    found: Json = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else ()
    inner = enumerate(value) if isinstance(value, list) else inner
    for key, part in inner:
        yield (*path, key)
        yield from places(part, (*path, key))


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 9),
    st.sampled_from([2**31, 2**60, 2**63, 10**400, -(2**70)]),
    st.floats(),
    st.sampled_from(["", "uint8", "float64", "load", "codes", "gate_up", "\x1b[31m", "\ud800"]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def lies(draw: st.DrawFn, truth: Json) -> Json:
    """Draw a quantization_config with one to three entries changed, taken out, moved or added."""
    found = copy.deepcopy(truth)
    for _ in range(draw(st.integers(1, 3))):
        spots = [p for p in places(found) if p[0] != "quant_method"]
        *outer, last = draw(st.sampled_from(spots))
        part = found
        for key in outer:
            part = part[key]
        match draw(st.sampled_from(["change", "remove", "add", "exchange"])):
            case "change":
                part[last] = draw(VALUES)
            case "remove":
                del part[last]
            case "add" if isinstance(part, dict):
                part[draw(st.text(max_size=8))] = draw(VALUES)
            case "exchange" if isinstance(part, dict):
                other = draw(st.sampled_from(sorted(part.keys() - {"quant_method"})))
                part[last], part[other] = part[other], part[last]
    return found


def opened(action: Callable[[], Tensor]) -> Tensor | None:
    """Return what `action` computes; None if it refuses in one printable line."""
    try:
        return action()
    except MoeccError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
        return None


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data())
def test_a_lie_is_one_sentence_or_changes_nothing(artifact: Path, data: st.DataObject) -> None:
    truth, right = said(artifact), WANTED.setdefault(artifact, logits(load(artifact)))
    lie = data.draw(lies(truth))
    folder = artifact.with_name("lie")
    shutil.copytree(artifact, folder, dirs_exist_ok=True, copy_function=_link)
    (folder / "config.json").unlink()
    config = json.loads((artifact / "config.json").read_text()) | {"quantization_config": lie}
    (folder / "config.json").write_text(json.dumps(config))
    got = opened(lambda: logits(load(folder)))
    assert got is None or torch.equal(got, right)
    # moecc's own reading takes and refuses the same; tracing takes a second, so not for each
    if data.draw(st.integers(0, 19)) == 0:
        traced = opened(lambda: _computed(folder))
        assert (traced is None) == (got is None)


WANTED: dict[Path, Tensor] = {}


def _link(source: str, target: str) -> None:
    if not Path(target).exists():
        Path(target).hardlink_to(source)


def _computed(folder: Path) -> Tensor:
    program = trace(folder)
    assert program.store is not None
    program.store.check()
    return torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.update(version=3), "of format version 3, this moecc reads 1 and 2"),
        (lambda q: q.update(experts=None), "'experts'"),
        (lambda q: q["experts"][EXPERTS].pop("down"), f"'experts.{EXPERTS}.down': Field required"),
        (lambda q: q["experts"][EXPERTS]["down"].pop("codes"), "down has no codes"),
        (lambda q: _spec(q)["codes"].__setitem__(1, "load"), "Input should be 'uint8'"),
        (lambda q: _spec(q)["codes"][0].__setitem__(0, 2**60), "expected (1152921504606846976,"),
        (lambda q: _spec(q)["codebook"].__setitem__(1, "float32"), "expected int8"),
        (lambda q: _spec(q)["scale"][0].__setitem__(1, 1), "scale is (4, 1), expected (4,"),
        (lambda q: q["experts"][EXPERTS]["attributes"].update(limit=9.0), "it computes {"),
        (lambda q: q["experts"][EXPERTS]["remove"].pop(), "it replaces ["),
        (lambda q: q["experts"].update(lm_head=q["experts"][EXPERTS]), "which holds no experts"),
        (lambda q: _linear(q).update(bits=4), "unlike what is stored"),
        (lambda q: _linear(q)["tensors"].pop("zero"), "expected weight, scale, zero"),
    ],
)
def test_each_kind_of_lie_is_named(
    copied: Path, change: Callable[[Json], object], words: str
) -> None:
    told = said(copied)
    change(told)
    edit_config(copied, quantization_config=told)
    for action in (lambda: load(copied), lambda: trace(copied)):
        with pytest.raises(MoeccError) as caught:
            action()
        assert words in str(caught.value)


def _spec(told: Json) -> Json:
    found: Json = told["experts"][EXPERTS]["gate_up"]
    return found


def _linear(told: Json) -> Json:
    found: Json = told["linears"]["model.layers.0.self_attn.q_proj"]
    return found


def test_files_that_lack_a_tensor_or_have_another_are_refused(copied: Path) -> None:
    name = f"{EXPERTS}.down.codes"
    edit_tensors(copied, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(MoeccError, match=r"codes' is int8 .* config\.json says uint8"):
        load(copied)
    edit_tensors(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(MoeccError, match=r"the weight files have no '.*down\.codes'"):
        load(copied)


def test_an_artifact_that_lacks_another_tensor_is_not_called_quantized(copied: Path) -> None:
    edit_tensors(copied, lambda tensors: tensors.pop("model.norm.weight"))
    advice = "check that config.json belongs to these weights, or fetch them again"
    with pytest.raises(MoeccError, match=f"no tensor for 'model.norm.weight' .*; {advice}"):
        trace(copied)


def test_an_artifact_of_version_1_computes_the_same(copied: Path) -> None:
    """It has no guard and no advice."""
    right, told = logits(load(copied)), said(copied)
    old = {k: v for k, v in told.items() if k != "guard"} | {"version": 1, "quant_method": "moecc"}

    def as_it_was(tensors: dict[str, Tensor]) -> None:
        for name in told["guard"]:
            del tensors[name]

    edit_tensors(copied, as_it_was)
    edit_config(copied, quantization_config=old)
    assert torch.equal(logits(load(copied)), right)
    trace(copied)


def test_what_is_written_is_read_back(artifact: Path) -> None:
    told = said(artifact)
    assert told["quant_method"] == METHOD == METHODS[0] and "pip install moecc" in METHOD
    assert told["version"] == VERSIONS[-1] and told["guard"]
    config = json.loads((artifact / "config.json").read_text())
    # transformers 4 makes numbers of these keys, and stops there
    assert config["pruned_heads"] == {METHOD: []} and config["experts_implementation"] == METHOD
    found = Compression.of(told)
    assert json.loads(json.dumps(found.as_config())) == told
    assert set(found.experts) == {EXPERTS, EXPERTS.replace("0", "1")}


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"summary": []}, "'summary': Input should be"),
        ({"summary": {"bits_per_weight": "2"}}, "'summary.bits_per_weight': Input should be"),
        ({"experts_kept": {"x": [0.5]}}, "'experts_kept.x.0': Input should be"),
        ({"experts_kept": {"x": [-1]}}, "experts_kept has a number below 0"),
        ({"pipeline": 3}, "'pipeline': Input should be"),
    ],
)
def test_an_entry_of_moecc_json_that_moecc_does_not_write_is_named(
    entry: Json, says: str, tmp_path: Path
) -> None:
    (tmp_path / "moecc.json").write_text(json.dumps(entry))
    with pytest.raises(MoeccError) as caught:
        read_manifest(tmp_path)
    assert says in str(caught.value) and "compile the model again" in str(caught.value)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(found=VALUES)
@example(found={"a": math.nan})
def test_any_moecc_json_is_read_or_refused(tmp_path: Path, found: object) -> None:
    text = json.dumps(found)  # a NaN inside equals no other
    (tmp_path / "moecc.json").write_text(text)
    try:
        assert json.dumps(read_manifest(tmp_path)) == text
    except MoeccError as error:
        assert "compile the model again" in str(error)
