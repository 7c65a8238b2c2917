"""Run as a module by the doctor: print what a run with CUDA would have of Transformer Engine and Apex, as JSON.

An import that ends its process ends this one alone. The argument is the setting `backend.transformer_impl`.
"""

import json
import sys
from dataclasses import asdict, replace

from megatron_bai.distributed.kernel_packages import (
    REFUSED,
    TITLES,
    TRANSFORMER_ENGINE,
    hide_package,
    inspect_package,
    require_accepted,
)
from megatron_bai.distributed.kernel_sources import format_kernels
from megatron_bai.errors import UserError


def main(transformer_impl: str) -> None:
    """Print both packages and the parts of a step, of a run that is not refused.

    Args:
        transformer_impl: the setting.
    """
    packages = {name: inspect_package(name) for name in TITLES}
    for package in packages.values():
        if package.fault:
            hide_package(package.name)
    use_layers = transformer_impl != "local"
    engine = packages[TRANSFORMER_ENGINE]
    refused = use_layers and bool(engine.fault)
    if use_layers and not engine.fault:
        try:
            require_accepted(engine)
        except UserError as error:
            refused, packages[TRANSFORMER_ENGINE] = True, replace(engine, fault=f"is not used: {error}")
    kernels = REFUSED if refused else format_kernels(use_layers)
    print(json.dumps({"packages": [asdict(package) for package in packages.values()], "kernels": kernels}))


if __name__ == "__main__":
    main(*sys.argv[1:])
