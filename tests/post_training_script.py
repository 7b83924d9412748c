"""Trains a tiny model by distillation and by DPO, on however many processes it is started, and writes both weights."""

import sys
from pathlib import Path

from accelerate import PartialState
from adapted_cases import adapt, random_ids, stock_model
from safetensors.torch import save_file
from test_distillation import rows_of, trainer_of
from test_preference import dpo, pairs


def main(folder, num_processes):
    batch = {"per_device_train_batch_size": 4 // num_processes, "max_steps": 3}
    trainers = {
        "distillation": trainer_of(
            adapt("llama"), folder / "distillation", rows_of(random_ids(12, 16)), stock_model("gpt2", seed=3), **batch
        ),
        "dpo": dpo(folder / "dpo", data=pairs(12), **batch),
    }
    for name, trainer in trainers.items():
        trainer.train()
        if PartialState().is_main_process:
            weights = {key: part.detach().clone() for key, part in trainer.model.state_dict().items()}
            save_file(weights, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
