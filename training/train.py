"""The training run: `python -m training.train`.

It runs the curriculum, logs to the run's folder, saves a checkpoint every few minutes and after
every stage, and exports the model after every stage with retrieval. When restarted it resumes from
the last checkpoint: the data of step i depends only on the seed and on i.
"""

import argparse
import json
import logging
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from training import attention
from training.batches import Batch, make_batch
from training.curriculum import CURRICULUM, Stage
from training.export import export_model
from training.model import make_model
from training.readout import measure
from training.samples import SampleMaker
from training.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

NUM_THREADS = 2
WARMUP_STEPS = 100
CHECKPOINT_INTERVAL_S = 180.0
LOG_INTERVAL_STEPS = 20
AVERAGE_DECAY = 0.95


@dataclass
class Progress:
    """Progress of the run, saved with every checkpoint."""

    stage_idx: int = 0
    stage_tokens: int = 0
    step: int = 0
    tokens: int = 0
    minutes: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)

    def observe(self, name: str, value: float) -> None:
        """Update the moving average called `name` with `value`."""
        old = self.accuracy.get(name, value)
        self.accuracy[name] = AVERAGE_DECAY * old + (1 - AVERAGE_DECAY) * value


@dataclass(frozen=True)
class Result:
    """Result of one batch: its loss, its answers' hits by kind, a gradient per parameter."""

    loss: float
    hits: dict[str, list[float]]
    gradients: tuple[Tensor | None, ...]


class Trainer:
    """A model, its optimizer and its progress through the curriculum.

    The batches of a step run in parallel, one thread each: on a busy machine, threads that share
    every operation spend their time waiting for each other.
    """

    def __init__(self, seed: int, run_dir: Path, export_dir: Path) -> None:
        self._seed, self._run_dir, self._export_dir = seed, run_dir, export_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._tokenizer = self._load_tokenizer()
        self._maker = SampleMaker(self._tokenizer)
        (assigns,) = self._maker.encode(" =")
        self._model = make_model(seed, assigns)
        attention.register()
        self._model.set_attn_implementation(attention.NAME)
        self._optimizer = make_optimizer(self._model)
        torch.set_num_threads(1)
        self._pool = ThreadPoolExecutor(
            NUM_THREADS, initializer=torch.set_num_threads, initargs=(1,)
        )
        self._progress = Progress()
        self._saved_at = time.monotonic()
        self._load_checkpoint()

    def run(self, last_stage: str) -> None:
        """Train until the stage called `last_stage` is done."""
        while self._progress.stage_idx < len(CURRICULUM):
            stage = CURRICULUM[self._progress.stage_idx]
            logger.info("stage %s from step %d", stage.name, self._progress.step)
            self._run_stage(stage)
            self._progress.stage_idx += 1
            self._progress.stage_tokens = 0
            self._progress.accuracy.clear()
            self._save_checkpoint()
            if not stage.is_basic:
                export_model(self._model, self._tokenizer, self._export_dir)
            if stage.name == last_stage:
                return

    def _run_stage(self, stage: Stage) -> None:
        progress, target = self._progress, f"length {stage.lengths[-1]}"
        while progress.stage_tokens < stage.max_tokens:
            self._step(stage)
            is_warm = progress.stage_tokens > 200_000
            if is_warm and progress.accuracy.get(target, 0.0) >= stage.target_accuracy:
                return
            if time.monotonic() - self._saved_at > CHECKPOINT_INTERVAL_S:
                self._save_checkpoint()

    def _step(self, stage: Stage) -> None:
        started = time.monotonic()
        rng = random.Random(f"{self._seed}-{self._progress.step}")
        self._set_learning_rate(stage)
        (length,) = rng.choices(stage.lengths, weights=stage.shares)
        batches = [
            make_batch(rng, self._maker, stage, length) for _ in range(stage.batches_per_step)
        ]
        seeds = [rng.random() for _ in batches]
        results = list(self._pool.map(self._differentiate, batches, seeds))
        for parameter, *gradients in zip(
            self._parameters, *(result.gradients for result in results), strict=True
        ):
            known = [gradient for gradient in gradients if gradient is not None]
            parameter.grad = torch.stack(known).mean(0) if known else None
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._progress.step += 1
        num_tokens = sum(batch.tokens.numel() for batch in batches)
        self._count(length, num_tokens, results, time.monotonic() - started)
        if self._progress.step % LOG_INTERVAL_STEPS == 0:
            self._log()

    def _set_learning_rate(self, stage: Stage) -> None:
        done = self._progress.stage_tokens / stage.max_tokens
        rate = stage.learning_rate + done * (stage.final_learning_rate - stage.learning_rate)
        rate *= min(1.0, (self._progress.step + 1) / WARMUP_STEPS)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @property
    def _parameters(self) -> list[nn.Parameter]:
        return list(self._model.parameters())

    def _differentiate(self, batch: Batch, seed: float) -> "Result":
        measured = measure(self._model, batch, random.Random(seed))
        gradients = torch.autograd.grad(measured.loss, self._parameters, allow_unused=True)
        return Result(measured.loss.item(), measured.hits, gradients)

    def _count(
        self, length: int, num_tokens: int, results: Sequence["Result"], took_s: float
    ) -> None:
        progress = self._progress
        progress.tokens += num_tokens
        progress.stage_tokens += num_tokens
        progress.minutes += took_s / 60
        progress.observe("loss", sum(result.loss for result in results) / len(results))
        progress.observe("tokens per second", num_tokens / took_s)
        hits: defaultdict[str, list[float]] = defaultdict(list)
        for result in results:
            for kind, values in result.hits.items():
                hits[kind] += values
        everything = [hit for values in hits.values() for hit in values]
        if everything:
            progress.observe(f"length {length}", sum(everything) / len(everything))
        for kind, values in hits.items():
            progress.observe(f"{kind} {length}", sum(values) / len(values))

    def _log(self) -> None:
        progress = self._progress
        figures = " ".join(f"{k}={v:.3f}" for k, v in sorted(progress.accuracy.items()))
        logger.info(
            "step %d tokens %d minutes %.1f | %s",
            progress.step,
            progress.tokens,
            progress.minutes,
            figures,
        )
        with (self._run_dir / "log.jsonl").open("a") as log:
            log.write(json.dumps(asdict(progress)) + "\n")

    def _load_tokenizer(self) -> PreTrainedTokenizerFast:
        folder = self._run_dir / "tokenizer"
        if not folder.exists():
            train_tokenizer(self._seed).save_pretrained(folder)
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
        return tokenizer

    @property
    def _checkpoint(self) -> Path:
        return self._run_dir / "checkpoint.pt"

    def _save_checkpoint(self) -> None:
        state = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "progress": asdict(self._progress),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)
        self._saved_at = time.monotonic()

    def _load_checkpoint(self) -> None:
        if not self._checkpoint.exists():
            return
        state = torch.load(self._checkpoint, weights_only=True)
        self._model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._progress = Progress(**state["progress"])
        logger.info("resuming at step %d", self._progress.step)


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/winnow-tiny"))
    parser.add_argument("--export-dir", type=Path, default=Path("models/winnow-tiny"))
    parser.add_argument("--last-stage", default=CURRICULUM[-1].name)
    arguments = parser.parse_args()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(arguments.run_dir / "train.log")],
    )
    Trainer(arguments.seed, arguments.run_dir, arguments.export_dir).run(arguments.last_stage)


if __name__ == "__main__":
    main()
