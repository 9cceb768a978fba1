"""The order of passes: composites, inserted providers, ties, and facts that hold within a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
from pipelines import Tiny, derive, idle, order, refusal, resolved
from torch import Tensor

from moecc.errors import MoeccError
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import parse_passes
from moecc.pipeline.passes import Composite, Context, Layer, LayerPass, Pass
from moecc.pipeline.run import run_passes


def test_passes_run_in_the_order_of_their_facts() -> None:
    assert order("vsraq,kbvq") == ["sensitivity", "moments", "klt", "vq", "affine", "fold", "vsraq"]


def test_a_composite_stands_for_its_passes_with_its_options() -> None:
    parsed, _ = parse_passes("kbvq{bits=3,rank=8,codebook=layer,offset=off}")
    passes, remarks = resolve(parsed)
    assert [str(p) for p in passes] == [
        "moments",
        "klt{rank=8,bits=3}",
        "vq{bits=3,codebook=layer}",
        "affine{offset=off}",
        "fold",
    ]
    assert remarks == [] and not any(isinstance(p, Composite) for p in passes)
    with pytest.raises(MoeccError, match=r"kbvq stands for \['moments', .*\]; run those"):
        parsed[0].run(None, Context())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "stands_for"),
    [
        ("kbvq", "moments,klt,vq,affine,fold"),
        (
            "kbvq{bits=4,rank=8,mean=off,codebook=layer,offset=on}",
            "moments,klt{rank=8,mean=off,bits=4},vq{bits=4,codebook=layer},affine{offset=on},fold",
        ),
        ("kbvq{codebook=expert}", "moments,klt,vq,affine,fold"),
        (
            "kbvq{bits=3.5}",
            "sensitivity,budget{bits=3.5},moments,klt,vq,affine{offset=off},fold",
        ),
        (
            "kbvq{bits=2.25,rank=8,mean=off,codebook=layer}",
            "sensitivity,budget{bits=2.25,rank=8,mean=off,codebook=layer},moments,"
            "klt{rank=8,mean=off},vq{codebook=layer},affine{offset=off},fold",
        ),
    ],
)
def test_kbvq_hands_its_options_to_its_passes(text: str, stands_for: str) -> None:
    assert ",".join(map(str, resolved(text))) == stands_for


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kbvq,kbvq{bits=3}", "kbvq is there twice; leave one out"),
        ("vq,vq{bits=3}", "vq is there twice; leave one out"),
        ("kbvq,vq{bits=4}", "vq is there twice (kbvq contains it); leave one out"),
        ("moments,kbvq", "moments is there twice (kbvq contains it); leave one out"),
    ],
)
def test_a_pass_that_provides_facts_may_not_stand_twice(text: str, message: str) -> None:
    assert refusal(text) == message


def test_missing_providers_are_inserted_with_a_remark() -> None:
    passes, remarks = resolve(parse_passes("vq,klt{rank=4}")[0])
    assert [str(p) for p in passes] == ["moments", "klt{rank=4}", "vq"]
    assert remarks == ["vq requires 'moments'; inserted 'moments' before it"]
    passes, remarks = resolve(parse_passes("vsraq")[0])
    assert [p.name for p in passes] == ["sensitivity", "moments", "vq", "affine", "fold", "vsraq"]
    assert remarks[:-1] == [
        "vsraq requires 'folded'; inserted 'fold' before it",
        "fold requires 'affine'; inserted 'affine' before it",
        "affine requires 'vq'; inserted 'vq' before it",
        "vq requires 'moments'; inserted 'moments' before it",
    ]
    assert remarks[-1] == "vsraq requires 'sensitivity'; inserted 'sensitivity' before it"


def test_facts_that_hold_already_need_no_provider() -> None:
    passes, remarks = resolve(parse_passes("vsraq")[0], facts={"folded", "sensitivity"})
    assert [p.name for p in passes] == ["vsraq"] and remarks == []


@dataclass(frozen=True, kw_only=True)
class NeedsMoments(LayerPass):
    """Notes the MoE layers for which `moments` left its measurements."""

    name: ClassVar[str] = "needs_moments"
    requires: ClassVar[frozenset[str]] = frozenset({"moments"})

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        ctx.notes += [m.path for m in layer.moe if ("moments", m.path) in layer.data]
        return False


def test_facts_within_a_layer_are_measured_again_in_every_round_that_needs_them(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    parsed, _ = parse_passes("moments{min_tokens=2},vq")
    passes, remarks = resolve([*parsed, idle("model", requires="vq"), NeedsMoments()])
    names = ["moments", "vq", "model", "needs_moments"]
    assert [p.name for p in passes] == [*names[:3], "moments", "needs_moments"]
    assert str(passes[3]) == "moments{min_tokens=2}"
    assert remarks == [
        "needs_moments requires 'moments'; 'moments' runs again before it, in its round"
    ]
    assert resolve(passes) == (passes, remarks)
    passes, remarks = resolve([parsed[0], NeedsMoments(), parsed[1]])
    assert [p.name for p in passes] == ["moments", "needs_moments", "vq"] and not remarks
    ctx = Context()
    passes, _ = resolve(
        [parsed[0], idle("model", requires="moments2"), NeedsMoments()], {"moments2"}
    )
    run_passes(tiny("M"), passes, ctx, batches)
    assert ctx.notes[-1:] == ["layers.0"]


def test_facts_within_a_layer_do_not_reach_a_later_round() -> None:
    alone = derive(NeedsMoments, "alone", own_round=True)
    whole = idle("whole", requires="moments")
    for p, reason in ((alone, "begins a round of its own"), (whole, "works on the whole model")):
        message = f"which holds within one layer and one round, but {p.name} {reason}"
        with pytest.raises(MoeccError, match=f"requires 'moments', {message}"):
            resolve([*parse_passes("moments")[0], p])


def test_the_resolved_text_resolves_to_itself() -> None:
    text = ",".join(map(str, resolved("vsraq{steps=5},kbvq{bits=3}")))
    again, remarks = resolve(parse_passes(text)[0])
    assert ",".join(map(str, again)) == text and remarks == []


def sorted_names(*passes: Pass) -> list[str]:
    return [p.name for p in resolve(passes)[0]]


def test_ties_stay_as_typed() -> None:
    a, b, c = idle("a"), idle("b"), idle("c")
    assert sorted_names(c, a, b) == ["c", "a", "b"] and sorted_names(b, a, c) == ["b", "a", "c"]
    user = idle("user", requires="x")
    assert sorted_names(c, user, idle("giver", provides="x"), a) == ["c", "giver", "user", "a"]


def test_after_and_spoils_order_without_inserting() -> None:
    later = idle("later", after="x")
    assert sorted_names(later) == ["later"]
    assert sorted_names(later, idle("giver", provides="x")) == ["giver", "later"]
    spoiler, user = idle("spoiler", spoils="x"), idle("user", requires="x")
    giver = idle("giver", provides="x")
    assert sorted_names(spoiler, user, giver) == ["giver", "user", "spoiler"]


def test_passes_that_make_the_float_model_come_before_all_that_they_need_nothing_of() -> None:
    def maker(name: str, **facts: str) -> Pass:
        sets = {key: frozenset(value.split()) for key, value in facts.items()}
        run = lambda self, program, ctx: False  # noqa: E731
        return derive(Pass, name, run=run, makes_reference=True, **sets)

    a, b, giver = idle("a"), idle("b"), idle("giver", provides="x")
    assert sorted_names(a, maker("n"), b, maker("m")) == ["n", "m", "a", "b"]
    assert sorted_names(a, giver, b, maker("m", requires="x")) == ["giver", "m", "a", "b"]
    spoiler = maker("m", spoils="y")  # not before what it would spoil
    assert sorted_names(a, spoiler, idle("user", requires="y"), giver, idle("y", provides="y")) == [
        *("y", "user", "m"),
        *("a", "giver"),
    ]


def test_passes_that_need_each_other_are_refused() -> None:
    a, b = idle("a", requires="y", provides="x"), idle("b", requires="x", provides="y")
    message = r"these passes need each other: (a -> b|b -> a); leave one out"
    with pytest.raises(MoeccError, match=message):
        resolve([a, b])


def test_a_fact_that_no_pass_provides_is_refused() -> None:
    message = "user requires 'magic'; provided by no known pass; name one of them"
    with pytest.raises(MoeccError, match=message):
        resolve([idle("user", requires="magic")])


@pytest.mark.parametrize(("text", "lack"), [("klt", "vq"), ("vq,affine", "folded")])
def test_a_pipeline_that_nothing_can_store_is_refused_before_it_runs(text: str, lack: str) -> None:
    with pytest.raises(MoeccError, match=f"can't be stored before '{lack}'"):
        require_whole(resolved(text))
    require_whole(resolved("klt,vq,affine,fold"))
