"""Exports a trained model as a plain Hugging Face folder; each file is replaced atomically."""

import tempfile
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2ForCausalLM

from training.tokenizer import END, END_OF_TEXT


def export_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, bf16 weights, tokenizer and generation defaults to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = Qwen2ForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16()
    copy.config.dtype = torch.bfloat16
    copy.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids([END_OF_TEXT, END]),
        pad_token_id=tokenizer.convert_tokens_to_ids(END_OF_TEXT),
    )
    with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
        copy.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for path in Path(partial).iterdir():
            path.chmod(0o644)
            path.replace(folder / path.name)
