"""The report shows every row of the audit, adds up, and lets nothing of a checkpoint's text through as markup."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from moecc.artifact.schema import Row, summary
from moecc.commands import report
from moecc.pipeline.fate import HEADER, KEPT, UNUSED, Fate

CODED = Fate("coded", bits=2, format="vq4")
EVIL = "<script>alert('x')</script>&\""
FACTS: dict[str, Any] = {
    "format": 1,
    "pipeline": "moments,klt{rank=32},vq{bits=2},affine,fold,vsraq{steps=200}",
    "seed": 0,
    "calibration_digest": "c0ffee",
    "source": EVIL,
    "source_digest": "ab" * 20,
    "backend": "reference",
    "versions": {"torch": "2.13", "moecc": "0.1.0", "format": "1"},
    "notes": [
        f"model.layers.{n}.mlp.experts expert 3: 9 routed tokens; calibrated on 64 sent to it"
        for n in (2, 10)
    ],
    "passes": [
        {"pass": "klt{rank=32}", "bits": 16.2, "nodes": 40, "error": None},
        {"pass": "vq{bits=2}", "bits": 2.1, "nodes": 40, "error": 0.07},
    ],
}


def experts(layer: int) -> list[Row]:
    """Eight experts, D = 64, F = 96; expert 3 starved, expert 5 without any token."""
    rows = []
    tokens = [60, 120, 500, 9, 75, 0, 300, 64 + layer]
    losses = {
        "reconstruction": 0.02 * layer,
        "value": 0.3,
        "order": 0.1,
        "boundary": 0.2,
        "flips": 0.0625,
    }
    after = {k: 0.7 * v for k, v in losses.items()}
    for i, (projection, shape, error) in enumerate(
        [("gate_up", (8, 192, 64), 0.05), ("down", (8, 64, 96), 0.08)]
    ):
        parts = {"codes": 3 * shape[1] * shape[2], "codebook": 1024, "scale": 16 * shape[1]}
        chosen = {"rank": 32 * i, "codebook": "layer", "affine": "slope"}
        details = {
            "bytes": parts,
            **chosen,
            "tuned": {"before": losses, "after": after},
            "errors": "all channels alike",
        }
        nbytes = sum(parts.values())
        bits = 8 * nbytes / math.prod(shape)
        name = f"model.layers.{layer}.mlp.experts.{projection}_proj"
        rows.append(
            Row(
                name,
                "routed experts",
                shape,
                CODED,
                nbytes,
                bits,
                error + layer / 200,
                tokens,
                starved={"3": 64, "5": 64},
                experts=f"model.layers.{layer}.mlp.experts",
                projection=projection,
                layer=layer,
                details=details,
            )
        )
    return rows


def audit() -> list[Row]:
    rows = [Row("model.embed_tokens.weight", "embeddings", (1000, 64), KEPT, 128_000, 16.0)]
    for layer in (10, 2):  # not in the order of numbers, and not the order of text either
        name = f"model.layers.{layer}"
        rows.append(
            Row(
                f"{name}.self_attn.q_proj.weight",
                "attention",
                (64, 64),
                Fate("grouped", bits=4, group=32),
                2_304,
                4.5,
                0.01,
            )
        )
        rows += experts(layer)
        rows.append(Row(f"{name}.mlp.gate.e_score_correction_bias", "router", (8,), KEPT, 32, 32.0))
    rows.append(
        Row(
            "lm_head.weight",
            "embeddings",
            (1000, 64),
            Fate("tied", of="model.embed_tokens.weight"),
            0,
        )
    )
    rows.append(
        Row(EVIL, "not part of the model", (), UNUSED, 0, fallback=f"no parameter takes {EVIL}")
    )
    return [*rows, Row("(safetensors headers)", "file format", (), HEADER, 1_736)]


class Cells(HTMLParser):
    """Table rows of a page as lists of text; tags that must balance."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def audit_table(text: str) -> list[list[str]]:
    rows = Cells(text).rows
    start = next(i for i, r in enumerate(rows) if r[:3] == ["name", "role", "shape"])
    return rows[start + 1 :]


def test_every_row_is_there_and_the_total_is_the_sum() -> None:
    rows = audit()
    *lines, total = audit_table(report.page(FACTS, rows))
    assert [line[0] for line in lines] == [r.name for r in rows]
    assert [int(line[4].replace(",", "")) for line in lines] == [r.nbytes for r in rows]
    assert total[0] == "total"
    assert int(total[4].replace(",", "")) == summary(rows)["bytes"] == sum(r.nbytes for r in rows)


def test_the_format_is_named_once() -> None:
    assert report.page(FACTS, audit()).count("<dt>format</dt>") == 1


def test_text_of_the_checkpoint_is_no_markup() -> None:
    text = report.page(FACTS, audit())
    found = Cells(text)
    assert not found.open and not found.tags & {"script", "img", "link", "iframe", "base", "object"}
    assert EVIL not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href|url|@import)\s*[=(]|https?:", text)


def test_the_same_bytes_again_and_from_the_manifest_alone(tmp_path: Path) -> None:
    first = report.write_report(tmp_path, FACTS, audit())
    written = first.read_bytes()
    manifest = {**FACTS, "summary": summary(audit()), "audit": [r.as_json() for r in audit()]}
    (tmp_path / "moecc.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    read = json.loads((tmp_path / "moecc.json").read_text())
    rows = [Row.of_json(r) for r in read["audit"]]
    assert report.write_report(tmp_path, read, rows) == first == tmp_path / "report.html"
    assert first.read_bytes() == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moecc.json", "report.html"]


def test_size_before_follows_the_stated_rule() -> None:
    rows = audit()
    by_name = dict(zip((r.name for r in rows), report.bytes_before(rows), strict=True))
    assert by_name["model.layers.2.mlp.experts.gate_up_proj"] == 8 * 192 * 64 * 2
    assert (
        by_name["model.layers.2.mlp.gate.e_score_correction_bias"] == 32
    )  # float32 in the source, and stored so
    assert by_name["lm_head.weight"] == by_name[EVIL] == by_name["(safetensors headers)"] == 0
    lead = Row(
        "a", "routed experts", (4, 4), CODED, 8, 2.0, details={"bytes": {}, "source_bits": 32}
    )
    assert report.bytes_before(
        [lead, Row("b", "routed experts", (4, 4), Fate("part", of="a"), 0)]
    ) == [64, 64]


def test_layers_in_order_of_their_numbers_with_both_projections() -> None:
    layers = report.layers_of(audit())
    assert list(layers) == ["2", "10"]
    assert [(r.projection, r.name.rsplit(".", 1)[1]) for r in layers["10"]] == [
        (p, f"{p}_proj") for p in ("gate_up", "down")
    ]


def test_layers_of_two_stacks_are_kept_apart() -> None:
    paths = [f"{stack}.layers.0.experts" for stack in ("enc", "dec")]
    told: dict[str, Any] = {"projection": "down", "layer": 0, "details": {"bytes": {}}}
    rows = [
        Row(f"{path}.w", "routed experts", (4, 4), CODED, 8, 2.0, experts=path, **told)
        for path in paths
    ]
    assert list(report.layers_of(rows)) == ["dec.layers.0.experts", "enc.layers.0.experts"]


def test_what_passes_recorded_of_a_projection_is_in_its_row() -> None:
    """And a column that no projection has anything for is left out."""
    rows = audit()
    next(r for r in rows if r.name.endswith("down_proj")).details.update(
        lora="rank 8 of the basis", lora_lost=0.0625
    )
    found = Cells(report.page(FACTS, rows)).rows
    start = next(i for i, r in enumerate(found) if r[:2] == ["layer", "projection"])
    head, lines = found[start], found[start + 1 : start + 5]
    assert head[5:-1] == ["affine", "codebook", "errors", "lora", "lora lost", "rank"]
    assert [line[5:-1] for line in lines] == [
        ["slope", "layer", "all channels alike", "–", "–", "0"],
        ["slope", "layer", "all channels alike", "–", "–", "32"],
        ["slope", "layer", "all channels alike", "–", "–", "0"],
        ["slope", "layer", "all channels alike", "rank 8 of the basis", "0.0625", "32"],
    ]


def test_what_rilq_gained_is_there_once() -> None:
    rows = audit()
    told = {
        "before": {"loss": 3.0, "kl": 0.5, "lm": 2.0},
        "after": {"loss": 2.5, "kl": 0.25, "lm": 2.125},
    }
    for row in rows:
        if row.role == "routed experts":
            row.details["rilq"] = told
    found = Cells(report.page(FACTS, rows)).rows
    assert [r for r in found if "3 → 2.5" in r] == [["all", "0.5 → 0.25", "2 → 2.125", "3 → 2.5"]]


def test_starved_experts_are_marked() -> None:
    assert report.starved_of(experts(2)[0]) == {3, 5}
    text = report.page(FACTS, audit())
    assert text.count("starved: 3, 5") == 2 and "expert 3: 9 tokens, starved" in text
    assert all(note in text for note in FACTS["notes"])


def test_little_or_nothing_to_say_still_makes_a_page() -> None:
    assert not Cells(report.page({}, [])).open
    name, details = "model.layers.0.experts.w", {"bytes": {}}
    blank = Row(
        name, "routed experts", (4, 4), CODED, 8, 2.0, float("nan"), [0, 0], details=details
    )
    assert not Cells(report.page({}, [blank])).open


def test_a_name_that_is_not_text_is_written(tmp_path: Path) -> None:
    assert b"m\\udcff" in report.write_report(tmp_path, {"source": "m\udcff"}, audit()).read_bytes()
