"""`moecc export --to onnx`: whole models against transformers, the commands, errors.

Function bodies are tested in test_bodies.py, the op library in test_native.py. A sample of the
families runs by default, all with MOECC_ALL_FAMILIES=1.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from families import ALL, FAMILIES
from made import PROMPT, Run, checkpoint, generated, load
from onnx import TensorProto
from torch import Tensor
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from moecc.backends.onnx import (
    OnnxTarget,
    bodies,
    build,
    exporter,
    layout,
    run,
    weights,
)
from moecc.backends.onnx.cached import Cached
from moecc.backends.onnx.rewrites import masks
from moecc.commands.compile import compile_model
from moecc.errors import MoeccError
from moecc.frontend.skeleton import Skeleton
from moecc.frontend.trace import trace
from moecc.ir import vq4
from moecc.native.build import COMPILERS

torch.set_num_threads(1)
pytestmark = pytest.mark.usefixtures("traced_once", "translated_once")


def export(folder: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Export as `moecc export FOLDER --to onnx{options} -o OUT` does, and return the record."""
    return exporter.export(folder, out, OnnxTarget(**options))


# ---------------------------------------------------------------- whole models


@pytest.fixture(scope="module")
def translated_once() -> Iterator[None]:
    """Translate once for all exports of an artifact at a dtype and opset.

    The graph has no weights yet, and making it takes longest.
    """
    capture, translated = exporter.capture_cached, exporter.translate
    captured: dict[Any, Cached] = {}
    graphs: dict[tuple[int, int], ir.Model] = {}

    def capture_once(found: Skeleton) -> Cached:
        key = found.folder, found.model.dtype
        if key not in captured:
            captured[key] = capture(found)
        return captured[key]

    def translate_once(cached: Cached, opset: int, stored: Container[str]) -> ir.Model:
        key = id(cached), opset
        if key not in graphs:
            graphs[key] = translated(cached, opset, stored)
        return graphs[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "capture_cached", capture_once)
        patch.setattr(exporter, "translate", translate_once)
        yield


# qwen2_moe, with a softmax and a shared expert, goes through most other tests here.
SAMPLE = (
    "deepseek_v3",  # router: sigmoid, bias and groups
    "gpt_oss",  # biases; gate and up transposed and interleaved
    "llama4_text",  # sigmoid on scaled inputs; complex rotations
    "muse_spark_text",  # a norm behind each expert; no head: a norm's output is the model's
    "jetmoe",  # experts in attention
)
# Their layers keep more than keys and values between tokens.
REFUSED = (
    "axk2",
    "bailing_hybrid",
    "deepseek_v32",
    "deepseek_v4",
    "dots3_note_text",
    "glm5_next_text",
    "glm_moe_dsa",
    "granitemoehybrid",
    "hy_v4",
    "inkling2_text",
    "inkling_text",
    "jamba",
    "kimi_linear",
    "lfm2_moe",
    "minimax",
    "mistral_large4_text",
    "nemotron_h",
    "openai_privacy_filter",
    "qwen3_5_moe_text",
    "qwen3_next",
    "qwen4_exp_text",
    "unlimited_ocr_text",
    "zaya",
)
# One layer is enough for these: a second one would be like it, and other families test what a
# second layer adds to a graph (its cache, shared masks).
ALIKE = () if ALL else ("deepseek_v3", "llama4_text", "muse_spark_text", "jetmoe")


def one_layer(family: str) -> dict[str, Any]:
    """The configuration of a model of one decoder layer."""
    if family == "gpt_oss":
        return {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    return {"num_hidden_layers": 1}


def compiled(
    folder: Path, family: str, passes: str = "kbvq{rank=4,mean=3}", bits: float = 2, **config: Any
) -> Path:
    """A small artifact of a family."""
    source = checkpoint(folder / "model", family, **config)
    compile_model(
        str(source), passes, folder / "art", bits=bits, calib=None, rows=8, length=32, backend=None
    )
    return folder / "art"


@pytest.mark.family
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - REFUSED if ALL else SAMPLE))
def test_a_family_is_exported(family: str, tmp_path: Path) -> None:
    art = compiled(tmp_path, family, **one_layer(family) if family in ALIKE else {})
    made = export(art, tmp_path / "onnx", opset=21 if sorted(FAMILIES).index(family) % 2 else 23)
    assert made["difference"] <= 1e-4
    if family in WINDOWS:
        assert_masks_are_known(graph(tmp_path / "onnx"), WINDOWS[family])
    path = tmp_path / "onnx" / "model.onnx"
    portable, native = run.Session(path), run.Session(path, library=library())
    ids = torch.randint(0, 60, (2, 11))
    want, got = (s.logits(ids, [4, 1, 6]) for s in (portable, native))
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    if type(AutoConfig.from_pretrained(art)) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    tokens = generated(load(art), PROMPT, 6).tolist()
    assert greedy(portable, 6) == tokens and greedy(native, 6) == tokens


def library() -> Path | None:
    """The op library, None without a compiler: then the function runs again."""
    return build.library() if os.environ.get("CXX") or any(map(shutil.which, COMPILERS)) else None


def greedy(session: run.Session, steps: int) -> list[list[int]]:
    """PROMPT and the tokens that follow, decoded one by one with the cache."""
    ids, tokens, cache = PROMPT.numpy(), PROMPT.numpy(), session.start(1)
    for _ in range(steps):
        logits = session.step(tokens, cache)
        tokens = logits[:, -1:].argmax(-1)
        ids = np.concatenate([ids, tokens], 1)
    found: list[list[int]] = ids.tolist()
    return found


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("qwen"), "qwen2_moe")


@pytest.fixture(scope="module")
def exported(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`qwen` as ONNX, for tests that only read it: exporting is the slowest step here."""
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    assert export(qwen, folder, profile="native")["difference"] <= 1e-4
    return folder


def artifact(family: str, folder: Path, request: pytest.FixtureRequest) -> Path:
    """The shared artifact of qwen2_moe; one of a single layer for other families."""
    if family == "qwen2_moe":
        return Path(request.getfixturevalue("qwen"))
    return compiled(folder, family, **one_layer(family))


def graph(folder: Path) -> onnx.ModelProto:
    """An exported model without its weights."""
    return onnx.load(folder / "model.onnx", load_external_data=False)


# family -> windows of its causal masks. A mask in chunks is not a causal mask of a window.
WINDOWS = {"qwen2_moe": [masks.NO_WINDOW], "gpt_oss": [8, masks.NO_WINDOW], "llama4_text": []}


def assert_masks_are_known(model: onnx.ModelProto, windows: list[int]) -> None:
    """Each mask of a window is one CausalMask, and nothing is left of what computed it before."""
    found = [n.attribute[0].i for n in model.graph.node if n.op_type == masks.NAME]
    assert sorted(found) == windows
    left = [n for n in model.graph.node if n.op_type in ("LessOrEqual", "Less", "Range")]
    assert bool(left) == (not windows)


def changed(art: Path, out: Path, change: Any) -> Path:
    """A copy of an artifact with other tensors, and a config that fits them.

    change: called with the path of every experts module and the tensors by name, which it alters.
    """
    from safetensors.torch import load_file, save_file

    out.mkdir()
    for file in art.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    tensors, config = (
        load_file(art / "model.safetensors"),
        json.loads((art / "config.json").read_text()),
    )
    for path, entry in config["quantization_config"]["experts"].items():
        change(path, tensors)
        for part in ("gate_up", "down"):
            entry[part] = {
                n: [
                    list(tensors[f"{path}.{part}.{n}"].shape),
                    str(tensors[f"{path}.{part}.{n}"].dtype).removeprefix("torch."),
                ]
                for n in vq4.TENSORS
                if f"{path}.{part}.{n}" in tensors
            }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_an_operand_that_some_layers_lack_is_stored_empty(qwen: Path, tmp_path: Path) -> None:
    """Layer 0 has 2 bits, basis, mean and biases; layer 1 has 4 bits and none of the rest."""

    def strip(path: str, tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if n.startswith(path) and ".1." in path]:
            kind = name.rpartition(".")[2]
            if kind in (*vq4.SHARED, "bias"):
                del tensors[name]
            elif kind == "codes":
                tensors[name] = tensors[name].repeat_interleave(2, -1)
            elif kind == "codebook":
                tensors[name] = tensors[name][..., :2].contiguous()

    art = changed(qwen, tmp_path / "art", strip)
    assert export(art, tmp_path / "onnx")["difference"] <= 1e-4
    model = graph(tmp_path / "onnx")
    node = [n for n in model.graph.node if n.op_type == "VQExperts"][1]
    sizes = {i.name: list(i.dims) for i in model.graph.initializer}
    names = dict(zip(bodies.coded_inputs(), node.input, strict=False))
    assert sizes[names["gate_up_basis"]][0] == 0 and sizes[names["down_mean_codes"]][2] == 0
    assert len([f for f in model.functions if f.name == "VQExperts"]) == 1


def test_layers_of_two_and_of_three_bits_share_a_function(tmp_path: Path) -> None:
    """A budget may give layers different bits; then a layer of 2 bits stores empty signs."""
    source = checkpoint(tmp_path / "model", "mixtral")
    compile_model(str(source), "vq", tmp_path / "two", bits=2, calib=None, rows=8, length=32)
    compile_model(str(source), "vq", tmp_path / "three", bits=3, calib=None, rows=8, length=32)
    from safetensors.torch import load_file

    three = load_file(tmp_path / "three" / "model.safetensors")

    def mix(path: str, tensors: dict[str, Tensor]) -> None:
        if ".1." in path:
            tensors.update({n: t for n, t in three.items() if n.startswith(f"{path}.gate_up.")})

    art = changed(tmp_path / "two", tmp_path / "art", mix)
    assert export(art, tmp_path / "onnx", opset=21)["difference"] <= 1e-4


ATTENTION = {
    "qwen2_moe": "CachedAttentionRope",
    "qwen3_moe": "CachedAttentionNormRope",
    "mixtral": "CachedAttentionRope",
}
# Settings that give every layer a window.
SLIDING = {
    "qwen3_moe": dict(use_sliding_window=True, sliding_window=8),
    "mixtral": dict(sliding_window=8),
}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", *["mixtral"] * ALL])
def test_attention_is_one_node_whose_cache_may_have_room(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Rows begin later, come in pieces, and outgrow the first cache; library and function alike."""
    if family == "qwen2_moe":
        folder = request.getfixturevalue("exported")
    else:
        folder = tmp_path / "onnx"
        export(compiled(tmp_path, family, "vq", **one_layer(family), **SLIDING[family]), folder)
    path, model = folder / "model.onnx", graph(folder)
    assert_masks_are_known(model, [8] if family in SLIDING else [masks.NO_WINDOW])
    names = [n.op_type for n in model.graph.node if n.op_type.startswith("CachedAttention")]
    assert names == [ATTENTION[family]] * (2 if family == "qwen2_moe" else 1)
    assert not {"Attention", "Expand", "GatherND"} & {n.op_type for n in model.graph.node}
    ids = torch.randint(1, 60, (1, 300)).numpy()
    padded = np.concatenate([np.zeros((1, 7), np.int64), ids[:, :-7]], 1)
    for session in (run.Session(path), run.Session(path, library=library())):
        whole = session.step(ids, session.start(1))
        cache = session.start(2, [0, 7])
        both = np.concatenate([ids, padded])
        found = np.concatenate(
            [session.step(part, cache) for part in np.split(both, [250, 251, 290], axis=1)], 1
        )
        np.testing.assert_allclose(found[0], whole[0], atol=2e-5 * np.abs(whole).max())
        np.testing.assert_allclose(found[1, 7:], whole[0, :-7], atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", *["muse_spark_text"] * ALL])
def test_a_float16_export_stays_within_its_tolerance(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """qwen2_moe's attention is one node, as at float32; the others have norms in float32."""
    art = artifact(family, tmp_path, request)
    made = export(art, tmp_path / "onnx", dtype="float16")
    assert 1e-6 < made["difference_of_most"] <= exporter.TOLERANCE["float16"]
    path = tmp_path / "onnx" / "model.onnx"
    model = graph(path.parent)
    names = [n.op_type for n in model.graph.node if n.op_type.startswith("CachedAttention")]
    assert names == ([ATTENTION[family]] * 2 if family in ATTENTION else [])
    ids = torch.randint(0, 60, (4, 20))
    portable, native = (
        run.Session(path, library=own).logits(ids, [15, 1, 4]) for own in (None, library())
    )
    assert exporter.differences(native, portable)[1] <= 5e-3


def test_a_layer_a_tenth_off_is_refused_at_float16(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scale(path: str, tensors: dict[str, Tensor]) -> None:
        if ".1." in path:
            tensors[f"{path}.down.scale"] *= 1.1

    other = changed(qwen, tmp_path / "other", scale)
    monkeypatch.setattr(exporter, "trace", lambda folder, **told: trace(other, **told))
    with pytest.raises(
        MoeccError, match=r"differ by .* of the largest, in too many tokens; nothing was kept"
    ):
        export(qwen, tmp_path / "onnx", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_a_token_that_rounding_sends_to_another_expert_is_no_fault() -> None:
    want = torch.randn(2, 12, 64)
    got = want * (1 + 1e-3 * torch.randn_like(want))
    got[0, 3] = torch.randn(64)
    largest, most = exporter.differences(got, want)
    assert largest > 0.1 and most < 1e-2
    got[1, :6] = torch.randn(6, 64)
    assert exporter.differences(got, want)[1] > 0.1
    for wrong in (torch.nan, torch.inf):
        got = want.clone()
        got[1, 2, 3] = wrong
        assert min(exporter.differences(got, want)) == torch.inf


def test_dense_experts_are_exported(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "model", "gpt_oss", **one_layer("gpt_oss"))
    assert export(source, tmp_path / "onnx", opset=21)["difference"] <= 1e-4
    assert_masks_are_known(graph(tmp_path / "onnx"), [8])


@pytest.mark.parametrize(
    ("bits", "opset", "runs_from"), [(4, 21, "1.20"), *[(8, 21, "1.22")] * ALL, (8, 23, "1.23")]
)
def test_quantized_linears_become_matmulnbits(
    bits: int, opset: int, runs_from: str, tmp_path: Path
) -> None:
    art = compiled(
        tmp_path,
        "qwen2_moe",
        f"vq{{bits=2}},dense{{bits={bits},group=16}}",
        **one_layer("qwen2_moe"),
    )
    made = export(art, tmp_path / "onnx", opset=opset)
    assert made["difference_of_most"] <= exporter.TOLERANCE["int8 activations"]
    assert made["runs_from"] == f"onnxruntime {runs_from}"
    exact = exact_copy(tmp_path / "onnx" / "model.onnx")
    ids = torch.randint(0, 60, (2, 9))
    with torch.no_grad():
        want = load(art)(input_ids=ids).logits
    got = run.Session(exact).logits(ids, [9])
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-4


@pytest.mark.parametrize("family", ["gpt_oss", "qwen2_moe", *["deepseek_v3"] * ALL])
def test_qmoe_is_close_at_8_bits_and_less_close_at_4(
    family: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    art = artifact(family, tmp_path, request)
    eight = export(art, tmp_path / "onnx8", profile="qmoe", bits=8)
    assert eight["difference"] <= 0.05
    four = export(art, tmp_path / "onnx4", profile="qmoe", bits=4)
    # Whether rounding sends a token to another expert depends on the machine.
    assert eight["difference_of_most"] < four["difference_of_most"] <= 0.4
    ops_used = {n.op_type for n in graph(tmp_path / "onnx4").graph.node}
    assert "QMoE" in ops_used and not {"VQExperts", "Experts"} & ops_used


@pytest.mark.parametrize(
    ("tied", "dtype"), [(False, "float32"), *[(False, "float16")] * ALL, (True, "float16")]
)
def test_int8_embedding_and_head_share_a_tensor_if_tied(
    tied: bool, dtype: str, tmp_path: Path
) -> None:
    """The logits stay near those of the artifact."""
    art = compiled(tmp_path, "qwen2_moe", "vq", tie_word_embeddings=tied, **one_layer("qwen2_moe"))
    made = export(art, tmp_path / "onnx", dtype=dtype, embeddings="int8")
    assert made["difference_of_most"] <= exporter.TOLERANCE["int8 activations"]
    model = graph(tmp_path / "onnx")
    used = [n.op_type for n in model.graph.node]
    assert used.count("GatherBlockQuantized") == used.count("MatMulNBits") == 1
    assert AutoConfig.from_pretrained(art).tie_word_embeddings == tied
    assert len([i for i in model.graph.initializer if i.name.endswith(".packed")]) == (
        1 if tied else 2
    )
    assert not [
        i for i in model.graph.initializer if "embed_tokens.weight" == i.name.removeprefix("model.")
    ]


@pytest.mark.parametrize(
    ("family", "config", "why"),
    [
        ("muse_spark_text", {}, "no norm behind an expert; export with profile=portable"),
        ("qwen2_moe", {"hidden_act": "gelu"}, "no gate glu of gelu; export with profile=portable"),
        ("qwen2_moe", {"moe_intermediate_size": 24}, "blocks of 16 divide, not 32 and 24"),
    ],
)
def test_qmoe_refuses_an_unsupported_model_before_translating_it(
    family: str, config: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "translate", lambda *told: pytest.fail("translated"))
    with pytest.raises(MoeccError, match=why):
        export(checkpoint(tmp_path / "model", family, **config), tmp_path / "onnx", profile="qmoe")
    assert not (tmp_path / "onnx").exists()


def test_qmoe_refuses_weights_that_the_graph_computes(tmp_path: Path) -> None:
    """gpt_oss interleaves gate and up, and the graph of a dense model takes them apart."""
    source = checkpoint(tmp_path / "model", "gpt_oss", **one_layer("gpt_oss"))
    with pytest.raises(MoeccError, match="gate_up is stored in another order than QMoE wants"):
        export(source, tmp_path / "onnx", profile="qmoe")
    assert not (tmp_path / "onnx").exists()


def test_qmoe_wants_a_new_runtime(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.1")
    with pytest.raises(MoeccError, match=r"needs onnxruntime 1\.31 or newer, this is 1\.30\.1"):
        export(qwen, tmp_path / "onnx", profile="qmoe")


def exact_copy(path: Path) -> Path:
    """The same model with float32 activations in MatMulNBits."""
    model = graph(path.parent)
    nodes = [n for n in model.graph.node if n.op_type == "MatMulNBits"]
    assert nodes
    for node in nodes:
        next(a for a in node.attribute if a.name == "accuracy_level").i = 0
    onnx.save(model, path.with_name("exact.onnx"))
    return path.with_name("exact.onnx")


WEB = """
import * as ort from 'onnxruntime-web';
import fs from 'fs';
const [folder, ids] = [process.argv[1], JSON.parse(process.argv[2])];
const read = name => fs.readFileSync(`${folder}/${name}`);
const session = await ort.InferenceSession.create(read('model.onnx'), {
  executionProviders: ['wasm'],
  externalData: [{path: 'model.onnx.data', data: read('model.onnx.data')}],
});
const whole = values =>
  new ort.Tensor('int64', BigInt64Array.from(values.map(BigInt)), [1, values.length]);
const feeds = {
  input_ids: whole(ids),
  attention_mask: whole(ids.map(() => 1)),
  position_ids: whole(ids.map((_, i) => i)),
};
const sizes = shape => shape.map((n, i) => i == 0 ? 1 : i == 2 ? 0 : n);
for (const input of session.inputMetadata.filter(i => i.name.startsWith('past_key_values.')))
  feeds[input.name] = new ort.Tensor('float32', new Float32Array(0), sizes(input.shape));
const {logits} = await session.run(feeds, ['logits']);
console.log(JSON.stringify(Array.from(logits.data)));
"""


@pytest.mark.skipif(
    "MOECC_ONNX_WEB" not in os.environ,
    reason="set MOECC_ONNX_WEB to where onnxruntime-web is installed",
)
@pytest.mark.parametrize(("bits", "opset"), [(2, 21), (3, 23)])
def test_a_browser_computes_the_same(bits: int, opset: int, tmp_path: Path) -> None:
    """onnxruntime-web under node; `npm install onnxruntime-web` was run in MOECC_ONNX_WEB."""
    art = compiled(tmp_path, "qwen3_moe", "vq", bits)
    export(art, tmp_path / "onnx", opset=opset)
    ids = list(range(5, 16))
    command = ["node", "--input-type=module", "-e", WEB, str(tmp_path / "onnx"), json.dumps(ids)]
    done = subprocess.run(
        command, cwd=os.environ["MOECC_ONNX_WEB"], capture_output=True, text=True, check=True
    )
    want = run.Session(tmp_path / "onnx" / "model.onnx").logits(torch.tensor([ids]), [len(ids)])
    got = torch.tensor(json.loads(done.stdout)).view_as(want)
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_the_file_names_nothing_of_this_machine(exported: Path) -> None:
    content = (exported / "model.onnx").read_bytes()
    assert b"site-packages" not in content and str(exported.parents[1]).encode() not in content
    model = graph(exported)
    named = {
        d.dim_param
        for v in (*model.graph.input, *model.graph.output)
        for d in v.type.tensor_type.shape.dim
    }
    assert named == {"", "batch", "sequence", "past", "total"}


def test_codes_are_stored_once(qwen: Path, exported: Path) -> None:
    model = graph(exported)
    held = sum(
        int(np.prod(i.dims)) for i in model.graph.initializer if i.data_type == TensorProto.UINT8
    )
    codes = 0
    for entry in json.loads((qwen / "config.json").read_text())["quantization_config"][
        "experts"
    ].values():
        for part, (name, spec) in (
            (entry[p], item) for p in ("gate_up", "down") for item in entry[p].items()
        ):
            if name.endswith(("codes", "signs")):
                (experts, rows, width), book = spec[0], part.get(name.replace("codes", "codebook"))
                weights_each = book[0][2] if name.endswith("codes") else 8
                blocks = -(-rows // 64) * -(
                    -width * weights_each // 64
                )  # of 64 x 64, the last ones padded
                codes += experts * blocks * 64 * 64 // weights_each
    assert held == codes


# ---------------------------------------------------------------- the commands


def test_export_writes_a_folder_and_reports_the_difference(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    got = Run(capsys, "export", qwen, "--to", "onnx{opset=21}", "-o", tmp_path / "made", "--json")
    assert got.code == 0, got.err
    names = {f.name for f in (tmp_path / "made").iterdir()}
    assert {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
        exporter.RECORD,
    } <= names
    assert got.json["opset"] == 21 and got.json["difference"] <= 1e-4
    settings = json.loads((tmp_path / "made" / "genai_config.json").read_text())["model"]
    assert settings["decoder"]["num_hidden_layers"] == 2 and settings["vocab_size"] == 64
    assert_masks_are_known(graph(tmp_path / "made"), [masks.NO_WINDOW])
    again = Run(capsys, "export", qwen, "--to", "onnx", "-o", tmp_path / "made")
    assert again.code == 2 and "exists" in again.err and again.err.count("\n") == 1


def test_the_native_profile_puts_the_library_beside_the_model(
    exported: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if library() is None:
        pytest.skip("no C++ compiler")
    assert json.loads((exported / exporter.RECORD).read_text())["profile"] == "native"
    decoder = json.loads((exported / "genai_config.json").read_text())["model"]["decoder"]
    name = decoder["session_options"]["custom_ops_library"]
    assert (exported / name).is_file()
    assert Run(capsys, "build-ops").out.strip() == str(library())


def test_without_a_compiler_the_export_is_portable_and_says_so(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    got = Run(
        capsys, "export", qwen, "--to", "onnx{profile=native}", "-o", tmp_path / "made", "--json"
    )
    assert got.code == 0 and "no op library: CXX is '/no/such/compiler'" in got.err
    assert got.json["profile"] == "portable" and not (tmp_path / "made" / exporter.LIBRARY).exists()
    assert Run(capsys, "build-ops").code == 2


def test_compile_can_export_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = checkpoint(tmp_path / "model", "mixtral", **one_layer("mixtral"))
    got = Run(
        capsys,
        "compile",
        model,
        "--passes",
        "vq",
        "--backend",
        "onnx",
        "-o",
        tmp_path / "out",
        "--rows",
        "8",
        "--length",
        "32",
        "--json",
    )
    assert got.code == 0, got.err
    assert (
        got.json["backend"]["difference"] <= 1e-4
        and (tmp_path / "out" / "onnx" / "model.onnx").exists()
    )


def test_a_wrong_file_is_not_kept(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        weights, "blocked_codes", lambda codes, v: layout.blocked_codes(codes ^ 1, v)
    )
    with pytest.raises(MoeccError, match=r"differ by .* of the largest; nothing was kept"):
        export(qwen, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.family
@pytest.mark.parametrize("family", REFUSED if ALL else ("nemotron_h", "openai_privacy_filter"))
def test_layers_with_a_state_of_their_own_are_refused(
    family: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A compilation that is to export them is refused before its first pass."""
    model = checkpoint(tmp_path / "model", family)
    got = Run(capsys, "export", model, "--to", "onnx", "-o", tmp_path / "onnx")
    why = (
        "don't keep keys and values"
        if family == "openai_privacy_filter"
        else "keep a state of their own"
    )
    assert got.code == 2 and why in got.err and not (tmp_path / "onnx").exists()
    monkeypatch.setattr("moecc.commands.compile.run_passes", lambda *_: pytest.fail("passes ran"))
    args = ("--passes", "vq", "--backend", "onnx", "-o", tmp_path / "out", "--length", "32")
    got = Run(capsys, "compile", model, *args)
    assert got.code == 2 and why in got.err and [p.name for p in tmp_path.iterdir()] == ["model"]


def test_genai_generates_what_transformers_does(qwen: Path, exported: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(exported))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=PROMPT.shape[1] + 8, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(PROMPT[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    made = [int(t) for t in generator.get_sequence(0)]
    assert (
        made == generated(load(qwen), PROMPT, 8)[0, : len(made)].tolist()
        and len(made) > PROMPT.shape[1]
    )


def test_bench_measures_an_export(
    qwen: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported, tmp_path / "onnx")
    options = ("--threads", "1", "--prompt-tokens", "8", "--new-tokens", "3")
    got = Run(capsys, "bench", tmp_path / "onnx", *options, "--json")
    assert got.code == 0, got.err
    assert {r["ops"] for r in got.json["rows"]} <= {"portable", "native"}
    assert all(
        r["decode_tokens_per_second"] > 0 and r["private_bytes"] > 0 for r in got.json["rows"]
    )
    got = Run(capsys, "bench", qwen)
    assert got.code == 2 and "moecc export" in got.err
    got = Run(capsys, "bench", tmp_path / "onnx", "--new-tokens", "1000000")
    assert got.code == 2 and "positions; give fewer --prompt-tokens or --new-tokens" in got.err
    (tmp_path / "onnx" / exporter.DATA).write_bytes(b"x")
    got = Run(capsys, "bench", tmp_path / "onnx", "--threads", "1")
    assert got.code == 2 and "can't load it" in got.err and got.err.count("moecc") == 1


def test_a_missing_package_is_named(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    got = Run(capsys, "export", qwen, "--to", "onnx")
    assert got.code == 2 and "pip install 'moecc[onnx]'" in got.err
