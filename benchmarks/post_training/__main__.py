"""`python -m benchmarks.post_training {arms,speculation,few_steps,grpo,dpo}`."""

import sys
from importlib import import_module


# Imported one at a time: of these only the last two need TRL.
PROGRAMS = {
    "arms": ("arms", "run"),
    "speculation": ("speculation", "run"),
    "few_steps": ("few_steps", "run"),
    "grpo": ("arithmetic", "run_grpo"),
    "dpo": ("arithmetic", "run_dpo"),
}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in PROGRAMS:
        sys.exit(f"usage: python -m benchmarks.post_training {{{','.join(PROGRAMS)}}} ...")
    module, function = PROGRAMS[sys.argv[1]]
    sys.exit(getattr(import_module(f".{module}", __package__), function)(sys.argv[2:]))
