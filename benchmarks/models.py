"""Train further checkpoints for `quality.py`, with other routers and other numbers of experts.

    python benchmarks/models.py                      all of them, into ~/.cache/moecc/models
    python benchmarks/models.py sigmoid32 --minutes 60 --into FOLDER

The text is the calibration text and a sample of the Python sources of the running interpreter and
its installed packages, without the documents of the evaluation text. Tokenizer, embeddings and
attention start as those of the example model, so its texts serve every checkpoint and minutes are
enough. Routers and experts are trained from noise. The clock ends a run, so a checkpoint depends on
the machine.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tinymoe"

SOURCES = 12_000_000  # characters of Python; the calibration text is added four times
SIZES = (
    "hidden_size=256 num_attention_heads=4 num_key_value_heads=4 max_position_embeddings=2048 "
    "tie_word_embeddings=true"
)
# name -> (model type, settings, share of the run after which all experts restart from one parent)
MODELS: dict[str, tuple[str, str, float | None]] = {
    "softmax8": (
        "mixtral",
        "num_hidden_layers=4 intermediate_size=256 num_local_experts=8 num_experts_per_tok=2 "
        "router_aux_loss_coef=0.01 "
        'rope_parameters={"rope_theta":10000.0,"rope_type":"default"}',
        None,
    ),
    "sigmoid32": (
        "glm4_moe",
        "num_hidden_layers=4 first_k_dense_replace=1 intermediate_size=512 n_routed_experts=32 "
        "num_experts_per_tok=4 n_shared_experts=1 n_group=1 topk_group=1 "
        "moe_intermediate_size=128 attention_bias=true rope_parameters="
        '{"rope_theta":10000.0,"rope_type":"default","partial_rotary_factor":1.0}',
        None,
    ),
    "upcycled64": (
        "qwen3_moe",
        "num_hidden_layers=3 num_experts=64 num_experts_per_tok=8 moe_intermediate_size=128 "
        "norm_topk_prob=true router_aux_loss_coef=0.01",
        0.25,
    ),
}


def corpus(out: Path) -> None:
    """Write Python sources, separated by NUL characters, without those in the evaluation text."""
    valid = (EXAMPLE / "valid.txt").read_text(encoding="utf-8")
    paths = sysconfig.get_paths()
    files = {f for name in ("stdlib", "purelib") for f in Path(paths[name]).rglob("*.py")}
    seen: set[str] = set()
    length = 0
    for file in random.Random(0).sample(sorted(files), len(files)):
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if length > SOURCES:
            break
        if 500 <= len(source) <= 200_000 and source[200:500] not in valid and source not in seen:
            seen.add(source.replace("\0", " "))
            length += len(source)
    calib = (EXAMPLE / "calib.txt").read_text(encoding="utf-8")
    out.write_text("\0".join([*sorted(seen), *[calib] * 4]), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(MODELS)}; all when none is given"
    )
    parser.add_argument("--minutes", type=float, default=10, help="each")
    parser.add_argument("--into", type=Path, default=Path.home() / ".cache" / "moecc" / "models")
    args = parser.parse_args()
    if unknown := [n for n in args.names if n not in MODELS]:
        parser.error(f"no model is called {unknown[0]}; there are {', '.join(MODELS)}")
    args.into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "sources.txt"
        corpus(text)
        for name in args.names or MODELS:
            kind, settings, share = MODELS[name]
            command = [sys.executable, EXAMPLE / "train.py", "--text", text]
            command += ["--tokenizer", EXAMPLE, "--start", EXAMPLE, "--config", kind]
            command += ["--set", *SIZES.split(), *settings.split()]
            command += ["--minutes", str(args.minutes), "-o", args.into / name]
            command += [] if share is None else ["--upcycle", str(share)]
            if status := subprocess.run(list(map(str, command)), check=False).returncode:
                return status
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
