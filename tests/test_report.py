"""The report shows every row of the audit, adds up, and takes text of a checkpoint as text."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

from moecc.artifact.schema import Row, summary
from moecc.checkpoint.roles import ROUTED
from moecc.commands import report
from moecc.pipeline.fate import HEADER, KEPT, UNUSED, Fate
from moecc.types import Json

CODED = Fate("coded", bits=2, format="vq4")
EVIL = "<script>alert('x')</script>&\""
FACTS: Json = {
    "format": 1,
    "pipeline": "moments,klt{rank=32},vq{bits=2},affine,fold,vsraq{steps=200}",
    "seed": 0,
    "calibration_digest": "c0ffee",
    "source": EVIL,
    "source_digest": "ab" * 20,
    "backend": "reference",
    "versions": {"torch": "2.13", "moecc": "0.1.0", "format": "1"},
    "notes": [
        f"model.layers.{n}.mlp.experts: 2 of 8 experts got fewer than 64 routed tokens, expert 5 "
        "only 0; calibrated on 64 sent to each on purpose"
        for n in (2, 10)
    ],
    "passes": [
        {"pass": "klt{rank=32}", "bits": 16.2, "nodes": 40, "in_sample_error": None},
        {"pass": "vq{bits=2}", "bits": 2.1, "nodes": 40, "in_sample_error": 0.07},
    ],
}


def experts(layer: int) -> list[Row]:
    """Return the rows of eight experts, D = 64, F = 96; 3 is starved, 5 has no token at all."""
    path = f"model.layers.{layer}.mlp.experts"
    losses = dict(reconstruction=0.02 * layer, value=0.3, order=0.1, boundary=0.2, flips=0.0625)
    tuned = {"before": losses, "after": {k: 0.7 * v for k, v in losses.items()}}
    rows = []
    for i, (projection, shape, error) in enumerate(
        [("gate_up", (8, 192, 64), 0.05), ("down", (8, 64, 96), 0.08)]
    ):
        parts = {"codes": 3 * shape[1] * shape[2], "codebook": 1024, "scale": 16 * shape[1]}
        details = dict(bytes=parts, rank=32 * i, codebook="layer", affine="slope", tuned=tuned)
        nbytes = sum(parts.values())
        row = Row(f"{path}.{projection}_proj", ROUTED, shape, CODED, nbytes)
        row.bits, row.in_sample_error = 8 * nbytes / math.prod(shape), error + layer / 200
        row.tokens, row.starved = [60, 120, 500, 9, 75, 0, 300, 64 + layer], {"3": 64, "5": 64}
        row.experts, row.projection, row.layer = path, projection, layer
        row.details = {**details, "errors": "all channels alike"}
        rows.append(row)
    return rows


def audit() -> list[Row]:
    """Return the rows of a small model whose layers, 10 and 2, are not in order."""
    embeddings = "model.embed_tokens.weight"
    rows = [Row(embeddings, "embeddings", (1000, 64), KEPT, 128_000, 16.0)]
    for layer in (10, 2):
        name = f"model.layers.{layer}"
        fate = Fate("grouped", bits=4, group=32)
        rows += [
            Row(f"{name}.self_attn.q_proj.weight", "attention", (64, 64), fate, 2_304, 4.5, 0.01),
            *experts(layer),
            Row(f"{name}.mlp.gate.e_score_correction_bias", "router", (8,), KEPT, 32, 32.0),
        ]
    why = f"no parameter takes {EVIL}"
    return [
        *rows,
        Row("lm_head.weight", "embeddings", (1000, 64), Fate("tied", of=embeddings), 0),
        Row(EVIL, "not part of the model", (), UNUSED, 0, fallback=why),
        Row("(safetensors headers)", "file format", (), HEADER, 1_736),
    ]


class Cells(HTMLParser):
    """The table rows of a page as lists of text, its tags, and those that were not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: object) -> None:
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
    """Return the lines of the audit on a page, the total included."""
    rows = Cells(text).rows
    start = next(i for i, r in enumerate(rows) if r[:3] == ["name", "role", "shape"])
    return rows[start + 1 :]


def test_the_audit_has_every_row_and_their_sum() -> None:
    rows = audit()
    *lines, total = audit_table(report.page(FACTS, rows))
    assert [line[0] for line in lines] == [r.name for r in rows]
    assert [int(line[4].replace(",", "")) for line in lines] == [r.nbytes for r in rows]
    assert total[0] == "total"
    assert int(total[4].replace(",", "")) == summary(rows)["bytes"] == sum(r.nbytes for r in rows)


def test_the_format_is_named_once() -> None:
    assert report.page(FACTS, audit()).count("<dt>format</dt>") == 1


def test_text_of_a_checkpoint_is_no_markup() -> None:
    text = report.page(FACTS, audit())
    found = Cells(text)
    assert not found.open and not found.tags & {"script", "img", "link", "iframe", "base", "object"}
    assert EVIL not in text and "&lt;script&gt;" in text
    assert not re.search(r"(src|href|url|@import)\s*[=(]|https?:", text)


def test_moecc_json_alone_gives_the_same_bytes(tmp_path: Path) -> None:
    first = report.write_report(tmp_path, FACTS, audit())
    written = first.read_bytes()
    manifest = {**FACTS, "summary": summary(audit()), "audit": [r.as_json() for r in audit()]}
    (tmp_path / "moecc.json").write_text(json.dumps(manifest, indent=1, sort_keys=True))
    read = json.loads((tmp_path / "moecc.json").read_text())
    rows = [Row.of_json(r) for r in read["audit"]]
    assert report.write_report(tmp_path, read, rows) == first == tmp_path / "report.html"
    assert first.read_bytes() == written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moecc.json", "report.html"]


def test_the_size_before_follows_its_rule() -> None:
    rows = audit()
    by_name = dict(zip((r.name for r in rows), report.bytes_before(rows), strict=True))
    assert by_name["model.layers.2.mlp.experts.gate_up_proj"] == 8 * 192 * 64 * 2
    # this bias is float32 in the source and in the artifact
    assert by_name["model.layers.2.mlp.gate.e_score_correction_bias"] == 32
    assert by_name["lm_head.weight"] == by_name[EVIL] == by_name["(safetensors headers)"] == 0
    details = {"bytes": {}, "source_bits": 32}
    lead = Row("a", ROUTED, (4, 4), CODED, 8, 2.0, details=details)
    part = Row("b", ROUTED, (4, 4), Fate("part", of="a"), 0)
    assert report.bytes_before([lead, part]) == [64, 64]


def test_layers_come_by_number_with_both_projections() -> None:
    layers = report.layers_of(audit())
    assert list(layers) == ["2", "10"]
    found = [(r.projection, r.name.rsplit(".", 1)[1]) for r in layers["10"]]
    assert found == [("gate_up", "gate_up_proj"), ("down", "down_proj")]


def test_layers_of_two_stacks_are_kept_apart() -> None:
    rows = []
    for stack in ("enc", "dec"):
        path = f"{stack}.layers.0.experts"
        row = Row(f"{path}.w", ROUTED, (4, 4), CODED, 8, 2.0, details={"bytes": {}})
        row.experts, row.projection, row.layer = path, "down", 0
        rows.append(row)
    assert list(report.layers_of(rows)) == ["dec.layers.0.experts", "enc.layers.0.experts"]


def test_recorded_values_of_a_projection_are_in_its_row() -> None:
    """A column without any value is left out."""
    rows = audit()
    down = next(r for r in rows if r.name.endswith("down_proj"))
    down.details |= {"lora": "rank 8 of the basis", "lora_lost": 0.0625}
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


def test_a_loss_of_the_whole_model_is_shown_once() -> None:
    rows = audit()
    loss = {
        "before": {"loss": 3.0, "kl": 0.5, "lm": 2.0},
        "after": {"loss": 2.5, "kl": 0.25, "lm": 2.125},
    }
    for row in rows:
        if row.role == ROUTED:
            row.details["rilq"] = loss
    found = Cells(report.page(FACTS, rows)).rows
    assert [r for r in found if "3 → 2.5" in r] == [["all", "0.5 → 0.25", "2 → 2.125", "3 → 2.5"]]


def test_starved_experts_are_marked() -> None:
    assert report.starved_of(experts(2)[0]) == {3, 5}
    text = report.page(FACTS, audit())
    assert text.count("starved: 3, 5") == 2 and "expert 3: 9 tokens, starved" in text
    assert "experts [3, 5] saw too few tokens; calibrated on tokens sent to them" in text
    assert all(note in text for note in FACTS["notes"])


def test_a_page_can_be_empty_or_nearly_so() -> None:
    assert not Cells(report.page({}, [])).open
    name, details = "model.layers.0.experts.w", {"bytes": {}}
    blank = Row(name, ROUTED, (4, 4), CODED, 8, 2.0, math.nan, [0, 0], details=details)
    blank.in_sample_error = math.nan
    assert not Cells(report.page({}, [blank])).open


def test_a_source_whose_name_is_no_text_is_written(tmp_path: Path) -> None:
    file = report.write_report(tmp_path, {"source": "m\udcff"}, audit())
    assert b"m\\udcff" in file.read_bytes()
