"""The inputs of the fuzzer: for each target, a function that draws a changed file or command.

A target is one thing that moecc reads. Most of its inputs go to an action or a command that ends
soon after that thing is read; a share goes through `compile`, `eval`, `generate` or `export`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import _mutate_tensors
from _fuzz_run import Case, Item
from _fuzz_stage import CALIBRATION, CHECKPOINTS, Stage, compilation
from _mutate import NUMBERS, RAW_JSON, STRINGS, Mutator

from moecc.pipeline.parse import PASSES
from moecc.target import TARGETS

Draw = Callable[[Mutator, Stage], Case]
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
EVALUATE = "eval PART --reference mixtral --text text.txt --rows 2 --length 16 --json"
GENERATE = "generate PART --prompt abc --max-new-tokens 2 --json"
COMPILE = shlex.join(compilation("stopped"))
SHORT = COMPILE.replace(" mixtral ", " PART ", 1)
# What a file may be instead of a regular one with text.
ODD_FILES: Sequence[Item] = (
    *(None, b"", b"{}", b"[]", b"null", b"\0" * 100, b"\xff\xfe", "pipe", "folder"),
    *(
        "link:nowhere",
        "link:/etc/passwd",
        "link:/dev/zero",
        "link:config.json",
        "link:.",
        "link:..",
    ),
)
ODD_NAMES = ("x\x1b[2Jy", "\u202ex", "a b", "-o", "n" * 250, "é", "x\udcffy", ".hidden", "*", "%s")
# Entries of configurations that decide much.
SETTINGS = (
    *("quantization_config", "text_config", "vision_config", "auto_map", "architectures", "dtype"),
    *("model_type", "experts_implementation", "_attn_implementation", "attn_implementation"),
    *("pruned_heads", "num_labels", "id2label", "torch_dtype", "rope_parameters", "rope_scaling"),
    *("layer_types", "tie_word_embeddings", "return_dict", "is_encoder_decoder", "use_cache"),
    *("output_router_logits", "output_attentions", "torchscript", "attribute_map", "__class__"),
)


def _command(m: Mutator, ways: Mapping[str, float], part: str = "") -> list[str]:
    """Draw one of the command lines `ways`, each as often as its weight says, to read `part`."""
    (line,) = m.random.choices(list(ways), list(ways.values()))
    return [part if word == "PART" else word for word in shlex.split(line)]


def _case(
    m: Mutator,
    stage: Stage,
    target: str,
    part: str,
    changes: Mapping[str, Item],
    ways: Mapping[str, float],
) -> Case:
    """Return a case of one changed part, read by one of `ways`."""
    command = _command(m, ways, part)
    texts = [word for word in ("text.txt", "rows.jsonl") if word in command]
    also = ["mixtral"] if "mixtral" in command and part != "mixtral" else []
    return Case(target, stage.need(part, *also, *texts), changes, command)


# ---------------------------------------------------------------- weights


READING = {"store PART": 70, "diff PART PART": 20, "inspect PART": 3, GENERATE: 3, SHORT: 2}


def header(m: Mutator, stage: Stage) -> Case:
    """A safetensors file of a checkpoint, of an artifact, or of a sharded or low-bit checkpoint."""
    part = m.pick([*stage.models, "artifact"])
    file = m.pick(stage.names(part, "*.safetensors"))
    changes = {file: _mutate_tensors.mutated(m, stage.read(file))}
    return _case(m, stage, "header", part, changes, READING)


def index(m: Mutator, stage: Stage) -> Case:
    """The shard index, or which shards there are."""
    shards = [name.removeprefix("mixtral/") for name in stage.names("mixtral", "*.safetensors")]
    changes: dict[str, Item] = {}
    if m.chance(0.8):
        values = [*shards, *shards, SINGLE, "config.json", "./x", "sub/x.safetensors", "/dev/zero"]
        changes[f"mixtral/{INDEX}"] = m.json(stage.read(f"mixtral/{INDEX}"), ["weight_map"], values)
    if not changes or m.chance(0.1):
        name = f"mixtral/{m.pick([*shards, SINGLE, INDEX])}"
        other = stage.read(f"mixtral/{m.pick(shards)}")
        changes[name] = m.pick([*ODD_FILES, other, other])
    return _case(m, stage, "index", "mixtral", changes, READING)


# ---------------------------------------------------------------- what config.json and others say


def configuration(m: Mutator, stage: Stage) -> Case:
    """A config.json: of any family without weights, or of a checkpoint."""
    if m.chance(0.7):
        file = m.pick(stage.names("configs"))
        ways = {"skeleton PART": 97.0, "inspect PART": 3.0}
    else:
        file = f"{m.pick([*stage.models, 'artifact'])}/config.json"
        ways = {"store PART": 85.0, "inspect PART": 5.0, GENERATE: 5.0, SHORT: 3.0}
    part = file.rpartition("/")[0]
    keys, values = _settings(stage)
    changed = m.json(stage.read(file), keys, values)
    changes: dict[str, Item] = {file: m.pick(ODD_FILES) if m.chance(0.02) else changed}
    if part in CHECKPOINTS or part == "artifact":
        return _case(m, stage, "configuration", part, changes, ways)
    return Case("configuration", (), {**changes}, _command(m, ways, part))


@cache
def _settings(stage: Stage) -> tuple[list[str], list[object]]:
    """Return the keys and the values of all configurations."""
    told = [json.loads(stage.read(name)) for name in stage.names("configs")]
    keys = sorted({key for one in told for key in one})
    values = {json.dumps(value, sort_keys=True) for one in told for value in one.values()}
    return [*keys, *SETTINGS * 3], [json.loads(value) for value in sorted(values)]


def quantization(m: Mutator, stage: Stage) -> Case:
    """quantization_config of an artifact."""
    told = json.loads(stage.read("artifact/config.json"))
    told["quantization_config"] = m.tree(told["quantization_config"], SETTINGS)
    changes = {"artifact/config.json": json.dumps(told).encode()}
    ways = {"load PART": 60, "store PART": 30, "inspect PART": 3, GENERATE: 5, EVALUATE: 1}
    return _case(m, stage, "quantization", "artifact", changes, ways)


def manifest(m: Mutator, stage: Stage) -> Case:
    """moecc.json of an artifact."""
    keys = ["experts_kept", "summary", "calibration_digest", "pipeline", "source", "format"]
    changes = {"artifact/moecc.json": m.json(stage.read("artifact/moecc.json"), keys)}
    ways = {"diff PART mixtral": 92.0, "diff PART mixtral --json": 5.0, EVALUATE: 3.0}
    return _case(m, stage, "manifest", "artifact", changes, ways)


SIDE_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
    *("tokenizer.model", "additional_chat_templates/tools.jinja", "LICENSE", "config.4.0.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.json", "x.tiktoken"),
)


def tokenizer(m: Mutator, stage: Stage) -> Case:
    """A file beside the weights: of the tokenizer, settings, templates, licences."""
    there = [name for name in SIDE_FILES if f"mixtral/{name}" in stage.names("mixtral")]
    name = f"mixtral/{m.pick(there * 5 + list(SIDE_FILES))}"
    known = stage.read(name) if name in stage.names("mixtral") else b'{"a": "b", "c": 1}'
    item: Item = m.json(known, SETTINGS) if name.endswith("json") else m.raw(known)
    if m.chance(0.1):
        item = m.pick(ODD_FILES)
    if m.chance(0.05):
        name = f"mixtral/{m.pick(ODD_NAMES)}.json"
    ways = {"rows PART text.txt": 55, "rows PART rows.jsonl": 15, GENERATE: 25, SHORT: 3}
    return _case(m, stage, "tokenizer", "mixtral", {name: item}, ways)


# ---------------------------------------------------------------- what else a compilation reads


def journal(m: Mutator, stage: Stage) -> Case:
    """OUT.partial of a stopped compilation, which then goes on or begins anew."""
    part = m.pick(["stopped"] * 5 + ["kept"])
    files = [name.removeprefix(part) for name in stage.names(part)]
    changes: dict[str, Item] = {}
    for _ in range(m.pick([1, 1, 2])):
        name = m.pick(files)
        raw = stage.read(f"{part}{name}")
        item = m.pick([m.raw(raw), m.raw(raw), stage.read(f"{part}{m.pick(files)}"), None, b""])
        if raw.startswith(b"{") and m.chance(0.3):
            item = m.json(raw)
        if m.chance(0.1):
            other = m.pick(["x", "over", "layer-0-0002.json", "kept-x.safetensors"])
            name = f"/{m.pick(['', 'journal/', 'output/'])}{other}"
        changes[f"out.partial{name}"] = item
    parts = (f"{part}:out.partial", *stage.need("mixtral", "text.txt"))
    stage.need(part, f"whole-{part}")
    whole, stays = f"whole-{part}", ("out.partial",)
    return Case("journal", parts, changes, compilation(part), whole, stays)


CALIBRATIONS = ("text.txt", "rows.jsonl", "rows.json")


def calibration(m: Mutator, stage: Stage) -> Case:
    """A calibration or evaluation text: plain, a row on each line, or one list."""
    file = m.pick(CALIBRATIONS)
    raw = stage.read(file)
    if file == "rows.json":
        item: Item = m.json(raw, ["text", "messages", "role"])
    elif file == "rows.jsonl":
        lines = raw.splitlines(keepends=True)
        at = m.random.randrange(len(lines))
        lines[at] = m.json(lines[at].rstrip(), ["text", "messages", "role"]) + b"\n"
        item = b"".join(lines).replace(b"\n  ", b"") if m.chance(0.8) else m.raw(raw)
    else:
        item = m.pick([m.raw(raw), m.text(raw.decode()).encode("utf-8", "surrogatepass")])
    if m.chance(0.05):
        item = m.pick(ODD_FILES)
    name = m.pick([file] * 9 + [m.pick(CALIBRATIONS)])
    ways = {
        f"rows mixtral {name}": 90.0,
        COMPILE.replace("text.txt", name): 4.0,
        EVALUATE.replace("text.txt", name).replace("PART", "mixtral"): 2.0,
    }
    return Case("calibration", stage.need("mixtral"), {name: item}, _command(m, ways))


def adapter(m: Mutator, stage: Stage) -> Case:
    """A LoRA adapter."""
    stage.program()
    settings, weights = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
    keys = ["use_dora", "use_rslora", "target_parameters", "alpha_pattern", "bias", "lora_alpha"]
    keys += ["modules_to_save", "init_lora_weights", "fan_in_fan_out", "rank_pattern", "peft_type"]
    changes: dict[str, Item] = {}
    if m.chance(0.5):
        changes[settings] = m.json(stage.read(settings), keys)
    if not changes or m.chance(0.1):
        changes[weights] = _mutate_tensors.mutated(m, stage.read(weights))
    if m.chance(0.03):
        changes[m.pick([settings, weights])] = m.pick(ODD_FILES)
    passes = "lora{path=adapter},vq{rounds=1,codebook=layer}"
    ways = {
        "fit adapter": 92,
        f"compile mixtral --passes '{passes}' -o out {shlex.join(CALIBRATION)}": 4,
        f"inspect mixtral --passes '{passes}'": 4,
    }
    parts = stage.need("adapter", "mixtral", "text.txt")
    return Case("adapter", parts, changes, _command(m, ways))


# ---------------------------------------------------------------- what is typed


PIPELINES = (
    *(
        "vsraq,kbvq",
        "sensitivity,kbvq{bits=3,rank=16},dense{bits=4}",
        "vq{rounds=1,codebook=layer}",
    ),
    *("kbvq{rounds=8}", "lora{path=adapter},vsraq,kbvq", "vsraq,kbvq,absorb{path=adapter,rank=2}"),
    *("klt{rank=2,mean=3},vq{bits=3},affine{offset=on},fold", "kbvq,rilq{steps=4,lr=0.5},merge"),
    *("budget{bits=2.4},moments{min_tokens=9,routing=top},klt,vq,affine,fold", "dense"),
)
TARGETS_TEXT = (
    *("onnx{profile=native,dtype=float16,embeddings=int8}", "onnx{profile=qmoe,bits=8}", "onnx"),
    *("onnx{opset=21,external=yes}", "dense{dtype=bfloat16}", "reference", "triton"),
)
VALUES = (
    *"0 1 2 3 2.4 -1 1e-3 1e999 nan inf true auto layer on text.txt mixtral a=b".split(),
    *("{", "}", ",", "=", "{}", "{bits=2}", "./x.py", "x.py", " ", "\t"),
)


def _words(kind: str, names: Sequence[str]) -> tuple[str, ...]:
    found = set(re.findall(r"\w+", kind)) | set(names)
    return (*sorted(found), *VALUES)


@cache
def _pass_words() -> tuple[str, ...]:
    options = [f"{f.name}=" for cls in PASSES.classes().values() for f in cls.options()]
    return _words(" ".join(PIPELINES), [*PASSES.names(), *options])


@cache
def _target_words() -> tuple[str, ...]:
    options = [f"{f.name}=" for cls in TARGETS.classes().values() for f in cls.options()]
    return _words(" ".join(TARGETS_TEXT), [*TARGETS.names(), *options])


def pipeline(m: Mutator, stage: Stage) -> Case:
    """The text of --passes."""
    change = m.pick([m.text, m.words, m.words])
    text = _harmless(change(m.pick(PIPELINES), _pass_words()))
    bits = _harmless(m.pick([*VALUES, *map(str, NUMBERS)]))
    stage.program()
    parts = stage.need("mixtral", "adapter")
    commands = (
        [["resolve", text]] * 6
        + [["passes", text]] * 2
        + [["inspect", "mixtral", "--passes", text, f"--bits={bits}"]] * 4
        + [["inspect", "mixtral", f"--passes={text}"]]
    )
    return Case("pipeline", parts, {}, m.pick(commands))


def form(m: Mutator, stage: Stage) -> Case:
    """The text of --to and --backend."""
    change = m.pick([m.text, m.words, m.words])
    text = _harmless(change(m.pick(TARGETS_TEXT), _target_words()))
    light = "onnx" not in text  # such an export takes seconds
    commands = [["target", text, "artifact"]] * 8 + [["targets", text]] * 3
    if light:
        commands += [["export", "artifact", f"--to={text}", "-o", "out"]] * 2
    return Case("form", stage.need("artifact"), {}, m.pick(commands))


LINES = (
    f"{COMPILE} --seed 3 --bits 2 --json",
    f"{COMPILE} --backend dense --dump texts --no-progress",
    COMPILE.replace("text.txt", "rows.jsonl"),
    "inspect mixtral --passes vsraq,kbvq --bits 2.4 --json",
    "inspect artifact",
    EVALUATE.replace("PART", "artifact") + " --batch 2",
    GENERATE.replace("PART", "artifact") + " --temperature 0.5 --seed 1",
    "export artifact --to dense -o out --json",
    "diff mixtral artifact --json",
    "bench artifact --threads 1 2 --prompt-tokens 4 --new-tokens 2",
    *("passes vq", "passes", "targets onnx --json", "targets", "--version", "compile --help"),
)


def options(m: Mutator, stage: Stage) -> Case:
    """A command line: its words changed, doubled, left out, exchanged or taken from another."""
    words = shlex.split(m.pick(LINES))
    every = [*shlex.split(" ".join(LINES)), *VALUES]
    for _ in range(m.pick([1, 1, 2, 4])):
        at = m.random.randrange(len(words)) if words else 0
        new = m.pick(
            [m.pick(STRINGS), str(m.pick(NUMBERS)), m.pick(every), m.text("".join(words[at:][:1]))]
        )
        ways = [
            [*words[:at], new, *words[at + 1 :]],
            [*words[:at], new, *words[at + 1 :]],
            [*words[:at], new, *words[at:]],
            words[:at] + words[at + 1 :],
            words[:at] + words[at : at + 2] * 2 + words[at + 2 :],
            words[:at] + words[at + 1 : at + 2] + words[at : at + 1] + words[at + 2 :],
        ]
        words = m.pick(ways)
    parts = stage.need("mixtral", "artifact", "text.txt", "rows.jsonl")
    return Case("options", parts, {}, [_harmless(w) for w in words], stays=("texts",))


def _harmless(word: str) -> str:
    """Return a word that leads to no file outside the folder in which a command runs."""
    word = re.sub(r"\.\.+", ".", word)
    return re.sub(r"(^|=|,|\s)[/~]", r"\1./", word)


def exported(m: Mutator, stage: Stage) -> Case:
    """A file of an ONNX export, which `bench` runs."""
    file = m.pick(["exported/genai_config.json"] * 2 + ["exported/model.onnx"])
    raw = stage.read(file)
    item: Item = m.json(raw, ["model", "context_length"]) if file.endswith("json") else m.raw(raw)
    if m.chance(0.05):
        item = m.pick([*ODD_FILES, m.pick(RAW_JSON).encode("utf-8", "surrogatepass")])
    command = "bench exported --threads 1 --prompt-tokens 4 --new-tokens 2".split()
    return Case("exported", stage.need("exported"), {file: item}, command)


# Each with the share of the inputs that it gets, in thousandths.
DRAWS: Mapping[str, tuple[Draw, int]] = {
    "header": (header, 170),
    "index": (index, 80),
    "configuration": (configuration, 160),
    "quantization": (quantization, 110),
    "manifest": (manifest, 40),
    "tokenizer": (tokenizer, 50),
    "journal": (journal, 25),
    "calibration": (calibration, 60),
    "adapter": (adapter, 60),
    "pipeline": (pipeline, 70),
    "form": (form, 40),
    "options": (options, 60),
    "exported": (exported, 2),
}
