"""``deepspeed launcher/pretrain.py --config configs/X.yaml [a.b=c ...]``: PersonMAE pre-training on one or several hosts."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # deepspeed puts launcher/ there, not the checkout

from personmae.system import signals

if __name__ == "__main__":  # before all that takes time
    signals.answer_early()

from launcher.program import main
from personmae.errors import leave

if __name__ == "__main__":
    leave(main("pretrain"))
