"""From pipeline text to a finished run: parsing, order, inserted providers, errors that name pass and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.options import accepted, option
from moecc.pipeline.bits import experts_bits
from moecc.pipeline.order import require_whole, resolve
from moecc.pipeline.parse import find_pass, parse_passes, pass_names
from moecc.pipeline.passes import Composite, Context, Layer, LayerPass, Pass
from moecc.pipeline.run import Hooks, run_passes

MY_PASS = Path(__file__).parents[1] / "examples" / "my_pass.py"
Tiny = Callable[[str], Program]


def order(text: str, **options: Any) -> list[str]:
    return [p.name for p in resolve(parse_passes(text, **options)[0])[0]]


def error(text: str, **options: Any) -> str:
    with pytest.raises(MoeccError) as found:
        resolve(parse_passes(text, **options)[0])
    assert "\n" not in str(found.value)
    return str(found.value)


# ---- text


def values(f: Any) -> list[Any]:
    """Values that option `f` takes, its default among them."""
    low, high = f.metadata.get("low"), f.metadata.get("high")
    found = [f.default, *f.metadata.get("choices", ())]
    if isinstance(f.default, bool):
        return [True, False]
    if low is not None and high is not None:
        kind = float if isinstance(f.default, float) else int
        found += [kind(low), kind(high), kind((low + high) / 2)]
    elif isinstance(f.default, str) and not f.metadata.get("choices"):
        found += ["some/path", "a.b-c"]
    return found


@pytest.mark.parametrize("name", pass_names())
@given(data=st.data())
def test_the_text_of_a_pass_builds_it_again(name: str, data: st.DataObject) -> None:
    cls = find_pass(name)
    p = cls(**{f.name: data.draw(st.sampled_from(values(f)), label=f.name) for f in cls.options()})
    parsed, remarks = parse_passes(str(p))
    assert parsed == [p] and str(parsed[0]) == str(p) and remarks == []


@pytest.mark.parametrize("name", pass_names())
def test_every_pass_explains_itself(name: str) -> None:
    cls = find_pass(name)
    assert cls.name == name and (cls.__doc__ or cls.__module__)
    for f in cls.options():
        assert f.metadata["help"], f.name
        assert accepted(f)
    assert str(cls()) == name


def test_a_pipeline_is_read_with_spaces_and_a_last_comma() -> None:
    parsed, _ = parse_passes(" klt{ rank=8 , bits=3 } , vq,")
    assert [str(p) for p in parsed] == ["klt{rank=8,bits=3}", "vq"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kbvqq", "no pass 'kbvqq'; did you mean 'kbvq'?"),
        ("vq{bitz=3}", "vq has no option 'bitz'; did you mean 'bits'?"),
        (
            "kbvq{zzz=3}",
            "kbvq has no option 'zzz'; it has ['bits', 'codebook', 'mean', 'offset', 'rank']",
        ),
        ("vq{bits=2,bits=3}", "vq: option 'bits' is there twice; leave one out"),
        ("vq{bits}", "vq: option 'bits' lacks a value; write bits=VALUE"),
        ("vq{bits=5}", "vq: bits=5 is out of range; it takes 2 | 3 | 4"),
        ("vq{bits=two}", "vq: bits='two' is out of range; it takes 2 | 3 | 4"),
        ("vq{rounds=0}", "vq: rounds=0 is out of range; it takes 1 <= number <= 50"),
        ("vq{rounds=2.5}", "vq: rounds='2.5' is out of range; it takes 1 <= number <= 50"),
        ("vq{feedback=maybe}", "vq: feedback='maybe' is out of range; it takes true | false"),
        (
            "vq{codebook=shared}",
            "vq: codebook='shared' is out of range; it takes auto | expert | layer",
        ),
        ("klt{rank=-1}", "klt: rank=-1 is out of range; it takes auto | 0 <= number <= 1024"),
        ("klt{rank=most}", "klt: rank='most' is out of range; it takes auto | 0 <= number <= 1024"),
        ("vsraq{value=nan}", "vsraq: value=nan is out of range; it takes 0 <= number <= 10000"),
        (
            "vq klt",
            "can't read the pipeline at column 1: 'vq klt'; expected name or name{key=value,...}",
        ),
        (
            "klt,vq{bits=3",
            "can't read the pipeline at column 5: 'vq{bits=3'; expected name or name{key=value,...}",
        ),
        (
            "klt,,vq",
            "can't read the pipeline at column 5: ',vq'; expected name or name{key=value,...}",
        ),
        ("", "no passes given; try --passes kbvq, or `moecc passes` for what there is"),
        (
            "./nothing.py",
            "no pass file nothing.py; give the path of a Python file that defines a pass",
        ),
        (
            "./my_pass",
            "./my_pass is no pass: the path of a pass file ends in .py, e.g. ./my_pass.py",
        ),
        (
            "./README.md",
            "./README.md is no pass: the path of a pass file ends in .py, e.g. ./my_pass.py",
        ),
    ],
)
def test_what_can_t_be_read_says_why(text: str, message: str) -> None:
    assert error(text) == message


def test_an_unknown_name_unlike_any_other_lists_what_there_is() -> None:
    assert error("xyzzy") == f"no pass 'xyzzy'; there are {', '.join(pass_names())}"


def test_bits_is_the_default_of_every_option_of_that_name() -> None:
    parsed, remarks = parse_passes("kbvq,moments,vq{bits=4}", bits=3)
    assert [str(p) for p in parsed] == ["kbvq{bits=3}", "moments", "vq{bits=4}"] and remarks == []


def test_a_pass_that_does_not_take_the_bits_keeps_its_own_and_says_so() -> None:
    parsed, remarks = parse_passes("dense,kbvq", bits=8)
    assert [str(p) for p in parsed] == ["dense", "kbvq"]
    assert remarks == ["kbvq keeps bits=2 (it takes 2 <= number <= 4, not 8)"]


def test_bits_that_no_pass_takes_are_an_error() -> None:
    assert error("kbvq,moments", bits=8) == (
        "no pass of 'kbvq,moments' takes --bits 8: kbvq keeps bits=2 (it takes 2 <= number <= 4, not 8)"
    )


def test_an_option_out_of_range_is_refused_in_python_too() -> None:
    with pytest.raises(MoeccError, match=r"vq: bits=7 is out of range; it takes 2 \| 3 \| 4"):
        find_pass("vq")(bits=7)  # type: ignore[call-arg]


# ---- passes of one's own


def test_a_pass_by_path_and_its_text() -> None:
    parsed, _ = parse_passes(f"{MY_PASS}{{below=0.5}}")
    assert parsed[0].name == "drop_bias" and str(parsed[0]) == f"{MY_PASS}{{below=0.5}}"
    again, _ = parse_passes(str(parsed[0]))
    assert str(again[0]) == str(parsed[0])
    assert order(f"{MY_PASS},kbvq") == ["moments", "klt", "vq", "affine", "fold", "drop_bias"]


def test_a_pass_file_that_fails_is_named(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.py", tmp_path / "empty.py"
    broken.write_text("import not_there\n")
    empty.write_text("x = 1\n")
    assert error(str(broken)) == (
        f"pass file {broken} can't be imported: ModuleNotFoundError: No module named 'not_there'"
    )
    assert error(str(empty)) == "empty.py defines 0 passes; a pass file defines one"


HEAD = """from dataclasses import dataclass
from moecc.pipeline.passes import LayerPass, option

@dataclass(frozen=True, kw_only=True)
class Mine(LayerPass):
"""
RUN = "    def run_layer(self, layer, ctx):\n        return False\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (RUN, "Mine.name is None; give a word of letters, digits, '_', '-' and '.'"),
        (
            f"    name = 'a/b'\n{RUN}",
            "Mine.name is 'a/b'; give a word of letters, digits, '_', '-' and '.'",
        ),
        (
            f"    name = 'mine'\n    requires = 'vq'\n{RUN}",
            "Mine.requires is 'vq'; give a frozenset of facts",
        ),
        (
            f"    name = 'mine'\n    provides = ['vq']\n{RUN}",
            "Mine.provides is ['vq']; give a frozenset of facts",
        ),
        ("    name = 'mine'\n", "Mine lacks run_layer"),
        (
            f"    name = 'mine'\n    by: int\n{RUN}",
            "the option 'by' has no default; write option(DEFAULT, help=...)",
        ),
    ],
)
def test_a_pass_that_does_not_say_what_it_must_is_refused(
    body: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(HEAD + body)
    assert error(str(tmp_path / "mine.py")) == f"mine.py: {message}"


def test_an_option_without_a_value_by_default(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        f"{HEAD}    name = 'mine'\n    by: int | None = option(None, help='', low=0)\n{RUN}"
    )
    assert order(f"{tmp_path}/mine.py") == ["mine"]


def test_a_path_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "my own pass.py").write_text(f"{HEAD}    name = 'mine'\n{RUN}")
    assert order(f"vq, {tmp_path}/my own pass.py , dense") == ["moments", "vq", "mine", "dense"]


@dataclass(frozen=True, kw_only=True)
class Fake(Pass):
    """A model pass that does nothing, from an entry point."""

    name: ClassVar[str] = "fake"
    provides: ClassVar[frozenset[str]] = frozenset({"moments"})
    bits: int = option(2, help="not used", choices=(2, 3))

    def run(self, program: Program, ctx: Context) -> bool:
        return False


class EntryPoint:
    """What importlib.metadata gives for an installed one."""

    def __init__(self, cls: type[Pass]):
        self.name, self.cls = cls.name, cls

    def load(self) -> type[Pass]:
        return self.cls


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[type[Pass]]]:
    """Passes that another package brings by entry point; a test appends to them."""
    found: list[type[Pass]] = []

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "moecc.passes"
        return [EntryPoint(c) for c in found if name in (None, c.name)]

    monkeypatch.setattr("moecc.registry.entry_points", entry_points)
    yield found


def test_a_pass_by_entry_point(installed: list[type[Pass]]) -> None:
    installed.append(Fake)
    assert "fake" in pass_names()
    assert parse_passes("fake{bits=3}")[0] == [Fake(bits=3)]
    assert error("fakee") == "no pass 'fakee'; did you mean 'fake'?"


def test_with_two_providers_the_user_must_choose(installed: list[type[Pass]]) -> None:
    installed.append(Fake)
    assert error("vq") == "vq requires 'moments'; provided by ['fake', 'moments']; name one of them"
    assert order("vq,fake") == ["fake", "vq"]


# ---- order


def test_what_the_user_wishes_for_becomes_an_order() -> None:
    assert order("vsraq,kbvq") == ["sensitivity", "moments", "klt", "vq", "affine", "fold", "vsraq"]


def test_a_composite_stands_for_its_passes_with_its_options() -> None:
    parsed, _ = parse_passes("kbvq{bits=3,rank=8,codebook=layer,offset=off}")
    resolved, remarks = resolve(parsed)
    assert [str(p) for p in resolved] == [
        "moments", "klt{rank=8,bits=3}", "vq{bits=3,codebook=layer}", "affine{offset=off}", "fold",
    ]  # fmt: skip
    assert remarks == [] and not any(isinstance(p, Composite) for p in resolved)
    with pytest.raises(MoeccError, match=r"kbvq stands for \['moments', .*\]; run those"):
        parsed[0].run(None, Context())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kbvq,kbvq{bits=3}", "kbvq is there twice; leave one out"),
        ("vq,vq{bits=3}", "vq is there twice; leave one out"),
        ("kbvq,vq{bits=4}", "vq is there twice (kbvq contains it); leave one out"),
        ("moments,kbvq", "moments is there twice (kbvq contains it); leave one out"),
    ],
)
def test_a_pass_that_gives_facts_stands_there_once(text: str, message: str) -> None:
    assert error(text) == message


def test_missing_providers_are_put_in_front_and_said() -> None:
    resolved, remarks = resolve(parse_passes("vq,klt{rank=4}")[0])
    assert [str(p) for p in resolved] == ["moments", "klt{rank=4}", "vq"]
    assert remarks == ["vq requires 'moments'; inserted 'moments' before it"]
    resolved, remarks = resolve(parse_passes("vsraq")[0])
    assert [p.name for p in resolved] == ["sensitivity", "moments", "vq", "affine", "fold", "vsraq"]
    assert remarks[:-1] == [
        "vsraq requires 'folded'; inserted 'fold' before it", "fold requires 'affine'; inserted 'affine' before it",
        "affine requires 'vq'; inserted 'vq' before it", "vq requires 'moments'; inserted 'moments' before it",
    ]  # fmt: skip
    assert remarks[-1] == "vsraq requires 'sensitivity'; inserted 'sensitivity' before it"


def test_facts_that_hold_already_need_no_provider() -> None:
    resolved, remarks = resolve(parse_passes("vsraq")[0], facts={"folded", "sensitivity"})
    assert [p.name for p in resolved] == ["vsraq"] and remarks == []


@dataclass(frozen=True, kw_only=True)
class NeedsMoments(LayerPass):
    """Uses what `moments` left in the layer."""

    name: ClassVar[str] = "needs_moments"
    requires: ClassVar[frozenset[str]] = frozenset({"moments"})

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        ctx.notes += [m.path for m in layer.moe if ("moments", m.path) in layer.data]
        return False


def test_what_lies_within_a_layer_is_measured_again_in_every_round_that_needs_it(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    parsed, _ = parse_passes("moments{min_tokens=2},vq")
    passes, remarks = resolve([*parsed, made("model", requires="vq"), NeedsMoments()])
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
        [parsed[0], made("model", requires="moments2"), NeedsMoments()], {"moments2"}
    )
    run_passes(tiny("M"), passes, ctx, batches)
    assert ctx.notes[-1:] == ["layers.0"]


def test_what_lies_within_a_layer_is_nothing_for_a_round_that_has_not_begun() -> None:
    alone = dataclass(frozen=True, kw_only=True)(
        type("Alone", (NeedsMoments,), {"own_round": True})
    )
    for p, what in (
        (alone(), "begins a round of its own"),
        (made("m", requires="moments"), "works on the whole model"),
    ):
        message = (
            f"requires 'moments', which holds within one layer and one round, but {p.name} {what}"
        )
        with pytest.raises(MoeccError, match=message):
            resolve([*parse_passes("moments")[0], p])


def test_the_resolved_text_resolves_to_itself() -> None:
    resolved, _ = resolve(parse_passes("vsraq{steps=5},kbvq{bits=3}")[0])
    text = ",".join(map(str, resolved))
    again, remarks = resolve(parse_passes(text)[0])
    assert ",".join(map(str, again)) == text and remarks == []


def made(
    name: str, *, requires: str = "", provides: str = "", after: str = "", spoils: str = ""
) -> Pass:
    """A model pass with these facts."""
    facts = {
        k: frozenset(v.split())
        for k, v in dict(requires=requires, provides=provides, after=after, spoils=spoils).items()
    }
    cls = dataclass(frozen=True, kw_only=True)(
        type("Made", (Pass,), {"name": name, "run": lambda self, program, ctx: False, **facts})
    )
    found: Pass = cls()
    return found


def sorted_names(*passes: Pass) -> list[str]:
    return [p.name for p in resolve(passes)[0]]


def test_ties_stay_as_typed() -> None:
    a, b, c = made("a"), made("b"), made("c")
    assert sorted_names(c, a, b) == ["c", "a", "b"] and sorted_names(b, a, c) == ["b", "a", "c"]
    user = made("user", requires="x")
    assert sorted_names(c, user, made("giver", provides="x"), a) == ["c", "giver", "user", "a"]


def test_after_and_spoils_order_without_inserting() -> None:
    later = made("later", after="x")
    assert sorted_names(later) == ["later"]
    assert sorted_names(later, made("giver", provides="x")) == ["giver", "later"]
    assert sorted_names(made("spoiler", spoils="x"), made("user", requires="x"), made("giver", provides="x")) == [
        "giver", "user", "spoiler",
    ]  # fmt: skip


def test_passes_that_need_each_other() -> None:
    a, b = made("a", requires="y", provides="x"), made("b", requires="x", provides="y")
    with pytest.raises(
        MoeccError, match=r"these passes need each other: (a -> b|b -> a); leave one out"
    ):
        resolve([a, b])


def test_a_fact_that_nothing_provides() -> None:
    with pytest.raises(
        MoeccError, match="user requires 'magic'; provided by no known pass; name one of them"
    ):
        resolve([made("user", requires="magic")])


# ---- running


@dataclass(frozen=True, kw_only=True)
class Touch(LayerPass):
    """Notes where it was; fails in one layer, or breaks the graph there, if told to."""

    name: ClassVar[str] = "touch"
    fail_in: int = option(-1, help="stage", low=-1, high=100)
    how: str = option(
        "raise", help="what goes wrong", choices=("raise", "moecc", "break", "interrupt")
    )

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        ctx.notes.append(
            f"{layer.index}: inputs before {layer.inputs.stage}, targets before {layer.targets.stage}"
        )
        if layer.index == self.fail_in:
            if self.how == "raise":
                raise RuntimeError("boom")
            if self.how == "moecc":
                raise MoeccError("it does not fit")
            if self.how == "interrupt":
                raise KeyboardInterrupt
            next(n for n in layer.program.graph.nodes if n.name == "tanh").meta.pop("layer")
        return False


def failure(program: Program, batches: list[Tensor], *passes: Pass) -> str:
    with pytest.raises(MoeccError) as found:
        run_passes(program, passes, Context(), batches)
    return str(found.value)


def test_a_failure_names_pass_layer_and_what_ran_before(tiny: Tiny, batches: list[Tensor]) -> None:
    moments = find_pass("moments")()
    message = failure(tiny("MD"), batches, moments, Touch(fail_in=2))
    assert message == "touch{fail_in=2} failed in layer 1 (after moments): RuntimeError: boom"
    assert failure(tiny("MD"), batches, Touch(fail_in=1, how="moecc")) == (
        "touch{fail_in=1,how=moecc} failed in layer 0: it does not fit"
    )


def test_a_pass_that_breaks_the_graph_is_named(tiny: Tiny, batches: list[Tensor]) -> None:
    message = failure(tiny("MD"), batches, made("first"), Touch(fail_in=2, how="break"))
    assert message.startswith(
        "touch{fail_in=2,how=break} failed in layer 1 (after first): node %tanh (aten.tanh) lacks meta"
    )


@pytest.mark.parametrize("returned", [None, "yes", 1])
def test_a_pass_says_whether_it_changed_anything(
    tiny: Tiny, batches: list[Tensor], returned: Any
) -> None:
    kind = type(
        "Silent", (LayerPass,), {"name": "silent", "run_layer": lambda self, layer, ctx: returned}
    )
    message = failure(tiny("M"), batches, dataclass(frozen=True, kw_only=True)(kind)())
    assert message == (
        f"silent failed in layer 0: it returned {returned!r}; return True or False, whether it changed the program"
    )


@pytest.mark.parametrize("value", [torch.ones(3), float("nan"), {1: {2}}])
def test_what_is_recorded_must_be_json(tiny: Tiny, batches: list[Tensor], value: Any) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        ctx.record("some.weight", share=value)
        return False

    kind = dataclass(frozen=True, kw_only=True)(
        type("Tell", (LayerPass,), {"name": "tell", "run_layer": run_layer})
    )
    message = failure(tiny("M"), batches, kind())
    assert message.startswith("tell failed in layer 0: some.weight: can't record ['share'] (")
    assert message.endswith("give finite numbers, text, lists or dicts")


def test_a_layer_that_no_longer_runs_names_what_ran(tiny: Tiny, batches: list[Tensor]) -> None:
    def run_layer(self: Pass, layer: Layer, ctx: Context) -> bool:
        for moe in layer.moe:  # nobody looks at a tensor on disk before it is read
            name = layer.program.weights[moe.gate_up.operand().name].name
            layer.program.add(name, layer.weight(moe.gate_up))
            layer.program.tensors.spill(name, lambda: torch.zeros(1))
        return bool(layer.moe)

    kind = dataclass(frozen=True, kw_only=True)(
        type("Break", (LayerPass,), {"name": "break", "run_layer": run_layer})
    )
    message = failure(tiny("MD"), batches, Touch(), kind())
    assert message.startswith(
        "layer 0 no longer runs behind touch, break: node %experts (moecc.experts) in stage 1 failed: "
    )


def test_an_interrupt_stays_an_interrupt(tiny: Tiny, batches: list[Tensor]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_passes(tiny("MD"), [Touch(fail_in=1, how="interrupt")], Context(), batches)


def test_a_model_pass_that_fails_names_no_layer(tiny: Tiny) -> None:
    def run(self: Pass, program: Program, ctx: Context) -> bool:
        raise ValueError("no luck")

    broken = dataclass(frozen=True, kw_only=True)(
        type("Broken", (Pass,), {"name": "broken", "run": run})
    )
    assert failure(tiny("M"), [], broken()) == "broken failed: ValueError: no luck"


def test_a_pass_that_needs_data_asks_for_it(tiny: Tiny) -> None:
    assert (
        failure(tiny("M"), [], find_pass("moments")())
        == "moments needs calibration text; give --calib FILE"
    )


def test_layer_passes_go_through_together_and_see_inputs_before_and_targets_after(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    ctx, dumps, layers = Context(), [], []
    hooks = Hooks(
        dump=lambda name, program, stage: dumps.append(name),
        after_layer=lambda stage, program, ctx: layers.append(stage),
    )
    run_passes(tiny("MD"), [Touch(), made("model"), Touch(), Touch()], ctx, batches, hooks)
    # the last stage is the head, whose output for all the text nobody holds
    once = [f"{i}: inputs before {i}, targets before {min(i + 1, 3)}" for i in (1, 2, 3)]
    assert ctx.notes == once + [line for line in once for _ in range(2)]
    first = [f"layer00{i}-touch" for i in (1, 2, 3)]
    second = [
        f"layer00{i}-touch-{k}" for i in (1, 2, 3) for k in (2, 3)
    ]  # a text of its own for each
    assert dumps == [*first, "01-after-touch", "02-after-model", *second, "04-after-touch"]
    assert layers == [1, 2, 3, 1, 2, 3]


@dataclass(frozen=True, kw_only=True)
class Late(Touch):
    """Begins when the passes before it have gone through all layers."""

    name: ClassVar[str] = "late"
    own_round: ClassVar[bool] = True


def test_a_round_of_one_s_own_begins_behind_all_layers(tiny: Tiny, batches: list[Tensor]) -> None:
    dumps: list[str] = []
    hooks = Hooks(dump=lambda name, program, stage: dumps.append(name))
    run_passes(tiny("MD"), [Touch(), Late(), Touch()], Context(), batches, hooks)
    first = [f"layer00{i}-touch" for i in (1, 2, 3)]
    second = [f"layer00{i}-{name}" for i in (1, 2, 3) for name in ("late", "touch-2")]
    assert dumps == [*first, "01-after-touch", *second, "03-after-touch"]


@dataclass(frozen=True, kw_only=True)
class Seen(LayerPass):
    """Notes whether the float model it is given still has dense experts."""

    name: ClassVar[str] = "seen"

    def run_layer(self, layer: Layer, ctx: Context) -> bool:
        ctx.notes += [
            str(m.node.target) for m in layer.reference.moe_layers() if m.layer == layer.index
        ]
        return False


def test_the_float_model_stays_the_float_model_behind_a_model_pass(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    ctx = Context()
    coded = resolve(parse_passes("vq")[0])[0]
    run_passes(tiny("M"), [*coded, made("model"), Seen()], ctx, batches)
    assert [note for note in ctx.notes if note.startswith("moecc")] == ["moecc.experts.default"]


@pytest.mark.parametrize(("text", "lack"), [("klt", "vq"), ("vq,affine", "folded")])
def test_a_pipeline_that_nothing_can_store_is_refused_before_it_runs(text: str, lack: str) -> None:
    resolved, _ = resolve(parse_passes(text)[0])
    with pytest.raises(MoeccError, match=f"can't be stored before '{lack}'"):
        require_whole(resolved)
    require_whole(resolve(parse_passes("klt,vq,affine,fold")[0])[0])


def test_a_layer_that_was_restored_is_not_worked_on_again(
    tiny: Tiny, batches: list[Tensor]
) -> None:
    ctx = Context()
    hooks = Hooks(restore_layer=lambda stage, program, ctx: stage < 2)
    run_passes(tiny("MD"), [Touch()], ctx, batches, hooks)
    assert [note[0] for note in ctx.notes] == ["2", "3"]


def test_facts_hold_after_a_run(tiny: Tiny) -> None:
    program = tiny("M")
    run_passes(program, [made("a", provides="x y"), made("b", spoils="x", provides="z")], Context())
    assert program.facts == {"y", "z"}


def test_reports_say_what_each_pass_did(tiny: Tiny, batches: list[Tensor]) -> None:
    seen: list[str] = []
    hooks = Hooks(after_pass=lambda report, program: seen.append(report.text))
    resolved, _ = resolve(parse_passes("klt{rank=2},vq{codebook=layer}")[0])
    result = run_passes(tiny("MD"), resolved, Context(), batches, hooks)
    assert [r.text for r in result] == seen == ["moments", "klt{rank=2}", "vq{codebook=layer}"]
    assert [r.changed for r in result] == [False, True, True]
    lines = [r.line() for r in result]
    assert (
        lines[0].startswith("moments: ")
        and "nothing changed" in lines[0]
        and "nothing changed" not in lines[2]
    )
    assert "bits/weight, error 0." in lines[2]
    assert result[0].bits == 32.0 and len({r.bits for r in result}) == 3  # each pass its own


def test_a_pass_that_stands_there_twice_has_two_reports(tiny: Tiny, batches: list[Tensor]) -> None:
    """Layer passes of one group do, and model passes."""
    seen: list[int] = []

    def first_time(self: Pass, layer: Layer, ctx: Context) -> bool:
        seen.append(layer.index)
        return seen.count(layer.index) == 1

    once = dataclass(frozen=True, kw_only=True)(
        type("Once", (LayerPass,), {"name": "once", "run_layer": first_time})
    )()
    passes, _ = resolve([made("model"), once, once, made("model")])
    reports = run_passes(tiny("MD"), passes, Context(), batches)
    assert [(r.text, r.changed) for r in reports] == [
        ("model", False), ("once", True), ("once", False), ("model", False),
    ]  # fmt: skip


def test_bits_of_float_experts_are_what_the_checkpoint_stores(tiny: Tiny) -> None:
    program = tiny("M")
    assert experts_bits(program) == 32.0
    store: Any = program.store
    store.tensors = {name: t.bfloat16() for name, t in store.tensors.items()}
    assert experts_bits(program) == 16.0


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_bits_of_compressed_experts_count_every_tensor(
    tiny: Tiny, batches: list[Tensor], bits: int
) -> None:
    program = tiny("M")
    resolved, _ = resolve(
        parse_passes(f"klt{{rank=2}},vq{{bits={bits}}},affine{{offset=on}},fold")[0]
    )
    run_passes(program, resolved, Context(), batches)
    moe = program.moe_layers()[0]
    held = [
        program.read(program.weights[n.name].name)
        for n in moe.node.all_input_nodes
        if n.name in program.weights
    ]
    stored = sum(8 * t.numel() * t.element_size() for t in held)
    assert experts_bits(program) == stored / (4 * 16 * 16 + 4 * 16 * 8)
