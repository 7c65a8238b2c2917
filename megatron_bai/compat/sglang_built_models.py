"""Change SGLang's models once they are built, whichever they are: the seam that fixes of all models share."""

import functools
from collections.abc import Callable
from typing import Any

from megatron_bai.compat.patch import after_import


def change_built_models(change: Callable[[Any, Any], None]) -> None:
    """Wrap the function by which every loader of SGLang builds a model, in this process.

    Args:
        change: takes a model, whose parameters are not loaded yet, and its Hugging Face configuration; changes the
            model in place.
    """

    def replace(module: Any) -> None:
        upstream = module._initialize_model

        @functools.wraps(upstream)
        def _initialize_model(model_config: Any, *args: Any, **named: Any) -> Any:
            model = upstream(model_config, *args, **named)
            change(model, model_config.hf_config)
            return model

        module._initialize_model = _initialize_model

    after_import("sglang.srt.model_loader.loader", replace)
