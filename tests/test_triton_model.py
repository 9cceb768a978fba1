"""Compiled models on the Triton target, on the CPU: packed modules, their op, and what is saved.

Tests marked interp run the kernels in triton's interpreter. The others need no triton: off a GPU
the op runs its definition.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import Layer, draw_layer
from made import ROWS, checkpoint, load
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from moecc import cli, target
from moecc.backends import triton as backend
from moecc.commands.compile import compile_model
from moecc.errors import MoeccError
from moecc.frontend import experts
from moecc.frontend.compressed import CompressedProjection
from moecc.ir import vq4

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
in_interpreter = [
    pytest.mark.interp,
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
]
PASSES = "kbvq{bits=3,rank=2}"


def interp(test: Any) -> Any:
    for mark in in_interpreter:
        test = mark(test)
    return test


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss", "qwen2_moe"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compiled model: plain; with biases, interleaved rows and a gate; with a shared expert."""
    folder = tmp_path_factory.mktemp(request.param)
    model = checkpoint(folder / "model", request.param)
    assert (
        cli.main(["compile", str(model), "--passes", PASSES, "-o", str(folder / "out"), *ROWS]) == 0
    )
    return folder / "out"


def on_triton(artifact: Path) -> Any:
    """Load an artifact on the CPU as if it were a GPU: its codes in the order of the kernels."""
    backend.require_device()
    model = load(artifact)
    for module in projections(model):
        module.pack(backend.KERNELS)
    return model


def projections(model: nn.Module) -> list[CompressedProjection]:
    return [m for m in model.modules() if isinstance(m, CompressedProjection)]


def packed(model: Any) -> Any:
    for projection in projections(model):
        projection.pack(backend.KERNELS)
    return model


PROMPT = torch.tensor([[5, 9, 2, 7, 3, 3, 8, 1]])


def logits(model: Any) -> Tensor:
    """Return logits on the CPU, wherever the model is."""
    with torch.no_grad():
        return model(PROMPT.to(model.device)).logits.cpu()


# ---------------------------------------------------------------- models


@interp
@pytest.mark.parametrize("artifact", ["mixtral", "gpt_oss"], indirect=True)
def test_a_model_run_by_the_kernels_agrees_with_the_reference(artifact: Path) -> None:
    reference, model = load(artifact), on_triton(artifact)
    assert all(
        p.packed == backend.KERNELS.name and p.codes.dtype == torch.int32
        for p in projections(model)
    )
    wanted = logits(reference)
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=float(wanted.abs().max()) * 1e-3)
    told = dict(max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(PROMPT, **told), reference.generate(PROMPT, **told))


def test_a_packed_model_gives_the_same_logits(artifact: Path) -> None:
    """Off a GPU its op is the definition, so nothing may differ."""
    if INTERPRETED:
        pytest.skip("the kernels run in the interpreter")
    reference, model = load(artifact), packed(load(artifact))
    assert torch.equal(logits(model), logits(reference))


def test_a_packed_model_saves_the_stored_order(artifact: Path, tmp_path: Path) -> None:
    reference, model = load(artifact), packed(load(artifact))
    saved, wanted = model.state_dict(), reference.state_dict()
    assert saved.keys() == wanted.keys()
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    model.save_pretrained(tmp_path)
    again = load(tmp_path).state_dict()
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def test_a_packed_model_loads_stored_tensors(artifact: Path) -> None:
    reference, model = load(artifact), packed(load(artifact))
    with torch.no_grad():
        for p in projections(model):
            p.codes.zero_()
    model.load_state_dict(reference.state_dict())
    assert all(p.packed == backend.KERNELS.name for p in projections(model))
    assert all(
        torch.equal(value, reference.state_dict()[name])
        for name, value in model.state_dict().items()
    )


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_packed_model_can_be_copied(artifact: Path, way: str) -> None:
    model = packed(load(artifact))
    again = COPIES[way](model)
    assert all(
        p.packed == backend.KERNELS.name and p.codes.dtype == torch.int32
        for p in projections(again)
    )
    assert torch.equal(logits(again), logits(model))
    wanted = model.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())


def test_a_packed_model_on_meta_can_be_loaded_into(artifact: Path) -> None:
    """On meta its state has the shapes of the stored tensors."""
    wanted = load(artifact).state_dict()
    model = packed(load(artifact)).to("meta")
    shapes = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    assert shapes == {name: (t.shape, t.dtype) for name, t in wanted.items()}
    model.load_state_dict(wanted, assign=True)
    assert all(p.packed == backend.KERNELS.name and not p.codes.is_meta for p in projections(model))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())


def test_packing_keeps_no_second_copy(artifact: Path) -> None:
    """Only the packed tensors stay; tensors whose order does not change are the same objects."""
    model = load(artifact)
    before = {
        id(p): {name: getattr(p, name) for name in ("codebook", "scale", "coef")}
        for p in projections(model)
    }
    for p in projections(packed(model)):
        assert set(dict(p.named_buffers())) <= set(vq4.TENSORS)
        assert all(getattr(p, name) is tensor for name, tensor in before[id(p)].items())


def test_codes_follow_the_order_of_their_device(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """.to() brings codes into the order of the device's kernels, and back."""
    model, found = load(artifact), {"cpu": backend.KERNELS}
    monkeypatch.setattr(target, "kernels_for", found.get)
    model.to("cpu")
    assert all(p.packed == backend.KERNELS.name for p in projections(model))
    found.clear()
    model.to(torch.float32)
    assert all(p.packed is None and p.codes.dtype == torch.uint8 for p in projections(model))
    found["cpu"] = backend.KERNELS
    assert all(p.packed == backend.KERNELS.name for p in projections(load(artifact)))


def test_experts_that_accelerate_lends_to_a_device_are_refused(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offloading moves tensors to the device during a forward, and nothing has packed them."""
    model = load(artifact)
    for p in projections(model):
        p.place = "meta"
    assert bool(logits(model).isfinite().all())  # fine, because this device has no kernels
    monkeypatch.setattr(target, "kernels_for", {"cpu": backend.KERNELS}.get)
    with pytest.raises(
        MoeccError,
        match=r"^experts that were loaded on meta are lent to cpu for a moment, .*=reference",
    ):
        logits(model)


# ---------------------------------------------------------------- the device


def test_the_kernels_for_a_device_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(target.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "require_device", lambda: None)
    assert target.kernels_for("cuda") is backend.KERNELS
    monkeypatch.setattr("moecc.registry.entry_points", None)  # found once, not at every move
    assert target.kernels_for("cuda") is target.kernels_called("triton") is backend.KERNELS
    assert target.kernels_for("cpu") is None and target.kernels_for("xpu") is None
    monkeypatch.setenv(target.VARIABLE, "reference")
    assert target.kernels_for("cuda") is None
    monkeypatch.setenv(target.VARIABLE, "fast")
    with pytest.raises(MoeccError, match=r"^MOECC_KERNELS is 'fast'; it takes auto or reference$"):
        target.kernels_for("cpu")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that calls require_device() on a machine with the given cards."""

    def ask(*capabilities: tuple[int, int], hip: str | None = None) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        cuda = SimpleNamespace(
            is_available=lambda: bool(capabilities),
            device_count=lambda: len(capabilities),
            get_device_capability=lambda i: capabilities[i],
            get_device_name=lambda i: f"card {i}",
        )
        monkeypatch.setattr(torch, "cuda", cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        backend.require_device.cache_clear()
        try:
            backend.require_device()
        finally:
            backend.require_device.cache_clear()

    return ask


def test_a_missing_package_or_card_is_named(asked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    asked((9, 0), (8, 0))
    asked((7, 5), hip="6.4")  # ROCm counts otherwise
    with pytest.raises(
        MoeccError, match=r"^the target triton needs a CUDA or ROCm device, and torch sees none$"
    ):
        asked()
    with pytest.raises(
        MoeccError,
        match=r"^.*8\.0, and card 1 has 7\.5; MOECC_KERNELS=reference runs the reference on it$",
    ):
        asked((9, 0), (7, 5))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MoeccError, match=r"needs triton, which isn't installed; pip install 'moecc\[triton\]'$"
    ):
        asked((9, 0))


def test_compiling_for_the_target_needs_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact is the same for every target."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    source, made = checkpoint(tmp_path / "model"), {}
    for name in ("triton", "reference"):
        told = dict(bits=2, calib=None, rows=4, length=16, backend=name)
        made[name] = compile_model(str(source), "vq", tmp_path / name, **told)
    assert made["triton"]["backend"] == {"name": "triton", "target": "triton", "files": []}
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in made]
    assert files[0] == files[1]
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in made}) == 1


# ---------------------------------------------------------------- the op


def operands(layer: Layer) -> list[Any]:
    x, index, weight, gate_up, down, post_norm = layer.packed()
    return [
        x,
        index,
        weight,
        *(gate_up[n] for n in vq4.TENSORS),
        *(down[n] for n in vq4.TENSORS),
        post_norm,
    ]


OP: Any = torch.ops.moecc.vq_experts_packed.default
LAYERS = {
    "2 bit": dict(bits=2),
    "3 bit": dict(bits=3, rank=2, bias=True, mean=2),
    "4 bit": dict(bits=4, norm=True, mean=3, shared=True),
    "no gate": dict(bits=2, gate="none", act="relu2"),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.skipif(INTERPRETED, reason="the kernels run in the interpreter")
def test_the_op_computes_what_its_stored_form_computes(name: str) -> None:
    layer = draw_layer(**LAYERS[name])
    assert torch.equal(OP(*operands(layer), **layer.attributes), layer.reference())


@pytest.mark.parametrize(
    "name", [*LAYERS, pytest.param("2 bit", marks=in_interpreter, id="kernels")]
)
def test_the_op_passes_opcheck(name: str) -> None:
    layer = draw_layer(**LAYERS[name])
    torch.library.opcheck(OP, operands(layer), layer.attributes)


def test_the_op_has_the_derivatives_of_the_reference() -> None:
    layer = draw_layer(3, rank=2)
    layer.x.requires_grad_()
    OP(*operands(layer), **layer.attributes).square().sum().backward()
    got, layer.x.grad = layer.x.grad, None
    layer.reference().square().sum().backward()
    wanted = layer.x.grad
    assert got is not None and wanted is not None
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_the_op_can_be_faked_exported_and_compiled() -> None:
    layer = draw_layer(2, rank=2)
    args = operands(layer)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) if isinstance(t, Tensor) else t for t in args]
        assert OP(*fakes, **layer.attributes).shape == layer.x.shape

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stored = nn.ParameterList()  # absent tensors have no place
            self.places = [None if t is None else self._add(t) for t in args[3:]]

        def _add(self, t: Tensor) -> int:
            self.stored.append(nn.Parameter(t, requires_grad=False))
            return len(self.stored) - 1

        def forward(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
            stored = [None if i is None else self.stored[i] for i in self.places]
            result: Tensor = torch.relu(OP(x, index, weight, *stored, **layer.attributes))
            return result

    routed = tuple(args[:3])
    batch = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(
        Experts(), routed, dynamic_shapes={n: {0: batch} for n in ("x", "index", "weight")}
    )
    assert OP in [node.target for node in exported.graph.nodes]
    wanted = Experts()(*routed)
    torch.testing.assert_close(exported.module()(*routed), wanted)
    compiled = torch.compile(Experts(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*routed), wanted)
    assert torch.equal(
        exported.module()(*(t[:2] for t in routed)), Experts()(*(t[:2] for t in routed))
    )


@interp
@pytest.mark.parametrize("artifact", ["mixtral"], indirect=True)
def test_a_compressed_module_calls_the_kernels(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By way of the experts implementation that transformers knows as "moecc"."""
    from moecc.backends.triton import launch

    model, calls = on_triton(artifact), []
    run = launch.vq_experts
    monkeypatch.setattr(launch, "vq_experts", lambda *a, **k: calls.append(len(a)) or run(*a, **k))
    assert model.config._experts_implementation == experts.IMPLEMENTATION
    logits(model)
    assert len(calls) == len(projections(model)) / 2
