"""Folders of models from anybody: nothing outside is read, nothing blocks, nothing is obeyed."""

from __future__ import annotations

import io
import json
import os
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import EXPERT, NORM, edit, fails, saved, skeleton
from made import QUICK, Command, Compile, tokenizer
from refusals import Refused, edit_config
from safetensors.torch import load_file, save_file
from test_files import write_file
from transformers import AutoModelForCausalLM

from moecc.artifact import write
from moecc.artifact.write import copy_small_files
from moecc.checkpoint import reading
from moecc.checkpoint.files import TensorFile
from moecc.checkpoint.reading import JSON_LIMIT, parse_json, read_json
from moecc.checkpoint.shards import INDEX, SINGLE
from moecc.checkpoint.source import HUB_FILES, checkpoint_folder, small_files
from moecc.checkpoint.store import CheckpointStore
from moecc.errors import MoeccError, quoted, reason
from moecc.frontend.config import read_config
from moecc.frontend.skeleton import bare
from moecc.frontend.trace import store_of, trace

torch.set_num_threads(1)
TRACED = pytest.mark.usefixtures("traced_once")
ESCAPE = "\x1b[2J\u202e"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint in three shards."""
    return saved(tmp_path / "model", shard="40KB")


def index_of(folder: Path) -> dict[str, str]:
    where: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    return where


def write_index(folder: Path, where: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))


# ---------------------------------------------------------------- links and special files


@pytest.mark.parametrize("name", ["secret.json", "LICENSE", "tokenizer.model", "config.json"])
def test_a_link_to_a_file_elsewhere_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "private").write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "private")
    fails(lambda: checkpoint_folder(str(folder)), quoted(name), "outside this folder")


def test_a_linked_folder_of_templates_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "x.jinja").write_text("private")
    (folder / "additional_chat_templates").symlink_to(tmp_path / "templates")
    fails(lambda: checkpoint_folder(str(folder)), "outside this folder")


def test_links_inside_a_folder_and_into_its_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    saved(snapshot)
    blobs.mkdir()
    for i, file in enumerate(sorted(snapshot.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../../blobs") / str(i))
    (snapshot / "again.json").symlink_to("config.json")
    assert checkpoint_folder(str(snapshot)) == snapshot
    assert CheckpointStore(snapshot, skeleton(snapshot)).read(NORM).shape == (32,)
    link = tmp_path / "link"
    link.symlink_to(snapshot)
    assert read_config(link)[1] == link
    (tmp_path / "other.json").write_text("{}")
    (snapshot / "more.json").symlink_to("../../other.json")
    fails(lambda: checkpoint_folder(str(snapshot)), "'more.json'", "outside this folder")


@pytest.mark.parametrize("shard", ["../private.safetensors", "{}/private.safetensors"])
def test_an_index_that_names_files_elsewhere_is_refused(
    shard: str, folder: Path, tmp_path: Path
) -> None:
    shutil.copy(folder / index_of(folder)[NORM], tmp_path / "private.safetensors")
    write_index(folder, {**index_of(folder), NORM: shard.format(tmp_path)})
    fails(lambda: checkpoint_folder(str(folder)), "private.safetensors", "leads out of the folder")


@pytest.mark.parametrize(
    "shard",
    ["", ".", "x\0y", "\ud800", "n" * 5000, "sub/" * 3000],
    ids=["empty", "dot", "NUL", "half", "long", "deep"],
)
def test_an_index_that_names_no_possible_file_is_refused(shard: str, folder: Path) -> None:
    write_index(folder, {**index_of(folder), NORM: shard})
    fails(lambda: checkpoint_folder(str(folder)), str(folder))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.parametrize("name", [SINGLE, INDEX, "config.json", "tokenizer.json", "a.jinja"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(MoeccError):
        checkpoint_folder(str(folder))
        CheckpointStore(folder, skeleton(folder))
    fails(lambda: TensorFile(folder / name), "isn't a regular file")


def test_a_device_is_refused(folder: Path) -> None:
    (folder / "endless.json").symlink_to("/dev/zero")
    fails(lambda: checkpoint_folder(str(folder)), "'endless.json'", "outside this folder")


# ---------------------------------------------------------------- JSON


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested too deeply"),
        (b"[]", "no object"),
        (b'{"a": "\\ud800"}', "surrogates not allowed"),
        (b'{"a": "\xff"}', "can't decode byte"),
        ('{"a": 1}'.encode("utf-16"), "can't decode byte"),
        (b'{"a": ' + b"9" * 5000 + b"}", "isn't valid JSON"),
        (b"", "isn't valid JSON"),
    ],
    ids=["lists", "objects", "list", "half", "byte", "utf-16", "digits", "empty"],
)
def test_json_that_nothing_writes_is_refused_in_a_sentence(
    content: bytes, says: str, folder: Path
) -> None:
    for name in ("config.json", INDEX, "tokenizer_config.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_bytes(content)
        fails(lambda: checkpoint_folder(str(folder)) and read_config(folder), name, says)
        (folder / name).write_bytes(before)
    file = folder / "x.safetensors"
    file.write_bytes(len(content).to_bytes(8, "little") + content)
    fails(lambda: TensorFile(file), "no valid safetensors header")


def test_a_json_file_beyond_the_bound_is_refused(folder: Path) -> None:
    with open(folder / "config.json", "r+b") as file:
        file.truncate(JSON_LIMIT + 1)
    fails(lambda: read_json(folder / "config.json"), "config.json", "more than 100 MiB")


@pytest.mark.parametrize("part", ["[],", "{},", '"a",', '{"":0},', "1,"])
def test_json_of_too_many_values_is_refused_before_it_is_parsed(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list in memory takes twenty times the bytes of its text."""
    text = f'{{"a": [{part * 9}1]}}'.encode()
    signs = sum(map(text.count, (b",", b"[", b"{")))
    monkeypatch.setattr("moecc.checkpoint.reading._VALUES", signs)
    assert len(parse_json(text)["a"]) == 10
    monkeypatch.setattr("moecc.checkpoint.reading._VALUES", signs - 1)
    monkeypatch.setattr("json.loads", lambda text: pytest.fail("parsed"))
    with pytest.raises(ValueError, match="too many values"):
        parse_json(text)


def test_bounds_count_what_is_read_not_what_the_system_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some files are longer, such as those of /proc."""
    for module, bound in ((reading, "JSON_LIMIT"), (write, "_LARGEST_SMALL_FILE")):
        monkeypatch.setattr(module, bound, 20)
        monkeypatch.setattr(module, "opened", lambda file: io.BytesIO(b"{}" + b" " * 20))
    (folder / "config.json").write_text("{}")
    fails(lambda: read_json(folder / "config.json"), "config.json", "more than")
    said: list[str] = []
    (out := tmp_path / "out").mkdir()
    copy_small_files(folder, out, said.append)
    assert len(said) == 1 and "generation_config.json is left out: it has more than" in said[0]
    assert list(out.iterdir()) == []


def test_a_shape_of_many_huge_sizes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for shape in ([1] * 65, [10**4000] * 60, [1 << 63, 0]):
        write_file(file, {"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 0]}}, b"")
        fails(lambda: TensorFile(file), "no valid safetensors header")


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**9},
        {"num_experts": 10**9},
        {"head_dim": 10**9},
        {"hidden_size": 10**9},
        {"text_config": {"d_model": 10**9}},
        {"text_config": {"n_layer": 1e9}},
        {"vision_config": {"depths": [2, 10**9]}},
    ],
    ids=str,
)
def test_a_config_of_a_billion_modules_is_refused_before_it_is_built(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    saved(tmp_path)
    edit_config(tmp_path, **changes)
    fails(lambda: read_config(tmp_path), "1000000000", "at most", "check config.json")


def test_weights_that_do_not_fit_are_refused_before_the_trace(
    refused: Refused, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.frontend.trace.capture", lambda found: pytest.fail("traced"))
    edit_config(model, num_hidden_layers=3)
    assert "has no tensor for 'model.layers.2." in refused(model)


def test_more_tensors_than_any_model_leaves_out_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.checkpoint.fit._MOST_LEFT_OUT", 3)
    saved(tmp_path)
    edit(tmp_path, {f"extra.{i}": torch.ones(1) for i in range(3)})
    CheckpointStore(tmp_path, skeleton(tmp_path)).check()
    edit(tmp_path, {"extra.3": torch.ones(1)})
    fails(CheckpointStore(tmp_path, skeleton(tmp_path)).check, "has 4 tensors that fit nothing")


def test_more_tensors_or_files_than_any_model_has_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, files = len(index_of(folder)), len(set(index_of(folder).values()))

    def bounds(tensors: int, shards: int) -> None:
        monkeypatch.setattr("moecc.checkpoint.files.MOST_TENSORS", tensors)
        monkeypatch.setattr("moecc.checkpoint.shards._MOST_SHARDS", shards)

    bounds(names, files)
    CheckpointStore(folder, skeleton(folder)).check()
    bounds(names - 1, files)
    fails(lambda: checkpoint_folder(str(folder)), INDEX, f"has {names} tensors", "at most")
    bounds(names, files - 1)
    fails(lambda: checkpoint_folder(str(folder)), INDEX, f"names {files} files", "at most")
    bounds(names, files)
    file = folder / index_of(folder)[NORM]
    save_file({**load_file(file), "more": torch.ones(1)}, file, {"format": "pt"})
    fails(lambda: CheckpointStore(folder, skeleton(folder)), f"has {names + 1} tensors")
    bounds(len(load_file(file)) - 1, files)
    fails(lambda: TensorFile(file), str(file), "tensors, and moecc takes at most")


def test_far_more_tensors_than_make_the_model_are_refused_before_they_are_matched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moecc.checkpoint.fit._MOST_LEFT_OUT", 3)
    bare = skeleton(saved(tmp_path))
    experts = [t for t in bare.state_dict().values() if t.dim() == 3]
    others = len(bare.state_dict()) - len(experts)
    most = 4 * sum(len(t) for t in experts) + 8 * others
    names = [f"extra.{i}" for i in range(most + 3 - len(load_file(tmp_path / SINGLE)))]
    edit(tmp_path, {name: torch.ones(0) for name in names})
    CheckpointStore(tmp_path, bare)
    edit(tmp_path, {"one.more": torch.ones(0)})
    monkeypatch.setattr("moecc.checkpoint.store.Recipes", lambda *args: pytest.fail("matched"))
    fails(lambda: CheckpointStore(tmp_path, bare), f"has {most + 4} tensors", f"of {most} at most")


# ---------------------------------------------------------------- names


@pytest.mark.parametrize("number", ["9" * 5000, "\u00b22"], ids=["5000 digits", "a power"])
def test_a_name_with_an_impossible_number_is_refused(number: str, tmp_path: Path) -> None:
    saved(tmp_path)
    edit(tmp_path, {f"model.layers.{number}.x": torch.ones(1)})
    fails(lambda: CheckpointStore(tmp_path, skeleton(tmp_path)), "model.layers.", "can't be read")


def test_names_from_files_never_reach_a_terminal_raw(
    tmp_path: Path, moecc: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    edit(tmp_path / "b", {f"x{ESCAPE}": torch.ones(1), f"y{ESCAPE}": torch.ones(1)})
    run = moecc("diff", tmp_path / "a", tmp_path / "b")
    assert run.code == 1 and r"x\x1b[2J\u202e" in run.out and "\x1b" not in run.out + run.err
    edit(tmp_path / "b", {EXPERT: None})
    fails(CheckpointStore(tmp_path / "b", skeleton(tmp_path / "b")).check, "is missing")
    bad = {f"z{ESCAPE}": {"dtype": f"F{ESCAPE}", "shape": [1], "data_offsets": [0, 1]}}
    write_file(tmp_path / "b" / SINGLE, bad, b"1")
    run = moecc("diff", tmp_path / "a", tmp_path / "b")
    assert run.code == 2 and r"'z\x1b[2J\u202e'" in run.err and r"'F\x1b[2J\u202e'" in run.err
    assert "\x1b" not in run.err and "\u202e" not in run.err
    edit_config(tmp_path / "a", model_type=f"m{ESCAPE}")
    run = moecc("inspect", tmp_path / "a")
    assert run.code == 2 and r"m\x1b[2J" in run.err and "\x1b" not in run.err


def test_aliases_are_those_of_the_class_whatever_a_file_says(tmp_path: Path) -> None:
    edit_config(saved(tmp_path), attribute_map="none")
    assert bare(tmp_path).config.num_experts_per_tok == 2


def test_a_long_name_in_a_library_s_message_is_cut(tmp_path: Path) -> None:
    edit_config(saved(tmp_path), hidden_act="n" * 5000)
    with pytest.raises(MoeccError) as caught:
        bare(tmp_path)
    assert "nnn...' is unknown" in str(caught.value) and len(str(caught.value)) < 800
    assert reason(ValueError("x" * 5000)) == "x" * 400 + "..."
    line = str(MoeccError(f"no {'n' * 5000}; give another"))
    assert len(line) < 1000 and line.startswith("no nnn") and line.endswith("nnn; give another")


@pytest.mark.parametrize("bad", ["x\0y", "x\udcffy", "n" * 5000], ids=["NUL", "bytes", "long"])
def test_an_argument_that_is_no_path_is_refused_in_a_sentence(bad: str, moecc: Command) -> None:
    for line in (["inspect", bad], ["bench", bad], ["passes", bad], ["passes", f"{bad}.py"]):
        run = moecc(*line)
        assert (run.code, run.out) == (2, "") and "internal" not in run.err, run.err
        assert run.err.splitlines()[-1].startswith("moecc: error: ")


@TRACED
@pytest.mark.parametrize(
    "line",
    [
        "compile MODEL --passes vq -o LONG",
        "compile MODEL --passes vq -o OUT --calib LONG",
        "compile MODEL --passes LONG.py -o OUT",
        "compile MODEL --passes lora{path=LONG},vq -o OUT",
        "diff MODEL LONG",
    ],
)
def test_a_path_that_is_too_long_is_refused_in_a_sentence(
    line: str, tmp_path: Path, model: Path, moecc: Command
) -> None:
    words = [word.replace("LONG", "n" * 300) for word in line.split()]
    run = moecc(*[{"MODEL": model, "OUT": tmp_path / "out"}.get(w, w) for w in words])
    assert (run.code, run.out) == (2, "") and "internal" not in run.err, run.err
    assert run.err.splitlines()[-1].startswith("moecc: error: ")


# ---------------------------------------------------------------- indices


def test_the_index_decides_between_two_copies_of_a_tensor(folder: Path, moecc: Command) -> None:
    where = index_of(folder)
    other = sorted(set(where.values()) - {where[NORM]})
    right = load_file(folder / where[NORM])[NORM]
    for shard in other:
        stale = {**load_file(folder / shard), NORM: right + 1}
        save_file(stale, folder / shard, {"format": "pt"})
    store = CheckpointStore(folder, skeleton(folder))
    assert torch.equal(store.read(NORM), right)
    more = f", and so are {len(other) - 1} more"
    left = f"'{NORM}' in {other[0]} is left out, because {INDEX} names another file for it{more}"
    assert len(other) > 1 and store.notes == [left]
    tokenizer().save_pretrained(folder)
    run = moecc("generate", folder, "--prompt", "abc")  # by transformers, which takes any
    assert run.code == 2 and store.notes[0] in run.err and "mend the folder" in run.err
    write_index(folder, {name: shard for name, shard in where.items() if name != NORM})
    fails(lambda: CheckpointStore(folder, skeleton(folder)), NORM, "names neither")


@TRACED
def test_compile_says_which_copies_it_leaves_out(
    mixtral: Path, compile: Compile, tmp_path: Path
) -> None:
    AutoModelForCausalLM.from_pretrained(mixtral).save_pretrained(tmp_path, max_shard_size="40KB")
    where = index_of(tmp_path)
    first, last = sorted(set(where.values()))[:: len(set(where.values())) - 1]
    name = next(n for n, shard in where.items() if shard == first)
    right = load_file(tmp_path / first)[name]
    stale = {**load_file(tmp_path / last), name: right + 1}
    save_file(stale, tmp_path / last, {"format": "pt"})
    got = compile(tmp_path, tmp_path / "out", "dense{group=16}")
    says = f"{tmp_path}: '{name}' in {last} is left out, because {INDEX} names another file for it"
    assert got.code == 0 and f"note: {says}\n" in got.err
    assert torch.equal(load_file(tmp_path / "out" / SINGLE)[name], right)


def test_two_sets_of_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    saved(tmp_path / "single")
    shutil.copy(tmp_path / "single" / SINGLE, folder)
    fails(lambda: checkpoint_folder(str(folder)), "two sets of weights", SINGLE, INDEX)


def test_an_index_may_name_the_single_file(tmp_path: Path) -> None:
    saved(tmp_path)
    write_index(tmp_path, dict.fromkeys(load_file(tmp_path / SINGLE), SINGLE))
    CheckpointStore(tmp_path, skeleton(tmp_path)).check()


def test_shards_in_a_sub_folder_are_found(tmp_path: Path) -> None:
    names = list(load_file(saved(tmp_path) / SINGLE))
    (tmp_path / "weights").mkdir()
    (tmp_path / SINGLE).rename(tmp_path / "weights" / "part.safetensors")
    write_index(tmp_path, dict.fromkeys(names, "./weights/part.safetensors"))
    store = store_of(bare(checkpoint_folder(str(tmp_path))))
    assert store is not None
    store.check()


# ---------------------------------------------------------------- small files


def test_templates_and_licences_are_copied_and_downloaded(folder: Path, tmp_path: Path) -> None:
    more = ["additional_chat_templates/tools.jinja", "LICENSE", "LICENSE.md", "license.txt"]
    more += ["NOTICE.txt", "MODEL_LICENSE", "USE_POLICY.md", "chat_template.jinja"]
    (folder / "additional_chat_templates").mkdir()
    for name in more:
        (folder / name).write_text(name)
    (folder / "license.safetensors").write_text("no weights")
    assert set(more) <= set(small_files(folder))
    (out := tmp_path / "out").mkdir()
    copy_small_files(folder, out, print)
    assert all((out / name).read_text() == name for name in more)
    assert not (out / "license.safetensors").exists()
    top = [name for name in more if "/" not in name]
    assert all(any(fnmatchcase(name, pattern) for pattern in HUB_FILES) for name in top)


def test_a_download_asks_for_templates_and_shards_below(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def download(repo: str, **options: Any) -> str:
        asked.append(options["allow_patterns"])
        if len(asked) == 1:
            saved(tmp_path)
            (tmp_path / "a[1]").mkdir()
            (tmp_path / SINGLE).rename(tmp_path / "a[1]" / "part.safetensors")
            write_index(tmp_path, {NORM: "a[1]/part.safetensors"})
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint_folder("some/model") == tmp_path
    assert asked[1][0] == "additional_chat_templates/*.jinja"
    assert fnmatchcase("a[1]/part.safetensors", asked[1][1])


# ---------------------------------------------------------------- configurations


@TRACED
@pytest.mark.parametrize("changes", [{"quantization_config": {}}, {"return_dict": False}], ids=str)
def test_entries_that_say_nothing_hinder_nothing(
    changes: dict[str, object], model: Path, tmp_path: Path, compile: Compile, moecc: Command
) -> None:
    edit_config(model, **changes)
    run = compile(model, tmp_path / "out", QUICK)
    assert run.code == 0, run.err
    for folder in (model, tmp_path / "out"):
        run = moecc("generate", folder, "--prompt", "abc", "--max-new-tokens", 2)
        assert run.code == 0, run.err


def test_a_model_whose_layers_are_all_dense_is_named_so(tmp_path: Path) -> None:
    saved(tmp_path, mlp_only_layers=[0, 1])
    fails(lambda: trace(tmp_path), "the configuration gives experts to no layer", "mlp_only_layers")


def test_weights_whose_squares_overflow_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    large = torch.ones(16, 32)
    large[2, 3] = -1e30
    edit(tmp_path, {EXPERT: large, NORM: torch.full((32,), 1e30)})
    store = CheckpointStore(tmp_path, skeleton(tmp_path))
    fails(
        lambda: store.read("model.layers.1.mlp.experts.gate_up_proj"),
        EXPERT,
        "holds 1e+30",
        "squares",
    )
    assert store.read(NORM)[0] == 1e30
