"""What config.json may say of compressed tensors: they make experts and linears, or are refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from checkpoints import fails

from moecc.checkpoint.schema import METHOD, METHODS, VERSION, Compression
from moecc.types import Json

# E 3 experts, F 8, D 16; 4 columns per code
TOLD: Json = {
    "quant_method": METHOD,
    "version": 2,
    "experts": {
        "moe": {
            "attributes": {"act": "silu", "gate": "glu", "alpha": 0.0, "limit": 1.5, "eps": 1e-6},
            "remove": ["gate_up_proj", "down_proj"],
            "gate_up": {
                "codes": [[3, 16, 4], "uint8"],
                "signs": [[3, 16, 2], "uint8"],
                "codebook": [[1, 256, 4], "int8"],
                "scale": [[3, 16], "float16"],
            },
            "down": {
                "codes": [[3, 16, 2], "uint8"],
                "signs": [[3, 16, 1], "uint8"],
                "codebook": [[3, 256, 4], "int8"],
                "scale": [[3, 16], "bfloat16"],
                "bias": [[3, 16], "float16"],
            },
        }
    },
    "linears": {
        "q": {
            "bits": 4,
            "tensors": {
                "weight": [[6, 16], "uint8"],
                "scale": [[6, 2], "float16"],
                "zero": [[6, 2], "uint8"],
                "bias": [[6], "float32"],
            },
        },
        "k": {
            "bits": 8,
            "tensors": {
                "weight": [[6, 16], "uint8"],
                "scale": [[6, 16], "bfloat16"],
                "zero": [[6, 16], "uint8"],
            },
        },
    },
    "guard": ["moe.gate_up_proj"],
}
Change = Callable[[Json], object]


def told(change: Change = lambda told: None) -> Json:
    found = copy.deepcopy(TOLD)
    change(found)
    return found


def experts(found: Json) -> Json:
    inner: Json = found["experts"]["moe"]
    return inner


def linear(found: Json) -> Json:
    inner: Json = found["linears"]["q"]["tensors"]
    return inner


def stored() -> dict[str, torch.Tensor]:
    """Return tensors as TOLD lists them."""
    moe, linears = experts(TOLD), TOLD["linears"]
    specs = {f"moe.{side}.{n}": s for side in ("gate_up", "down") for n, s in moe[side].items()}
    specs |= {f"{p}.{n}": s for p in linears for n, s in linears[p]["tensors"].items()}
    return {n: torch.empty(s, dtype=getattr(torch, t)) for n, (s, t) in specs.items()}


def test_what_is_said_is_read_and_said_again() -> None:
    found = Compression.of(TOLD)
    assert found.experts["moe"].shapes == {"gate_up": (3, 16, 16), "down": (3, 16, 8)}
    assert {name: one.shape for name, one in found.linears.items()} == {"q": (6, 32), "k": (6, 16)}
    assert found.guard == ["moe.gate_up_proj"]
    assert json.loads(json.dumps(found.as_config())) == TOLD and VERSION == 2


def test_a_configuration_may_have_it_as_an_object_a_dict_or_not_at_all() -> None:
    want = Compression.of(TOLD)
    for settings in (
        SimpleNamespace(quantization_config=TOLD),
        SimpleNamespace(quantization_config=SimpleNamespace(to_dict=lambda: TOLD)),
        SimpleNamespace(to_dict=lambda: TOLD),
    ):
        assert Compression.of(settings) == want  # type: ignore[arg-type]
    nothing = ({}, SimpleNamespace(), {"quant_method": "fp8"}, {"quantization_config": TOLD})
    for other in (*nothing, SimpleNamespace(quantization_config=None), [METHOD]):
        assert Compression.of(other) == Compression()  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_a_version_that_is_not_read_is_refused(method: str) -> None:
    def of(**changes: object) -> Compression:
        return Compression.of({**TOLD, "quant_method": method, **changes})

    for version in (1, 2):
        assert of(version=version) == Compression.of(TOLD)
    assert Compression.of({k: v for k, v in TOLD.items() if k != "version"}) == of()
    for version in (0, 3, True, 2.0, "2", None, "9" * 999):
        shown = f"of format version {version!r:.40}, this moecc reads 1 and 2; compile it again"
        fails(lambda v=version: of(version=v), shown)


@pytest.mark.parametrize("gate", ["glu", "none"])
@pytest.mark.parametrize("act", ["silu", "relu2"])
def test_a_gate_halves_the_rows_and_none_keeps_them(gate: str, act: str) -> None:
    def change(found: Json) -> None:
        experts(found)["attributes"].update(gate=gate, act=act)
        if gate == "none":
            experts(found)["down"].update(codes=[[3, 16, 4], "uint8"], signs=[[3, 16, 2], "uint8"])

    shapes = Compression.of(told(change)).experts["moe"].shapes
    assert shapes == {"gate_up": (3, 16, 16), "down": (3, 16, 8 if gate == "glu" else 16)}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda e: e["attributes"].pop("eps"), "attributes are ['act', 'alpha', 'gate', 'limit']"),
        (lambda e: e["attributes"].update(more=1.0), "expected ['act', 'alpha', 'eps', 'gate'"),
        (lambda e: e["attributes"].update(act="load"), "no experts have act 'load' and gate 'glu'"),
        (lambda e: e["attributes"].update(gate="x"), "no experts have act 'silu' and gate 'x'"),
        (lambda e: e["attributes"].update(alpha="1"), "alpha, limit and eps are numbers"),
        (lambda e: e["attributes"].update(limit="1"), "alpha, limit and eps are numbers"),
        (lambda e: e["attributes"].update(eps="1"), "alpha, limit and eps are numbers"),
        (lambda e: e["gate_up"].update(load=[[3], "uint8"]), "gate_up: no tensor is called 'load'"),
        (lambda e: e["down"].pop("codes"), "down has no codes"),
        (lambda e: e["down"].pop("codebook"), "down has no codebook"),
        (lambda e: e["gate_up"].pop("scale"), "gate_up has no scale"),
        (lambda e: e["gate_up"].update(codes=[[3, 16], "uint8"]), "codes is (3, 16), expected 3"),
        (lambda e: e["gate_up"]["codes"].__setitem__(1, "int8"), "codes is int8, expected uint8"),
        (lambda e: e["down"]["codebook"].__setitem__(1, "uint8"), "is uint8, expected int8"),
        (
            lambda e: e["down"]["scale"].__setitem__(1, "float32"),
            "down: scale is float32, expected float16 or bfloat16",
        ),
        (
            lambda e: e["down"].update(mean_codes=[[1, 16, 2], "int8"]),
            "mean_codes is int8, expected uint8",
        ),
        (lambda e: e["gate_up"].update(codes=[[3, 0, 4], "uint8"]), "gate_up is (3, 0, 16)"),
        (lambda e: e["down"].update(codes=[[3, 0, 2], "uint8"]), "is (3, 16, 0)"),
        (lambda e: e["down"].update(codes=[[3, 16, 3], "uint8"]), "down: codes is (3, 16, 3)"),
        (lambda e: e["gate_up"].update(scale=[[2, 16], "float16"]), "gate_up: scale is (2, 16)"),
        (lambda e: e.update(remove="gate_up_proj"), "'experts.moe.remove'"),
        (lambda e: e.update(more={}), "'experts.moe.more'"),
    ],
)
def test_tensors_that_make_no_experts_are_refused(change: Change, words: str) -> None:
    said = "quantization_config, 'experts.moe"
    fails(lambda: Compression.of(told(lambda t: change(experts(t)))), said, words, "is damaged")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("zero"), "tensors are ['bias', 'scale', 'weight'], expected weight"),
        (lambda t: t.pop("weight"), "expected weight, scale, zero"),
        (lambda t: t.update(more=[[6], "uint8"]), "expected weight, scale, zero"),
        (lambda t: t.update(weight=[[6, 16, 1], "uint8"]), "weight is (6, 16, 1), expected 2 axes"),
        (lambda t: t.update(weight=[[6, 0], "uint8"]), "weight is (6, 0), expected 2 axes"),
        (lambda t: t.update(weight=[[6, 16], "int8"]), "weight is int8 (6, 16)"),
        (lambda t: t.update(scale=[[6, 2, 1], "float16"]), "scale is (6, 2, 1) for 6 rows of 32"),
        (lambda t: t.update(scale=[[5, 2], "float16"]), "scale is (5, 2) for 6 rows of 32 weights"),
        (lambda t: t.update(scale=[[6, 0], "float16"]), "scale is (6, 0) for"),
        (lambda t: t.update(scale=[[6, 3], "float16"]), "scale is (6, 3) for"),
        (lambda t: t.update(scale=[[6, 2], "uint8"]), "scale is uint8 (6, 2)"),
        (lambda t: t.update(zero=[[6, 1], "uint8"]), "zero is uint8 (6, 1)"),
        (lambda t: t.update(zero=[[6, 2], "float16"]), "zero is float16 (6, 2)"),
        (lambda t: t.update(bias=[[5], "float16"]), "bias is float16 (5,)"),
        (lambda t: t.update(bias=[[6], "int8"]), "bias is int8 (6,)"),
    ],
)
def test_tensors_that_make_no_linear_are_refused(change: Change, words: str) -> None:
    said = "quantization_config, 'linears.q"
    fails(lambda: Compression.of(told(lambda t: change(linear(t)))), said, words, "is damaged")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scales_and_biases_of_a_linear_may_be_any_float(dtype: str) -> None:
    def change(found: Json) -> None:
        linear(found)["scale"][1] = linear(found)["bias"][1] = dtype

    assert Compression.of(told(change)).linears["q"].tensors["scale"] == ((6, 2), dtype)


def test_what_is_no_json_is_refused_in_a_sentence() -> None:
    loop: Json = told()
    loop["experts"]["moe"]["remove"] = loop
    fails(lambda: Compression.of(loop), "quantization_config is no JSON", "fetch or compile it")
    fails(lambda: Compression.of(told(lambda t: t.update(guard=[{1}]))), "is no JSON")
    fails(lambda: Compression.of(told(lambda t: t.update(guard=["\ud800"]))), "quantization_config")
    fails(
        lambda: Compression.of(told(lambda t: t["linears"]["q"].update(bits=5))), "linears.q.bits"
    )
    long = told(lambda t: t["experts"].update({"x" * 999: 3}))
    fails(lambda: Compression.of(long), "quantization_config, 'experts." + "x" * 191 + ": ")


def test_files_have_the_tensors_that_are_listed_and_no_other_codes() -> None:
    found = Compression.of(TOLD)
    right = stored() | {"norm": torch.empty(1), "q.more": torch.empty(1)}
    found.require(right)
    for name in stored():
        there = dict(right)
        tensor = there.pop(name)
        fails(lambda t=there: found.require(t), f"the weight files have no '{name}'; fetch them")
        there[name] = tensor.new_empty((*tensor.shape, 1))
        said = f"'{name}' is {str(tensor.dtype)[6:]} {tuple(there[name].shape)}, and config.json"
        fails(lambda t=there: found.require(t), said, f" says {str(tensor.dtype)[6:]} ")
        there[name] = tensor.to(torch.int16)
        fails(lambda t=there: found.require(t), f"'{name}' is int16", str(tuple(tensor.shape)))
    for other in ("other.codes", "q2.zero", "codes"):
        there = {**right, other: torch.empty(1)}
        said = f"have '{other}', and config.json says nothing"
        fails(lambda t=there: found.require(t), said)
    Compression().require({"a.scale": torch.empty(1)})
