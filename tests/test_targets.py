"""Targets: found like passes, printed and read back; the float checkpoint of an artifact."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from families import ALL
from made import ROOT, TINYMOE, checkpoint, load
from pipelines import MY_PASS
from refusals import listing
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from moecc import cli
from moecc.artifact.decode import float_tensors
from moecc.artifact.draft import Busy
from moecc.commands.compile import compile_model
from moecc.commands.evaluate import evaluate_models
from moecc.commands.export import bench_export, export_artifact
from moecc.errors import MoeccError
from moecc.frontend.trace import trace
from moecc.target import TARGETS, parse_target

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once")
DENSE = str(ROOT / "backends" / "dense.py")
# transposed and interleaved with biases, rows that no expert reads; all experts in one matrix
LAYOUTS = ("gpt_oss", "longcat_flash", *(("qwen2_moe", "dbrx", "nemotron_h") if ALL else ()))


@pytest.mark.parametrize("name", TARGETS.names())
def test_every_target_s_text_builds_it_again(name: str) -> None:
    target = TARGETS.find(name)()
    assert target.name == name and str(target) == name
    for option in target.options():
        assert option.metadata["help"]
        for value in option.metadata["choices"]:
            profile = {"profile": "qmoe"} if option.name == "bits" else {}  # of that one alone
            other = TARGETS.find(name)(**{option.name: value, **profile})
            assert TARGETS.find(name).build_from(str(other)[len(name) + 1 : -1]) == other


@pytest.mark.parametrize("name", TARGETS.names())
def test_a_target_takes_only_the_choices_of_its_options(name: str) -> None:
    cls = TARGETS.find(name)
    for option in (o for o in cls.options() if o.metadata["choices"]):
        with pytest.raises(MoeccError, match=f"^{name}: {option.name}=none is out of range; it ta"):
            cls(**{option.name: "none"})
        with pytest.raises(MoeccError, match=f"^{name}: {option.name}='none' is .*; it takes "):
            cls.build_from(f"{option.name}=none")


def test_the_place_of_an_export_is_tried_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "moecc.backends.dense.float_tensors", lambda *_: pytest.fail("the model was traced")
    )
    for out, why in ((Path(__file__) / "x", "is not a folder"), (tmp_path / ("x" * 300), "too lo")):
        with pytest.raises(MoeccError, match=f"can't be made: .*{why}"):
            export_artifact(str(TINYMOE), "dense", out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("onx", "no target 'onx'; did you mean 'onnx'?"),
        ("onnx{opst=21}", "onnx has no option 'opst'; did you mean 'opset'?"),
        ("onnx{opset=22}", "onnx: opset=22 is out of range; it takes 21 | 23"),
        ("onnx,dense", "'onnx,dense' names 2 targets; give one of "),
        ("./missing.py", "no target file missing.py; give the path of a Python file"),
        ("onnx{bits=8}", "onnx: bits is of the profile qmoe; the others keep the bits"),
    ],
)
def test_a_target_that_can_t_be_had_is_one_line(text: str, line: str) -> None:
    with pytest.raises(MoeccError) as error:
        parse_target(text)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_targets_are_listed_with_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["targets", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["targets"]
    assert [t["name"] for t in found] == TARGETS.names() and all(t["summary"] for t in found)
    assert cli.main(["targets", "onnx"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {f.name}=" in text for f in fields(TARGETS.find("onnx")))


# ---------------------------------------------------------------- dense


@pytest.mark.parametrize("family", LAYOUTS)
def test_the_float_checkpoint_computes_what_the_artifact_does(family: str, tmp_path: Path) -> None:
    """In every layout, loaded by transformers alone; the target is used by its path."""
    source = checkpoint(tmp_path / "model", family)
    passes = "kbvq{rounds=1,feedback=false,rank=2,mean=2,offset=off},dense{group=16}"
    compile_model(str(source), passes, tmp_path / "art", rows=4, length=16)
    made = export_artifact(str(tmp_path / "art"), DENSE + "{dtype=float32}", tmp_path / "float")
    assert made.out == tmp_path / "float" and made.facts["bytes"] > 0
    config = json.loads((made.out / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        want = load(tmp_path / "art")(input_ids=ids).logits
        got = AutoModelForCausalLM.from_pretrained(made.out)(input_ids=ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_the_guide_shows_the_float_target_word_for_word() -> None:
    guide, target = ((ROOT / "backends" / f).read_text() for f in ("README.md", "dense.py"))
    assert f"```python\n{target[target.index('from dataclasses') :]}```" in guide


def test_offsets_without_a_place_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "mixtral")
    compile_model(
        str(source),
        "kbvq{rounds=1,feedback=false,rank=0,mean=off,offset=on}",
        tmp_path / "art",
        rows=4,
        length=16,
    )
    with pytest.raises(MoeccError, match="offsets are stored, and its family has no biases"):
        export_artifact(str(tmp_path / "art"), "dense", tmp_path / "float")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["art", "model"]
    (tmp_path / "float").mkdir()
    with pytest.raises(MoeccError, match="float exists; choose another output folder"):
        export_artifact(str(source), "dense", tmp_path / "float")


def test_a_bias_that_a_pass_removed_is_exported_as_zeros(tmp_path: Path) -> None:
    """The family declares it, and transformers would fill it with random numbers."""
    source = checkpoint(tmp_path / "model", "gpt_oss")
    passes = f"moments,vq{{rounds=1}},affine,fold,{MY_PASS}{{below=100}}"
    compile_model(str(source), passes, tmp_path / "art", rows=4, length=16)
    out = export_artifact(str(tmp_path / "art"), "dense{dtype=float32}", tmp_path / "float").out
    assert out is not None
    names = {name for name, _ in load(source).named_parameters()}
    tensors = load_file(out / "model.safetensors")
    assert names == tensors.keys()
    biases = [t for name, t in tensors.items() if name.endswith(("up_proj_bias", "down_proj_bias"))]
    assert biases and not any(bool(t.any()) for t in biases)
    ids = torch.arange(16).view(1, 16)
    with torch.no_grad():
        want, got = (load(folder)(input_ids=ids).logits for folder in (tmp_path / "art", out))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_tensors_keep_the_order_of_the_model(tmp_path: Path) -> None:
    """Shards, and so their bytes, are the same in every run."""
    source = checkpoint(tmp_path / "model", "mixtral")
    store = trace(source).store
    assert store is not None
    assert list(float_tensors(source)) == [n for n in store.names() if n not in store.tied]


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_the_configuration_of_the_text_model_says_float_too(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, coded = tmp_path / "model", {"quant_method": "fp8"}
    source.mkdir()
    outer = {"quantization_config": coded, "torch_dtype": "bfloat16", "model_type": "outer"}
    inner = {"quantization_config": coded, "dtype": "bfloat16", "model_type": "inner"}
    (source / "config.json").write_text(json.dumps(outer | {"text_config": inner}))
    monkeypatch.setattr("moecc.backends.dense.float_tensors", lambda folder, dtype: {})
    TARGETS.find("dense")(dtype=dtype).emit(source, tmp_path / "float", print)
    found = json.loads((tmp_path / "float" / "config.json").read_text())
    want = {"torch_dtype": "bfloat16"} if dtype == "auto" else {"dtype": dtype}
    text = {"dtype": "bfloat16" if dtype == "auto" else dtype, "model_type": "inner"}
    assert found == want | {"model_type": "outer", "text_config": text}


def test_an_export_touches_nothing_beside_it(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "mixtral")
    (tmp_path / "float.partial").mkdir()
    (tmp_path / "float.partial" / "mine").write_text("mine")
    export_artifact(str(source), "dense", tmp_path / "float")
    assert (tmp_path / "float.partial" / "mine").read_text() == "mine"
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["float", "float.partial", "model"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out, why in (
        (tmp_path / "link", "exists; choose another output folder"),
        (source / "config.json" / "deeper", "can't be made: "),
        (tmp_path / ("x" * 300), "can't be made: File name too long"),
    ):
        with pytest.raises(MoeccError, match=why):
            export_artifact(str(source), "dense", out)
    assert sorted(p.name for p in tmp_path.iterdir()) == [*names[:2], "link", "model"]


def emitting(folder: Path, body: str) -> str:
    """Write a target of a user's own whose `emit` is `body`; return its path."""
    file = folder / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\nfrom moecc.errors import MoeccError\n"
        "from moecc.target import Emitted, Target\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(Target):\n    name = 'mine'\n\n"
        f"    def emit(self, artifact, out, say):\n        {body}\n"
    )
    return str(file)


def without_line(message: str) -> str:
    """Return the message of a fault without the file and the line of the target that raised it."""
    line = r"( failed: \w+: .*?) \(\S*mine\.py, line 10\)"
    assert (" failed: " in message) == bool(re.search(line, message))
    return re.sub(line, r"\1", message)


FAULTS = [
    ("raise ValueError('no luck')", "failed: ValueError: no luck"),
    ("raise MoeccError('no luck')", "no luck"),
    ("raise SystemExit(0)", "failed: SystemExit: 0"),
    ("return None", "returned None; its emit returns an Emitted"),
    ("return Emitted()", "writes nothing, the artifact runs as it is; leave -o {} out"),
]


@pytest.mark.parametrize(("body", "line"), FAULTS)
def test_a_target_s_own_fault_names_it(body: str, line: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "mixtral")
    target, out, there = emitting(tmp_path, body), tmp_path / "out", tmp_path / "there"
    there.mkdir()
    before = listing(tmp_path)
    for folder in (out, there):
        with pytest.raises(MoeccError) as error:
            export_artifact(str(source), target, folder)
        assert without_line(str(error.value)).endswith(line.format(folder))
        assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("with new_folder(out): out.mkdir(); (out / 'a').touch()", "was made by something else"),
        ("out.mkdir()\n        with new_folder(out): pass", "exists; choose another"),
    ],
)
def test_what_another_run_has_made_is_not_called_a_part_of_the_export(
    body: str, says: str, tmp_path: Path
) -> None:
    source = checkpoint(tmp_path / "model", "mixtral")
    body = f"from moecc.artifact.draft import new_folder\n        {body}"
    with pytest.raises(Busy) as error:
        export_artifact(str(source), emitting(tmp_path, body), tmp_path / "out")
    assert says in str(error.value) and "a part of the export" not in str(error.value)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(("body", "line"), FAULTS)
def test_what_a_faulty_target_leaves_is_named(body: str, line: str, tmp_path: Path) -> None:
    """It is not removed: another process may have put it there."""
    source = checkpoint(tmp_path / "model", "mixtral")
    target, out = emitting(tmp_path, f"out.mkdir(); {body}"), tmp_path / "out"
    before = listing(tmp_path)
    with pytest.raises(MoeccError) as error:
        export_artifact(str(source), target, out)
    left = f"{line.format(out)}; a part of the export may lie in {out}; remove it"
    assert without_line(str(error.value)).endswith(left)
    assert listing(tmp_path) == {**before, "out": None}


def test_a_field_of_a_target_that_is_no_option_is_refused(tmp_path: Path) -> None:
    file = Path(emitting(tmp_path, "return Emitted()"))
    file.write_text(file.read_text().replace("name = 'mine'", "name = 'mine'\n    level: int = 3"))
    with pytest.raises(MoeccError) as error:
        parse_target(str(file))
    assert str(error.value) == "mine.py: write level as option(DEFAULT, help=...)"


def test_a_folder_without_an_export_to_measure_is_one_line(tmp_path: Path) -> None:
    """An export may lie in it, of a target that has no benchmark or is used by its path."""
    with pytest.raises(MoeccError, match="holds no export that can be measured here; run "):
        bench_export(tmp_path)
    with pytest.raises(MoeccError, match=r"^no folder '.*nothing'; give that of an "):
        bench_export(tmp_path / "nothing")


def test_bits_of_an_export_are_per_weight_of_the_model_whichever_the_reference(
    tmp_path: Path,
) -> None:
    source = checkpoint(tmp_path / "model", "mixtral", torch.bfloat16)
    rows: dict[str, int] = {"rows": 2, "length": 16}
    passes = "vq{rounds=1,codebook=layer},dense{group=16}"
    compile_model(str(source), passes, tmp_path / "art", **rows, say=lambda line: None)
    export_artifact(str(tmp_path / "art"), "dense", tmp_path / "float")
    for reference in (source, tmp_path / "art"):
        found = evaluate_models(
            str(tmp_path / "float"), str(reference), **rows, say=lambda line: None
        )
        assert (found["bits_per_weight"], found["bits_per_weight_experts"]) == (16, 16)


def test_a_target_file_that_exits_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(7)\n")
    with pytest.raises(MoeccError, match="can't be imported: SystemExit: 7"):
        parse_target(str(tmp_path / "mine.py"))
