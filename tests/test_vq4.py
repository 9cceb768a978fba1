"""The format: `moecc.ir.vq4` and `moecc::vq_experts` against a decoder written index by index, and the bytes on disk.

`python tests/test_vq4.py --regenerate` writes tests/golden/ again; only a new case or a new version of the format is a reason to.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import slow_vq4 as slow
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import bits_of
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.ops import VQ_EXPERTS
from moecc.passes.affine import CodedProjection

GOLDEN = Path(__file__).parent / "golden"
PLAIN = dict(act="silu", gate="glu", alpha=0.0, limit=0.0, eps=1e-6)
# What each case of the golden file has: between them every tensor of the format, present and absent, on either side.
CASES: dict[str, dict[str, Any]] = {
    "2bit": dict(salt=1000, bits=2, rank=0, bias=False),
    "2bit_shared_basis_bias": dict(salt=2000, bits=2, rank=2, bias=True, shared=True),
    "3bit_basis": dict(salt=3000, bits=3, rank=3, bias=False),
    "3bit_bias_padded": dict(salt=4000, bits=3, rank=0, bias=True, hidden=12, intermediate=10),
    "4bit_shared": dict(salt=5000, bits=4, rank=0, bias=False, shared=True),
    "4bit_basis_bias_padded": dict(
        salt=6000, bits=4, rank=2, bias=True, hidden=12, intermediate=10
    ),
    "2bit_mean_basis_padded": dict(
        salt=7000, bits=2, rank=2, bias=False, mean=3, hidden=12, intermediate=10
    ),
}


def tensors(p: slow.Projection) -> dict[str, Tensor | None]:
    return {k: None if v is None else torch.from_numpy(v) for k, v in p.items()}


def arrays(p: dict[str, Tensor | None]) -> slow.Projection:
    return {
        k: None if v is None else (v.double() if v.is_floating_point() else v).numpy()
        for k, v in p.items()
    }


def operands(
    gate_up: slow.Projection, down: slow.Projection, post_norm: Tensor | None = None
) -> list[Tensor | None]:
    """The positional operands of vq_experts after x and the routing."""
    return [*tensors(gate_up).values(), None, None, *tensors(down).values(), None, None, post_norm]


def run_op(
    x: np.ndarray, index: np.ndarray, weight: np.ndarray, *args: Any, **attributes: Any
) -> np.ndarray:
    result = VQ_EXPERTS(
        *map(torch.from_numpy, (x, index, weight)), *operands(*args), **{**PLAIN, **attributes}
    )
    return np.asarray(result.numpy())


def golden_case(
    name: str,
) -> tuple[slow.Projection, slow.Projection, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """One case of the golden file from its recipe: gate_up, down, and the routed tokens that go through them."""
    options = {"hidden": 16, "intermediate": 8, **CASES[name]}
    gate_up, down = slow.draw_layer(options.pop("salt"), **options)
    return (
        gate_up,
        down,
        slow.draw_routing(7, tokens=3, top_k=2, experts=3, hidden=options["hidden"]),
    )


# ---- parts of the format


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("columns", [8, 12, 13, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_decode_reads_every_weight_as_the_format_says(
    bits: int, columns: int, shared: bool
) -> None:
    p = slow.draw(bits, experts=3, rows=5, columns=columns, bits=bits, shared=shared)
    t = tensors(p)
    got = vq4.decode(t["codes"], t["signs"], t["codebook"], columns, torch.float32)  # type: ignore[arg-type]
    assert got.shape == (3, 5, columns)
    np.testing.assert_array_equal(got.numpy(), slow.unscaled(p, columns))


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4]),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 40),
    st.booleans(),
)
def test_decode_of_any_shape(
    salt: int, bits: int, experts: int, rows: int, columns: int, shared: bool
) -> None:
    p = slow.draw(salt, experts=experts, rows=rows, columns=columns, bits=bits, shared=shared)
    t = tensors(p)
    got = vq4.decode(t["codes"], t["signs"], t["codebook"], columns, torch.float64)  # type: ignore[arg-type]
    np.testing.assert_array_equal(got.numpy(), slow.unscaled(p, columns))


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_signs_come_back_from_their_bits(rows: int, bytes_: int, salt: int) -> None:
    negative = torch.from_numpy(slow.numbers(salt, rows, 8 * bytes_) % 2 == 1)
    packed = vq4.pack_signs(negative)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, bytes_)
    assert torch.equal(vq4.unpack_signs(packed), negative)


def test_a_sign_bit_sits_where_the_format_puts_it() -> None:
    """Bit c of the low nibble belongs to component c of the even group, of the high nibble to the odd one."""
    for column in range(16):
        negative = torch.zeros(16, dtype=torch.bool)
        negative[column] = True
        packed = vq4.pack_signs(negative).tolist()
        group, component = column // 4, column % 4
        want = [0, 0]
        want[group // 2] = (1 << component) if group % 2 == 0 else (1 << component) * 16
        assert packed == want


@pytest.mark.parametrize("input_side", [True, False])
def test_basis_part_against_the_loop(input_side: bool) -> None:
    p = slow.draw(3, experts=2, rows=6, columns=10, bits=2, rank=3, input_side=input_side)
    whole, t = slow.dense(p, 10, input_side=input_side), tensors(p)
    coded = slow.unscaled(p, 10) * np.asarray(p["scale"], dtype=np.float64)[..., None]
    low = vq4.basis_part(
        t["coef"], t["coef_scale"], t["basis"], torch.float64, input_side=input_side
    )  # type: ignore[arg-type]
    np.testing.assert_allclose(coded + low.numpy(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [0, 3])
def test_shared_part_against_the_loop(bits: int, rank: int, input_side: bool) -> None:
    """All that a projection holds but for the experts' own codes."""
    p = slow.draw(
        4, experts=2, rows=6, columns=10, bits=2, rank=rank, mean=bits, input_side=input_side
    )
    t = tensors(p)
    want = slow.dense({**p, "scale": np.zeros_like(p["scale"])}, 10, input_side=input_side)
    got = vq4.shared_part(t, 10, torch.float64, input_side=input_side)
    mean = vq4.mean_part(t, 10, torch.float64)
    assert got is not None and mean is not None
    assert mean.shape == (1, 6, 10) and got.shape == ((2, 6, 10) if rank else (1, 6, 10))
    np.testing.assert_allclose(got.expand(2, -1, -1).numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("input_side", [True, False])
@pytest.mark.parametrize(("rank", "mean"), [(0, 0), (2, 0), (0, 3), (2, 4)])
def test_affine_reads_a_projection_as_the_format_says(
    rank: int, mean: int, input_side: bool
) -> None:
    """What it fits is the experts' own codes; the rest is taken off the target."""
    p = slow.draw(
        6,
        experts=2,
        rows=6,
        columns=10,
        bits=3,
        rank=rank,
        mean=mean,
        bias=True,
        input_side=input_side,
    )
    x = slow.uniform(7, 5, 10)
    coded = CodedProjection(tensors(p), input_side)
    own = slow.unscaled(p, 10) * p["scale"].astype(np.float64)[..., None]
    for e, whole in enumerate(slow.dense(p, 10, input_side=input_side)):
        v, low = coded.parts(e, torch.from_numpy(x).float())
        np.testing.assert_allclose(v.numpy(), x @ own[e].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose((v + low).numpy(), x @ whole.T, rtol=1e-4, atol=1e-5)
        got = coded.apply(e, torch.from_numpy(x).float(), torch.full((2, 6), 2.0), None)
        np.testing.assert_allclose(
            got.numpy(), x @ (whole + own[e]).T + p["bias"][e], rtol=1e-4, atol=1e-5
        )


def test_there_is_nothing_shared_without_basis_and_mean() -> None:
    t = tensors(slow.draw(4, experts=2, rows=6, columns=10, bits=3))
    assert vq4.mean_part(t, 10, torch.float64) is None
    assert vq4.shared_part(t, 10, torch.float64, input_side=True) is None


def test_every_bit_is_counted() -> None:
    p = tensors(slow.draw(1, experts=3, rows=4, columns=10, bits=3, rank=2, bias=True, mean=4))
    codes, signs, books = (
        3 * 4 * 4 * 8,
        3 * 4 * 2 * 8,
        3 * 256 * 4 * 8,
    )  # ten columns are stored as sixteen
    scales, basis = 2 * (3 * 4 * 16), 2 * 10 * 16
    coef = 3 * 4 * 2 * 8 + 3 * 4 * 16
    mean = 4 * 8 * 8 + 256 * 2 * 8 + 4 * 16
    assert bits_of(p) == codes + signs + books + scales + basis + coef + mean


def test_tensor_names_are_the_format_s() -> None:
    assert vq4.TENSORS == slow.NAMES
    assert vq4.SHARED == slow.NAMES[5:] and vq4.CODED == slow.NAMES[:4]
    assert vq4.VERSION == 1


# ---- the op


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("rank", "bias"), [(0, False), (0, True), (2, False), (3, True)])
def test_layer_output_against_the_slow_layer(
    bits: int, shared: bool, rank: int, bias: bool
) -> None:
    gate_up, down = slow.draw_layer(bits, bits=bits, shared=shared, rank=rank, bias=bias)
    x, index, weight = slow.draw_routing(11, tokens=4, top_k=2, experts=3, hidden=12)
    got = run_op(x, index, weight, gate_up, down)
    np.testing.assert_allclose(
        got, slow.layer(x, index, weight, gate_up, down, slow.silu_glu), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("bits", "mean"), [(2, 2), (2, 3), (3, 4), (4, 2)])
@pytest.mark.parametrize("rank", [0, 2])
def test_layer_output_with_a_mean_against_the_slow_layer(bits: int, mean: int, rank: int) -> None:
    gate_up, down = slow.draw_layer(bits, bits=bits, rank=rank, mean=mean)
    x, index, weight = slow.draw_routing(11, tokens=3, top_k=2, experts=3, hidden=12)
    got = run_op(x, index, weight, gate_up, down)
    np.testing.assert_allclose(
        got, slow.layer(x, index, weight, gate_up, down, slow.silu_glu), rtol=1e-9, atol=1e-12
    )
    for p in (gate_up, down):
        p.update({name: None for name in p if name.startswith("mean_")})
    assert np.abs(run_op(x, index, weight, gate_up, down) - got).max() > 0.1


@given(
    salt=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 3, 4]), shared=st.booleans(), bias=st.booleans(),
    ranks=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    means=st.tuples(st.sampled_from([0, 2, 3, 4]), st.sampled_from([0, 2, 3, 4])), experts=st.integers(1, 4),
    hidden=st.integers(1, 14), intermediate=st.integers(1, 10), tokens=st.integers(1, 4), data=st.data(),
)  # fmt: skip
def test_layer_of_any_shape(
    salt: int, bits: int, shared: bool, bias: bool, ranks: tuple[int, int], means: tuple[int, int],
    experts: int, hidden: int, intermediate: int, tokens: int, data: st.DataObject,
) -> None:  # fmt: skip
    top_k = data.draw(st.integers(1, experts))
    common: dict[str, Any] = dict(experts=experts, bits=bits, shared=shared, bias=bias)
    gate_up = slow.draw(
        salt, rows=2 * intermediate, columns=hidden, rank=ranks[0], mean=means[0], **common
    )
    down = slow.draw(
        salt + 50,
        rows=hidden,
        columns=intermediate,
        rank=ranks[1],
        mean=means[1],
        input_side=False,
        **common,
    )
    x, index, weight = slow.draw_routing(
        salt, tokens=tokens, top_k=top_k, experts=experts, hidden=hidden
    )
    got = run_op(x, index, weight, gate_up, down)
    np.testing.assert_allclose(
        got, slow.layer(x, index, weight, gate_up, down, slow.silu_glu), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(("rank", "mean"), [(2, 0), (0, 3), (2, 4)])
def test_a_norm_on_each_expert_comes_after_what_is_shared(rank: int, mean: int) -> None:
    gate_up, down = slow.draw_layer(5, rank=rank, mean=mean)
    x, index, weight = slow.draw_routing(12, tokens=4, top_k=2, experts=3, hidden=12)
    gain = slow.uniform(13, 12, low=0.5, high=1.5)

    def norm(y: np.ndarray) -> np.ndarray:
        scaled = y * gain
        return np.asarray(scaled / np.sqrt((scaled**2).mean() + 1e-6))

    got = run_op(x, index, weight, gate_up, down, torch.from_numpy(gain))
    want = slow.layer(x, index, weight, gate_up, down, slow.silu_glu, norm)
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float16_and_bfloat16_scales_mean_the_same(bits: int) -> None:
    gate_up, down = slow.draw_layer(bits, bits=bits, mean=2)
    x, index, weight = slow.draw_routing(11, tokens=2, top_k=2, experts=3, hidden=12)
    for p in (gate_up, down):  # values that both types hold
        for name in ("scale", "bias", "basis", "coef_scale", "mean_scale"):
            p[name] = torch.from_numpy(p[name]).bfloat16().float().numpy()
    halves = [
        None if t is None or not t.is_floating_point() else t.bfloat16()
        for t in operands(gate_up, down)
    ]
    mixed = [
        h if h is not None else t for h, t in zip(halves, operands(gate_up, down), strict=True)
    ]
    got = VQ_EXPERTS(*map(torch.from_numpy, (x, index, weight)), *mixed, **PLAIN)
    np.testing.assert_array_equal(got.numpy(), run_op(x, index, weight, gate_up, down))


# ---- bytes on disk


def manifest(stored: dict[str, Tensor]) -> dict[str, Any]:
    """What pins the file: dtype, shape and a digest of the bytes of every tensor, and what each case computes."""
    found: dict[str, Any] = {"tensors": {}, "cases": {}}
    for name, t in sorted(stored.items()):
        raw = t.contiguous().view(torch.uint8).numpy().tobytes()
        sha = hashlib.sha256(raw).hexdigest()
        found["tensors"][name] = {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "sha256": sha,
        }
    for name in CASES:
        gate_up, down = (read(stored, name, side) for side in ("gate_up", "down"))
        x, index, weight = golden_case(name)[2]
        whole = [
            slow.unscaled(p, k).astype(np.int8)
            for p, k in ((gate_up, x.shape[1]), (down, hidden_units(gate_up)))
        ]
        found["cases"][name] = {
            "decoded": [hashlib.sha256(w.tobytes()).hexdigest() for w in whole],
            "output": slow.layer(x, index, weight, gate_up, down, slow.silu_glu).round(9).tolist(),
        }
    return found


def hidden_units(gate_up: slow.Projection) -> int:
    return int(gate_up["codes"].shape[1] // 2)


def read(stored: dict[str, Tensor], case: str, side: str) -> slow.Projection:
    """One projection out of the golden file; scales and biases of one side are kept as bfloat16 there."""
    return arrays({n: stored.get(f"{case}.{side}.{n}") for n in slow.NAMES})


def golden_tensors() -> dict[str, Tensor]:
    """The golden file's tensors from their recipe. down's 16-bit tensors are bfloat16, so that both types are in it."""
    stored = {}
    for name in CASES:
        for side, p in zip(("gate_up", "down"), golden_case(name)[:2], strict=True):
            for key, t in tensors(p).items():
                if t is not None:
                    halves = side == "down" and t.is_floating_point()
                    stored[f"{name}.{side}.{key}"] = (t.bfloat16() if halves else t).contiguous()
    return stored


def test_the_recipe_still_gives_the_golden_file() -> None:
    stored, made = safetensors.torch.load_file(GOLDEN / "vq4_v1.safetensors"), golden_tensors()
    assert stored.keys() == made.keys()
    for name, t in made.items():
        assert t.dtype == stored[name].dtype and torch.equal(t, stored[name]), name


def test_golden_bytes_have_not_changed() -> None:
    stored = safetensors.torch.load_file(GOLDEN / "vq4_v1.safetensors")
    pinned = json.loads((GOLDEN / "vq4_v1.json").read_text())
    now = manifest(stored)
    assert now["tensors"] == pinned["tensors"]
    for name in CASES:
        assert now["cases"][name]["decoded"] == pinned["cases"][name]["decoded"], name
        np.testing.assert_allclose(
            now["cases"][name]["output"], pinned["cases"][name]["output"], atol=2e-9
        )


@pytest.mark.parametrize("name", CASES)
def test_golden_file_decodes_to_the_pinned_output(name: str) -> None:
    stored = safetensors.torch.load_file(GOLDEN / "vq4_v1.safetensors")
    pinned = json.loads((GOLDEN / "vq4_v1.json").read_text())["cases"][name]
    x, index, weight = golden_case(name)[2]
    sides = [
        {n: stored.get(f"{name}.{side}.{n}") for n in vq4.TENSORS} for side in ("gate_up", "down")
    ]
    for p, columns, sha in zip(
        sides, (x.shape[1], sides[0]["scale"].shape[1] // 2), pinned["decoded"], strict=True
    ):  # type: ignore[union-attr]
        whole = vq4.decode(p["codes"], p["signs"], p["codebook"], columns, torch.float32)  # type: ignore[arg-type]
        assert hashlib.sha256(whole.to(torch.int8).numpy().tobytes()).hexdigest() == sha
    args = [t for p in sides for t in (*p.values(), None, None)]
    got = VQ_EXPERTS(*map(torch.from_numpy, (x, index, weight)), *args, None, **PLAIN)
    np.testing.assert_allclose(got.numpy(), pinned["output"], atol=2e-9)


def regenerate() -> None:
    GOLDEN.mkdir(exist_ok=True)
    stored = golden_tensors()
    safetensors.torch.save_file(stored, GOLDEN / "vq4_v1.safetensors")
    (GOLDEN / "vq4_v1.json").write_text(json.dumps(manifest(stored), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit("usage: python tests/test_vq4.py --regenerate")
    regenerate()
