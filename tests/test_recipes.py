"""Which checkpoint tensors make a model's: names alone decide, and the first of two ways counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from moecc.checkpoint import recipes
from moecc.checkpoint.recipes import Recipe, Recipes

UP = "model.layers.0.experts.up"
MERGED = WeightConverter(
    ["experts.*.gate.weight", "experts.*.up.weight"],
    "experts.up",
    [MergeModulelist(dim=0), Concatenate(dim=1)],
)
SPLIT = WeightConverter("attn.qk.weight", ["attn.q.weight", "attn.k.weight"], [Chunk(dim=0)])


@dataclass
class Model:
    """What `Recipes` asks of a model: the names and values that it declares."""

    declared: Mapping[str, Tensor]
    buffers: Sequence[str] = ()
    config: object = None
    base_model_prefix: str = "model"

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.declared)

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        return [(name, torch.empty(0)) for name in self.buffers]


@dataclass
class Tied(Model):
    """A model with tied weights, alias -> owner."""

    all_tied_weights_keys: dict[str, str] = field(default_factory=dict)


@dataclass
class Picky(Model):
    """A model that says which names may be missing or left over."""

    _keys_to_ignore_on_load_missing: Sequence[str] = (r"\.bias$", "mask")
    _keys_to_ignore_on_load_unexpected: Sequence[str] = (r"^model\.mtp\.",)


def declared(*names: str) -> dict[str, Tensor]:
    return {name: torch.empty(1) for name in names}


@pytest.fixture(autouse=True)
def _conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [WeightRenaming("old", "new"), MERGED, SPLIT]
    monkeypatch.setattr(recipes, "get_model_conversion_mapping", lambda model: rules)


def test_experts_are_merged_in_the_order_of_their_numbers() -> None:
    stored = {
        f"model.layers.0.experts.{e}.{part}.weight": torch.full((2, 3), 10.0 * e + i)
        for e in range(12)
        for i, part in enumerate(("gate", "up"))
    }
    found: Any = Recipes(Model(declared(UP)), reversed(stored))
    recipe = found.get(UP)
    assert recipe.per_expert and set(recipe.keys) == set(stored)
    whole = recipe.make(found.model, stored.__getitem__)
    assert whole.keys() == {UP} and whole[UP].shape == (12, 4, 3)
    for e in range(12):
        assert whole[UP][e, :2].eq(10 * e).all() and whole[UP][e, 2:].eq(10 * e + 1).all()
    read: list[str] = []

    def load(name: str) -> Tensor:
        read.append(name)
        return stored[name]

    some = recipe.make(found.model, load, [10, 2])
    assert torch.equal(some[UP], whole[UP][[10, 2]])
    assert sorted(read) == sorted(n for n in stored if ".10." in n or ".2." in n)


def test_a_tensor_that_is_split_makes_several_by_one_recipe() -> None:
    names = ["model.attn.q.weight", "model.attn.k.weight", "model.norm.weight"]
    found: Any = Recipes(Model(declared(*names)), ["model.attn.qk.weight", "model.norm.weight"])
    assert found.missing == [] and not found.get(names[0]).per_expert
    groups = {tuple(group): recipe for recipe, group in found.groups()}
    assert groups.keys() == {(names[0], names[1]), (names[2],)}
    assert groups[names[0], names[1]] is found.get(names[0]) is found.get(names[1])
    both = torch.arange(8.0).view(4, 2)
    made = found.get(names[1]).make(found.model, lambda name: both)
    assert made.keys() == {names[0], names[1]}
    assert torch.equal(made[names[0]], both[:2]) and torch.equal(made[names[1]], both[2:])
    # a part that this model doesn't declare is made and left
    found = Recipes(Model(declared(names[1], names[0])), ["model.attn.qk.weight"])
    assert [group for _, group in found.groups()] == [[names[0], names[1]]]
    found = Recipes(Model(declared(names[0])), ["model.attn.qk.weight"])
    assert [group for _, group in found.groups()] == [[names[0]]]


@pytest.mark.parametrize(
    ("operations", "expected"),
    [
        ([MergeModulelist(dim=0)], True),
        ([MergeModulelist(dim=0), Concatenate(dim=1)], True),
        ([MergeModulelist(dim=0), Concatenate(dim=2), Concatenate(dim=1)], True),
        ([MergeModulelist(dim=0), Concatenate(dim=0)], False),
        ([MergeModulelist(dim=0), Concatenate(dim=1), Transpose()], False),
        ([MergeModulelist(dim=1), Concatenate(dim=1)], False),
        ([Concatenate(dim=1)], False),
    ],
)
def test_experts_can_be_made_one_by_one_if_no_step_mixes_them(
    operations: list[Any], expected: bool
) -> None:
    assert Recipe("x", WeightConverter("a", "b", operations)).per_expert is expected
    assert not Recipe("x", None).per_expert


def test_the_first_of_two_ways_to_make_a_tensor_counts() -> None:
    names = ["model.a.new.w", "model.a.old.w", "model.b.old.w"]
    found: Any = Recipes(Model(declared("model.a.new.w", "model.b.new.w")), names)
    assert found.get("model.a.new.w").keys == ["model.a.new.w"]
    assert found.get("model.b.new.w").keys == ["model.b.old.w"]
    assert found.unexpected == ["model.a.old.w"]
    # a stored fused tensor and the parts of the same one
    parts = [f"model.layers.0.experts.0.{part}.weight" for part in ("gate", "up")]
    found = Recipes(Model(declared(UP)), [*parts, UP])
    assert found.get(UP).keys == parts and found.unexpected == [UP]


def test_a_name_that_a_rule_leads_astray_is_the_model_s_own_if_it_has_it() -> None:
    model: Any = Model(declared("model.old.w", "model.x.w", "y.w"))
    found = Recipes(model, ["old.w", "model.old.w", "x.w", "model.y.w"])
    sources = {name: recipe.keys for name in found.declared if (recipe := found.get(name))}
    assert sources == {"model.old.w": ["model.old.w"], "model.x.w": ["x.w"], "y.w": ["model.y.w"]}
    assert found.unexpected == ["old.w"] and found.get("nothing") is None
    assert "model.x.w" in found and "x.w" not in found


def test_names_that_may_be_missing_or_left_over_are_no_fault() -> None:
    found = Recipes(
        Picky(declared("model.a.w", "model.a.bias", "model.mask.w", "model.biases")),
        ["model.mtp.10.w", "model.mtp.9.w", "x.model.mtp.w", "model.stray.10", "model.stray.9"],
    )
    assert found.missing == ["model.a.w", "model.biases"]
    assert found.ignored == ["model.mtp.9.w", "model.mtp.10.w"]
    assert found.unexpected == ["model.stray.9", "model.stray.10", "x.model.mtp.w"]


def test_buffers_that_a_model_computes_itself_are_ignored() -> None:
    keys = ["model.h.0.rotary_emb.inv_freq", "position_ids", "model.emb.position_ids"]
    others = ["model.my_position_ids", "model.position_ids.w", "model.rotary_emb_inv_freq"]
    for buffers, ignored in (
        (["model.rotary_emb.inv_freq", "model.emb.position_ids"], keys),
        (["inv_freq"], keys[:1]),
        (["position_ids"], keys[1:]),
        (["inv_freq.x"], []),
        ([], []),
    ):
        found = Recipes(Model({}, buffers), [*keys, *others])
        assert sorted(found.ignored) == sorted(ignored)
        assert sorted(found.unexpected) == sorted({*keys, *others} - set(ignored))


def test_a_tied_weight_without_a_tensor_of_its_own_is_that_of_another() -> None:
    names = ["owner", "c", "b", "alone", "head", "lone"]
    model: Any = Tied(
        declared(*names),
        all_tied_weights_keys={"c": "owner", "b": "owner", "head": "alone"},
    )

    def tied(*stored: str) -> tuple[dict[str, str], list[str]]:
        found = Recipes(model, stored)
        for name, other in found.tied.items():
            recipe = found.get(name)
            assert recipe is not None and recipe.keys == [other] and name in found
        return found.tied, found.missing

    assert tied("owner", "lone") == ({"c": "owner", "b": "owner"}, ["alone", "head"])
    assert tied("c", "b", "head", "lone") == ({"owner": "b", "alone": "head"}, [])
    assert tied("owner", "c", "alone") == ({"b": "owner", "head": "alone"}, ["lone"])
    assert tied(*names) == ({}, [])
