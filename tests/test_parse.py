"""Pipeline text: what it parses to, what it refuses, and where passes come from."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, fields
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import MY_PASS, order, refusal

from moecc import registry
from moecc.errors import MoeccError
from moecc.ir.program import Program
from moecc.options import accepted, option
from moecc.pipeline.parse import find_pass, parse_passes, pass_classes, pass_names
from moecc.pipeline.passes import Composite, Context, Pass

# ---- text


def values(f: Field[Any]) -> list[Any]:
    """Return values that the option `f` takes, its default among them."""
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
    for f in fields(cls):
        if f.name != "passed_on":  # a composite prints it as options of its parts
            assert f.metadata["help"], f.name
            assert accepted(f)
    assert str(cls()) == name


def test_a_pipeline_is_read_with_spaces() -> None:
    parsed, _ = parse_passes(" klt{ rank=8 , bits=3 } , vq{ } ")
    assert [str(p) for p in parsed] == ["klt{rank=8,bits=3}", "vq"]


RANGES = {
    "vq{bits=5}": "vq: bits=5 is out of range; it takes 2 | 3 | 4",
    "vq{bits=two}": "vq: bits='two' is no whole number; it takes 2 | 3 | 4",
    "vq{rounds=0}": "vq: rounds=0 is out of range; it takes 1 <= number <= 50",
    "vq{rounds=2.5}": "vq: rounds='2.5' is no whole number; it takes 1 <= number <= 50",
    "vq{feedback=maybe}": "vq: feedback='maybe' is out of range; it takes true | false",
    "vq{codebook=any}": "vq: codebook='any' is out of range; it takes auto | expert | layer",
    "klt{rank=-1}": "klt: rank=-1 is out of range; it takes auto | 0 <= number <= 1024",
    "klt{rank=most}": "klt: rank='most' is no whole number; it takes auto | 0 <= number <= 1024",
    "kbvq{bits=two}": "kbvq: bits='two' is no number; it takes 2 <= number <= 4",
    "vsraq{value=nan}": "vsraq: value=nan is out of range; it takes 0 <= number <= 10000",
}
EXPECTED = "expected name or name{key=value,...}"
ENDS_IN_PY = "is no pass: the path of a pass file ends in .py, e.g. ./my_pass.py"
UNREADABLE = {
    "kbvqq": "no pass 'kbvqq'; did you mean 'kbvq'?",
    "KBVQ": "no pass 'KBVQ'; did you mean 'kbvq'?",
    "vq{BITS=3}": "vq has no option 'BITS'; did you mean 'bits'?",
    "vq{bitz=3}": "vq has no option 'bitz'; did you mean 'bits'?",
    "kbvq{zzz=3}": (
        "kbvq has no option 'zzz'; it has ['behind', 'bits', 'codebook', 'feedback', 'mean', "
        "'min_tokens', 'offset', 'rank', 'rounds', 'routing', 'tokens']"
    ),
    "kbvq{round=8}": "kbvq has no option 'round'; did you mean 'rounds'?",
    "vq{bits=2,bits=3}": "vq: option 'bits' is there twice; leave one out",
    "vq{bits}": "vq: option 'bits' lacks a value; write bits=VALUE",
    "vq klt": f"can't read the pipeline at column 1: 'vq klt'; {EXPECTED}",
    "klt,vq{bits=3": f"can't read the pipeline at column 5: 'vq{{bits=3'; {EXPECTED}",
    "klt,,vq": f"can't read the pipeline at column 5: ',vq'; {EXPECTED}",
    "vq, ": "the pipeline 'vq, ' ends in a comma; take it away or name what follows",
    "vq{bits=2,}": "vq: there is a comma too many in {bits=2,}; take it away",
    "": "no passes given; `moecc passes` lists what there is",
    "./nothing.py": "no pass file nothing.py; give the path of a Python file that defines a pass",
    "./my_pass": f"./my_pass {ENDS_IN_PY}",
    "./README.md": f"./README.md {ENDS_IN_PY}",
}


@pytest.mark.parametrize(("text", "message"), [*RANGES.items(), *UNREADABLE.items()])
def test_text_that_cannot_be_read_is_refused_with_a_reason(text: str, message: str) -> None:
    assert refusal(text) == message


def test_an_unknown_name_unlike_any_other_lists_all_passes() -> None:
    assert refusal("xyzzy") == f"no pass 'xyzzy'; there are {', '.join(pass_names())}"


def test_bits_is_the_default_of_every_option_of_that_name() -> None:
    parsed, remarks = parse_passes("kbvq,moments,vq{bits=4}", bits=3)
    assert [str(p) for p in parsed] == ["kbvq{bits=3}", "moments", "vq{bits=4}"] and remarks == []
    assert [str(p) for p in parse_passes("vq", bits=3.0)[0]] == ["vq{bits=3}"]
    assert [str(p) for p in parse_passes("kbvq", bits=2.5)[0]] == ["kbvq{bits=2.5}"]


def test_a_pass_that_does_not_take_the_bits_keeps_its_own_and_says_so() -> None:
    parsed, remarks = parse_passes("dense,kbvq", bits=8)
    assert [str(p) for p in parsed] == ["dense", "kbvq"]
    assert remarks == ["kbvq keeps bits=2 (it takes 2 <= number <= 4, not 8)"]


@pytest.mark.parametrize("bits", [math.inf, -math.inf, math.nan])
def test_bits_that_are_no_finite_number_are_refused(bits: float) -> None:
    assert (
        refusal("kbvq", bits=bits)
        == f"bits={bits} is no number that a pass takes; give a finite one"
    )


def test_bits_that_no_pass_takes_are_refused() -> None:
    assert refusal("kbvq,moments", bits=8) == (
        "no pass of 'kbvq,moments' takes --bits 8: "
        "kbvq keeps bits=2 (it takes 2 <= number <= 4, not 8)"
    )


def test_an_option_out_of_range_is_refused_in_python_too() -> None:
    with pytest.raises(MoeccError, match=r"vq: bits=7 is out of range; it takes 2 \| 3 \| 4"):
        find_pass("vq")(bits=7)  # type: ignore[call-arg]


# ---- passes of a user's own


def test_a_pass_is_found_by_its_path_and_keeps_it_in_its_text() -> None:
    parsed, _ = parse_passes(f"{MY_PASS}{{below=0.5}}")
    assert parsed[0].name == "drop_bias" and str(parsed[0]) == f"{MY_PASS}{{below=0.5}}"
    again, _ = parse_passes(str(parsed[0]))
    assert str(again[0]) == str(parsed[0])
    assert order(f"{MY_PASS},kbvq") == ["moments", "klt", "vq", "affine", "fold", "drop_bias"]


def test_a_pass_file_that_fails_is_named(tmp_path: Path) -> None:
    broken, empty = tmp_path / "broken.py", tmp_path / "empty.py"
    broken.write_text("import not_there\n")
    empty.write_text("x = 1\n")
    assert refusal(str(broken)) == (
        f"pass file {broken} can't be imported: ModuleNotFoundError: No module named 'not_there'"
    )
    assert refusal(str(empty)) == "empty.py defines 0 passes; a pass file defines one"


HEAD = """from dataclasses import dataclass
from moecc.pipeline.passes import LayerPass, option

@dataclass(frozen=True, kw_only=True)
class Mine(LayerPass):
"""
RUN = "    def run_layer(self, layer, ctx):\n        return False\n"


WORD = "give a word of letters, digits, '_', '-' and '.'"
INCOMPLETE = {
    RUN: f"Mine.name is None; {WORD}",
    f"    name = 'a/b'\n{RUN}": f"Mine.name is 'a/b'; {WORD}",
    f"    name = 'mine'\n    requires = 'vq'\n{RUN}": (
        "Mine.requires is 'vq'; give a frozenset of facts"
    ),
    f"    name = 'mine'\n    provides = ['vq']\n{RUN}": (
        "Mine.provides is ['vq']; give a frozenset of facts"
    ),
    "    name = 'mine'\n": "Mine lacks run_layer",
    f"    name = 'mine'\n    by: int\n{RUN}": "write by as option(DEFAULT, help=...)",
    f"    name = 'mine'\n    by: int = 3\n{RUN}": "write by as option(DEFAULT, help=...)",
}


@pytest.mark.parametrize(("body", "message"), INCOMPLETE.items())
def test_a_class_that_is_no_whole_pass_is_refused(body: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(HEAD + body)
    assert refusal(str(tmp_path / "mine.py")) == f"mine.py: {message}"


@pytest.mark.parametrize("parts", ["[VectorQuantize]", "(3,)", "(int,)"])
def test_a_composite_has_a_tuple_of_passes(parts: str, tmp_path: Path) -> None:
    text = HEAD.replace("LayerPass", "Composite") + f"    name = 'mine'\n    parts = {parts}\n"
    needed = "from moecc.passes.vq import VectorQuantize\n"
    (tmp_path / "mine.py").write_text(
        needed + text + "    def stands_for(self):\n        return []\n"
    )
    said = refusal(str(tmp_path / "mine.py"))
    assert said.startswith("mine.py: Mine.parts is ")
    assert said.endswith("; give a tuple of the passes that it may stand for")


def test_the_default_of_an_option_may_be_none(tmp_path: Path) -> None:
    option = "by: int | None = option(None, help='', low=0)"
    (tmp_path / "mine.py").write_text(f"{HEAD}    name = 'mine'\n    {option}\n{RUN}")
    assert order(f"{tmp_path}/mine.py") == ["mine"]


def test_a_path_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "my own pass.py").write_text(f"{HEAD}    name = 'mine'\n{RUN}")
    assert order(f"vq, {tmp_path}/my own pass.py , dense") == ["moments", "vq", "mine", "dense"]


@dataclass(frozen=True, kw_only=True)
class Fake(Pass):
    """A model pass that changes nothing, installed under an entry point."""

    name: ClassVar[str] = "fake"
    provides: ClassVar[frozenset[str]] = frozenset({"moments"})
    bits: int = option(2, help="not used", choices=(2, 3))

    def run(self, program: Program, ctx: Context) -> bool:
        return False


class Bad(Composite):
    """It doesn't say which passes it stands for."""

    name: ClassVar[str] = "bad"

    def stands_for(self) -> list[Pass]:
        return [Fake()]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[EntryPoint]:
    """A list of the passes that other packages have installed; a test appends to it."""
    found: list[EntryPoint] = []

    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "moecc.passes"
        return [ep for ep in found if name in (None, ep.name)]

    monkeypatch.setattr("moecc.registry.entry_points", entry_points)
    return found


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, "moecc.passes")


FAKE = entry("fake", f"{__name__}:Fake")
BROKEN = {
    "absent_package_xyz:Pass": (
        "can't be loaded: ModuleNotFoundError: No module named 'absent_package_xyz'; "
        "repair or uninstall its package"
    ),
    f"{__name__}:BROKEN": "it must be a subclass of Pass",
    "pathlib:Path": "it must be a subclass of Pass",
    f"{__name__}:Bad": "Bad.parts is None; give a tuple of the passes that it may stand for",
}


@pytest.mark.parametrize(("value", "why"), BROKEN.items())
def test_a_broken_entry_point_breaks_only_what_asks_for_it(
    value: str, why: str, installed: list[EntryPoint], caplog: pytest.LogCaptureFixture
) -> None:
    installed += [FAKE, entry("broken", value)]
    assert refusal("broken").endswith(why)
    registry._note_once.cache_clear()
    for _ in range(2):
        assert "fake" in pass_classes() and "broken" not in pass_classes()
    (note,) = caplog.messages
    assert note.endswith(f"{why}; it is left out")
    assert order("affine,vq,fake")


def test_a_pass_is_found_by_its_entry_point(installed: list[EntryPoint]) -> None:
    installed.append(FAKE)
    assert "fake" in pass_names()
    assert parse_passes("fake{bits=3}")[0] == [Fake(bits=3)]
    assert refusal("fakee") == "no pass 'fakee'; did you mean 'fake'?"


def test_with_two_providers_the_user_must_choose(installed: list[EntryPoint]) -> None:
    installed.append(FAKE)
    assert (
        refusal("vq") == "vq requires 'moments'; provided by ['fake', 'moments']; name one of them"
    )
    assert order("vq,fake") == ["fake", "vq"]
