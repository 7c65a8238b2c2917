"""Run as a script: the example of docs/replay.md, as it stands there, on a CPU. Its random rollouts are all we add."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_bai import config
from megatron_bai.distributed import backend

STEPS, MICROS = 3, 2


def rollout_batches(step: int) -> list[tuple[torch.Tensor, list[np.ndarray]]]:
    """Two samples a micro-batch; of one the first tokens only were routed."""
    random = np.random.default_rng(step)
    found = []
    for _ in range(MICROS):
        routes = [random.random((rows, 2, 8)).argsort(axis=-1)[..., :2].astype(np.uint8) for rows in (15, 7)]
        found.append((torch.from_numpy(random.integers(0, 64, (2, 16))), routes))
    return found


def main() -> None:
    backend.init_backend(config.Backend(kind="cpu"))  # lets Megatron-Core run without a GPU
    page = Path(__file__).parents[2] / "docs" / "replay.md"
    code = page.read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {"rollout_batches": rollout_batches}
    exec(compile(code, str(page), "exec"), names)
    backend.shutdown_backend()


if __name__ == "__main__":
    main()
