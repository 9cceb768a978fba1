"""The bytes of the format: tests/golden/vq4_v1.safetensors decodes to what it always did.

`python tests/test_vq4_bytes.py --regenerate` writes the golden files again. Only a new case or a
new version of the format is a reason to.
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
from torch import Tensor

from moecc.ir import vq4
from moecc.ir.ops import VQ_EXPERTS
from moecc.types import Json

GOLDEN = Path(__file__).parent / "golden"


# The recipe of each case in the golden file. Between them, every tensor of the format is present
# and absent on either side.
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


def golden_case(
    name: str,
) -> tuple[slow.Projection, slow.Projection, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Draw one case of the golden file: gate_up, down, and tokens routed through them."""
    options = {"hidden": 16, "intermediate": 8, **CASES[name]}
    gate_up, down = slow.draw_layer(options.pop("salt"), **options)
    routing = slow.draw_routing(7, tokens=3, top_k=2, experts=3, hidden=options["hidden"])
    return gate_up, down, routing


def manifest(stored: dict[str, Tensor]) -> Json:
    """Return dtype, shape and digest of every tensor, and what each case computes."""
    found: Json = {"tensors": {}, "cases": {}}
    for name, t in sorted(stored.items()):
        found["tensors"][name] = {
            "dtype": str(t.dtype).removeprefix("torch."),
            "shape": list(t.shape),
            "sha256": digest(t.contiguous().view(torch.uint8)),
        }
    for name in CASES:
        gate_up, down = (read(stored, name, side) for side in ("gate_up", "down"))
        x, index, weight = golden_case(name)[2]
        whole = [
            slow.unscaled(p, k).astype(np.int8)
            for p, k in ((gate_up, x.shape[1]), (down, hidden_units(gate_up)))
        ]
        found["cases"][name] = {
            "decoded": [digest(torch.from_numpy(w)) for w in whole],
            "output": slow.layer(x, index, weight, gate_up, down, slow.silu_glu).round(9).tolist(),
        }
    return found


def digest(t: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    return hashlib.sha256(t.numpy().tobytes()).hexdigest()


def hidden_units(gate_up: slow.Projection) -> int:
    return int(gate_up["codes"].shape[1] // 2)


def read(stored: dict[str, Tensor], case: str, side: str) -> slow.Projection:
    """Return one projection of the golden file, which keeps the floats of `down` as bfloat16."""
    return slow.arrays({n: stored.get(f"{case}.{side}.{n}") for n in slow.NAMES})


def golden_tensors() -> dict[str, Tensor]:
    """Draw the golden file's tensors from their recipe.

    Floats of gate_up are float16 and those of down bfloat16, so that the file has both types.
    """
    stored = {}
    for name in CASES:
        for side, p in zip(("gate_up", "down"), golden_case(name)[:2], strict=True):
            for key, t in slow.tensors(p).items():
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
    widths = x.shape[1], sides[0]["scale"].shape[1] // 2
    for p, columns, sha in zip(sides, widths, pinned["decoded"], strict=True):
        whole = vq4.decode(p["codes"], p["signs"], p["codebook"], columns, torch.float32)
        assert digest(whole.to(torch.int8)) == sha
    args = [t for p in sides for t in (*p.values(), None, None)]
    got = VQ_EXPERTS(*map(torch.from_numpy, (x, index, weight)), *args, None, **slow.SILU_GLU)
    np.testing.assert_allclose(got.numpy(), pinned["output"], atol=2e-9)


def regenerate() -> None:
    GOLDEN.mkdir(exist_ok=True)
    stored = golden_tensors()
    safetensors.torch.save_file(stored, GOLDEN / "vq4_v1.safetensors")
    (GOLDEN / "vq4_v1.json").write_text(json.dumps(manifest(stored), indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] != ["--regenerate"]:
        sys.exit("usage: python tests/test_vq4_bytes.py --regenerate")
    regenerate()
