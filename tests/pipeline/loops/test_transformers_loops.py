"""transformers as people train it: models in plain loops, and the Trainer with a callback of five lines."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode

import controlprune as cp

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside the library, as it is imported
    from transformers import (
        BertConfig,
        BertForMaskedLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        set_seed,
    )

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
STEPS, BUDGET = 24, 0.6
POLICY = cp.Control(observe_every=1, update_every=2)
WORDS, LENGTH = 64, 16
SMALL = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2() -> nn.Module:
    """Its head is tied to the embedding."""
    sizes = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=LENGTH))


def llama(tied: bool = False) -> nn.Module:
    sizes = {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": LENGTH}
    return LlamaForCausalLM(LlamaConfig(**SMALL, **sizes, tie_word_embeddings=tied))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "bert": bert,
    "llama": llama,
    "llama tied": lambda: llama(tied=True),
}
EXAMPLE = {"input_ids": torch.zeros(2, LENGTH, dtype=torch.long)}


def flops(model: nn.Module) -> int:
    model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**EXAMPLE)
    return counter.get_total_flops()


def tokens(step: int, count: int = 4) -> Tensor:
    """Sentences that count upwards."""
    start = torch.randint(WORDS, (count, 1), generator=torch.Generator().manual_seed(step))
    return (start + torch.arange(LENGTH)) % WORDS


def assert_small(model: nn.Module, controller: cp.Controller, dense: int) -> None:
    assert controller.skipped == 0
    assert controller.history[-1].realised["flops"] <= BUDGET  # before the end already
    controller.finalize()
    assert controller.cost()["flops"].fraction <= BUDGET
    assert flops(model) < 0.8 * dense  # torch's counter does not see all that ours does
    model.train()
    model(**EXAMPLE, labels=EXAMPLE["input_ids"]).loss.backward()


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_loop(name: str) -> None:
    set_seed(0)
    model = MODELS[name]()
    dense = flops(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    controller = cp.attach(
        model.train(),
        optimizer,
        budget=cp.Budget(flops=BUDGET),
        example_inputs=EXAMPLE,
        total_steps=STEPS,
        policy=POLICY,
    )
    for step in range(STEPS):
        ids = tokens(step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        controller.step(loss)
        optimizer.zero_grad()
    assert_small(model, controller, dense)
    if "tied" in name or name == "gpt2":
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


# --- the Trainer ----------------------------------------------------------------------------------


class Sentences(Dataset):
    def __len__(self) -> int:
        return 512

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids = tokens(n, 1)[0]
        return {"input_ids": ids, "labels": ids}


def trained_by(model: nn.Module, prune: TrainerCallback, folder: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1000,
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=[prune])


class Prune(TrainerCallback):
    """The five lines."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller = cp.attach(
            kwargs["model"],
            kwargs["optimizer"],
            budget=cp.Budget(flops=BUDGET),
            example_inputs=EXAMPLE,
            total_steps=state.max_steps,
            policy=POLICY,
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.step()


class PruneAtStepEnd(Prune):
    """As well, where gradients are gone already."""

    on_optimizer_step = TrainerCallback.on_optimizer_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.step()


class PruneAtSubsteps(Prune):
    """And for each of the accumulated batches; the horizon is still that of the optimizer's steps."""

    on_optimizer_step = TrainerCallback.on_optimizer_step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.step()

    on_step_end = on_substep_end


RUNS: dict[str, tuple[str, type[Prune], dict[str, Any]]] = {
    "plain": ("llama", Prune, {}),
    "gradients are gone": ("bert", PruneAtStepEnd, {}),
    "accumulated": ("gpt2", Prune, {"gradient_accumulation_steps": 3}),
    "checkpointed": ("llama", Prune, {"gradient_checkpointing": True}),
    "checkpointed, reentrant": (
        "gpt2",
        Prune,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ),
    "bfloat16": ("llama tied", Prune, {"bf16": True}),
    "both": ("gpt2", Prune, {"bf16": True, "gradient_checkpointing": True}),
    "clipped and scheduled": ("bert", Prune, {"max_grad_norm": 0.1, "lr_scheduler_type": "cosine"}),
    "sgd": ("llama", Prune, {"optim": "sgd"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_trainer(name: str, tmp_path: Path) -> None:
    build, callback, options = RUNS[name]
    set_seed(0)
    model = MODELS[build]()
    dense = flops(model)
    prune = callback()
    trainer = trained_by(model, prune, tmp_path, **options)
    trainer.train()
    assert_small(model, prune.controller, dense)
    losses = [row.loss for row in prune.controller.history]
    assert all(loss != loss for loss in losses)  # a callback is not given it


def test_an_optimizer_that_cannot_be_followed_is_refused_by_name(tmp_path: Path) -> None:
    """Its Adafactor keeps row and column means without the other dimension."""
    with pytest.raises(ValueError, match=r"Adafactor state 'exp_avg_sq_row' of .* such as 'model\.embed"):
        trained_by(llama(), Prune(), tmp_path, optim="adafactor").train()
