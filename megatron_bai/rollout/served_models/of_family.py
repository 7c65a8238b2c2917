"""SGLang's own models of the family that is served, from the module which the family names."""

import os
from importlib import import_module
from typing import Any

from megatron_bai.model.families import registry
from megatron_bai.rollout.served_models import SERVED_MODULE

# Whoever starts the server sets it; without it the default family's
_module = os.environ.get(SERVED_MODULE) or registry.all_families()[registry.DEFAULT].served_by
_entry: Any = import_module(_module).EntryClass
EntryClass = _entry if isinstance(_entry, list) else [_entry]

__all__ = ["EntryClass"]
