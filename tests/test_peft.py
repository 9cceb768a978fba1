"""Which weight a LoRA matrix updates, and by how much, on a store made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import adapter, linear
from safetensors.torch import save_file
from torch import Tensor, fx

from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.ir.tensors import Weight
from moecc.passes._tune.adapter_settings import Settings
from moecc.passes._tune.peft import Adapter, adapter_files, require_fitting
from moecc.passes._tune.update import Update

LINEAR, EXPERTS = "layers.0.linear", "layers.1"
PARAMETERS = ["1.gate_up", "layers.1.down"]  # ends of their names


@pytest.fixture
def program(tiny: Callable[[str], Program]) -> Program:
    """A linear [16, 16]; of four experts gate_up [4, 16, 16] and down [4, 16, 8]."""
    return tiny("DM")


def updates(
    program: Program, folder: Path, shapes: dict[str, tuple[int, ...]], **config: Any
) -> tuple[dict[str, Update], dict[str, Tensor]]:
    """Return what an adapter updates, and its tensors."""
    tensors = adapter(folder, shapes, **config)
    return Adapter.read("lora", str(folder)).updates(program), tensors


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 6}, 6 / 3),
        ({"lora_alpha": 6, "use_rslora": True}, 6 / math.sqrt(3)),
        ({"alpha_pattern": {"other": 1, "linear": 2, "layers.0.linear": 4}}, 2 / 3),
    ],
)
def test_a_linear_gets_its_scaled_product(
    config: dict[str, Any], scaling: float, program: Program, tmp_path: Path
) -> None:
    found, tensors = updates(program, tmp_path, linear(LINEAR, 16, 16, rank=3), **config)
    assert list(found) == [f"{LINEAR}.weight"]
    a, b = (tensors[f"base_model.model.{LINEAR}.lora_{side}.weight"].tolist() for side in "AB")
    want = [
        [scaling * sum(b[n][r] * a[r][k] for r in range(3)) for k in range(16)] for n in range(16)
    ]
    torch.testing.assert_close(found[f"{LINEAR}.weight"].delta(), torch.tensor(want))


@pytest.mark.parametrize("transposed", [False, True])
def test_parameters_of_experts_are_told_apart_by_depth_and_updated_one_by_one(
    transposed: bool, program: Program, tmp_path: Path
) -> None:
    """Rank 2: rows of A go expert by expert, columns of B have the expert running fastest."""
    rows, columns = 16, 8
    if transposed:
        graph = fx.symbolic_trace(lambda x: x.transpose(1, 2))
        place = program.moe_layers()[0].operand("down").name
        program.weights[place] = Weight("derived", graph, ("layers.1.down",))
        rows, columns = columns, rows
    outer, inner = linear(EXPERTS, rows, columns, 8), linear(f"{EXPERTS}.base_layer", 16, 16, 8)
    found, tensors = updates(program, tmp_path, {**outer, **inner}, target_parameters=PARAMETERS)
    assert set(found) == {"layers.1.gate_up", "layers.1.down"}
    for name, module, shape in (
        ("layers.1.gate_up", f"{EXPERTS}.base_layer", (16, 16)),
        ("layers.1.down", EXPERTS, (rows, columns)),
    ):
        a, b = (tensors[f"base_model.model.{module}.lora_{side}.weight"].tolist() for side in "AB")
        want = torch.tensor(
            [
                [
                    [
                        4 * sum(b[n][4 * r + e] * a[2 * e + r][k] for r in range(2))
                        for k in range(shape[1])
                    ]
                    for n in range(shape[0])
                ]
                for e in range(4)
            ]
        )
        flipped = transposed and name == "layers.1.down"
        torch.testing.assert_close(found[name].delta(), want.mT if flipped else want)
        assert str(found[name]) == "rank 2, scaling 4"


LACKS = "the model has no weight for the adapter of"


@pytest.mark.parametrize(
    ("shapes", "config", "says"),
    [
        (
            linear(LINEAR, 16, 8),
            {},
            "of layers.0.linear.weight updates [16, 8], but the weight is [16, 16]",
        ),
        (
            linear(EXPERTS, 16, 8, 6),
            {"target_parameters": ["down"]},
            "of layers.1.down updates [4, 16, 8], but",
        ),
        (linear(EXPERTS, 16, 8, 8), {}, f"{LACKS} 'layers.1'"),
        (linear(f"{LINEAR}.base_layer", 16, 16), {}, f"{LACKS} 'layers.0.linear'"),
        (linear("linear", 16, 16), {}, f"{LACKS} 'linear'"),
        (linear(f"{EXPERTS}.base_layer", 16, 8, 8), {"target_parameters": ["down"]}, LACKS),
        (linear(EXPERTS, 16, 8, 8), {"target_parameters": ["own"]}, LACKS),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    shapes: dict[str, tuple[int, ...]],
    config: dict[str, Any],
    says: str,
    program: Program,
    tmp_path: Path,
) -> None:
    adapter(tmp_path, shapes, **config)
    with pytest.raises(MoeccError) as error:
        require_fitting("lora", str(tmp_path), program)
    assert says in str(error.value) and "model" in str(error.value).rpartition(";")[2]


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("head", "embed.weight, layers.0.linear.weight"),
        ("embed", "head.weight, layers.0.linear.weight"),
    ],
)
def test_an_update_of_a_tied_weight_is_refused(
    module: str, others: str, program: Program, tmp_path: Path
) -> None:
    store: Any = program.store
    store.tied = {"head.weight": "embed.weight", f"{LINEAR}.weight": "embed.weight"}
    adapter(tmp_path, linear(module, 16, 16))
    with pytest.raises(MoeccError) as error:
        require_fitting("lora", str(tmp_path), program)
    assert f"updates {module}.weight, which is tied to {others}; untie" in str(error.value)
    store.tied = {"other": "embed.weight"}
    if module == "head":
        require_fitting("lora", str(tmp_path), program)


def test_the_files_of_an_adapter_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(
        MoeccError, match=r"^absorb: no adapter given; write absorb\{path=FOLDER\}$"
    ):
        adapter_files("absorb", "")
    adapter(tmp_path, {})
    names = ["adapter_config.json", "adapter_model.safetensors"]
    assert adapter_files("lora", str(tmp_path)) == [tmp_path / name for name in names]
    for name in names:
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(MoeccError, match=f": no {name}; give a folder that PEFT saved"):
            adapter_files("lora", str(tmp_path))
        (tmp_path / "away").rename(tmp_path / name)


# ---- settings


def test_plain_settings_are_read(tmp_path: Path) -> None:
    for config in (
        {"bias": None, "init_lora_weights": False, "alpha_pattern": None},
        {"init_lora_weights": "eva", "target_parameters": None, "use_rslora": None},
        {"init_lora_weights": True, "use_dora": False, "modules_to_save": []},
    ):
        adapter(tmp_path, {}, **config)
        want = Settings(alpha=8.0, patterns=(), rank_stabilized=False, parameters=())
        assert Settings.read(tmp_path / "adapter_config.json") == want
    adapter(tmp_path, {}, use_rslora=True, target_parameters=["a", "b"], lora_alpha=0.5)
    found = Settings.read(tmp_path / "adapter_config.json")
    assert (found.alpha, found.rank_stabilized, found.parameters) == (0.5, True, ("a", "b"))
    assert found.scaling("any", 4) == 0.25 and found.scaling("any", 0) == 0.5


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"use_dora": True, "bias": "all"}, "use_dora, bias in its adapter_config.json"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' in its"),
        ({"peft_type": "IA3"}, "an adapter of type 'IA3'; moecc merges LORA"),
        ({"lora_alpha": None}, "no lora_alpha; save the adapter again"),
        ({"lora_alpha": 1e30}, "'lora_alpha' is '1e+30'"),
        ({"lora_alpha": -1e30}, "'lora_alpha' is '-1e+30'"),
        ({"lora_alpha": True}, "'lora_alpha' is 'True'"),
        ({"alpha_pattern": {"q": "3"}}, "'q' is '3'; save the adapter again"),
        ({"alpha_pattern": ["q"]}, "'alpha_pattern' is \"['q']\""),
        ({"target_parameters": "down"}, "'target_parameters' is 'down'"),
        ({"alpha_pattern": {"a" * 501: 3}}, "in alpha_pattern is no simple pattern"),
        ({"alpha_pattern": {".*a.*b.*": 3}}, "in alpha_pattern is no simple pattern"),
    ],
)
def test_settings_that_are_no_plain_lora_are_refused(
    config: dict[str, Any], says: str, tmp_path: Path
) -> None:
    adapter(tmp_path, {}, **config)
    with pytest.raises(MoeccError) as error:
        Settings.read(tmp_path / "adapter_config.json")
    assert says in str(error.value) and str(error.value).startswith(str(tmp_path))


def test_a_pattern_may_be_long_and_repeat_twice(tmp_path: Path) -> None:
    adapter(tmp_path, {}, alpha_pattern={"a" * 500: 3, r".*b\.\d+": 4})
    found = Settings.read(tmp_path / "adapter_config.json")
    assert found.scaling("x." + "a" * 500, 1) == 3 and found.scaling("x.b.17", 2) == 2
    assert found.scaling("x.b.17.c", 1) == 8 == found.scaling("xb.1x", 1)


# ---- the file of tensors


@pytest.mark.parametrize(
    ("key", "nesting"),
    [
        ("base_model.model.layers.0.linear.lora_A.weight", 0),
        ("layers.0.linear.lora_A.default.weight", 0),
        ("base_model.model.layers.0.linear.base_layer.base_layer.lora_A.weight", 2),
    ],
)
def test_a_key_gives_module_and_nesting(key: str, nesting: int, tmp_path: Path) -> None:
    adapter(tmp_path, {})
    pair = {key: torch.ones(3, 4), key.replace("lora_A", "lora_B"): torch.zeros(5, 3)}
    save_file(pair, tmp_path / "adapter_model.safetensors")
    found = Adapter.read("lora", str(tmp_path)).pairs
    assert list(found) == [(LINEAR, nesting)]
    assert {side: tuple(t.shape) for side, t in found[LINEAR, nesting].items()} == {
        "A": (3, 4),
        "B": (5, 3),
    }
    assert bool((found[LINEAR, nesting]["A"] == 1).all())


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"x.lora_A": (2, 4)}, "'x' has lora_A alone"),
        ({"x.lora_B": (4, 2)}, "'x' has lora_B alone"),
        ({"x.lora_A": (2, 4), "x.lora_B": (2, 3)}, "'x' has lora_A of rank 2 and lora_B of rank 3"),
        ({"x.lora_C": (2, 4)}, "'base_model.model.x.lora_C.weight' is no LoRA matrix"),
        ({"x.lora_A": (2, 4, 1)}, "is no LoRA matrix"),
    ],
)
def test_matrices_come_in_pairs_of_one_rank(
    tensors: dict[str, tuple[int, ...]], says: str, tmp_path: Path
) -> None:
    adapter(tmp_path, tensors)
    with pytest.raises(MoeccError) as error:
        Adapter.read("lora", str(tmp_path))
    assert says in str(error.value)
