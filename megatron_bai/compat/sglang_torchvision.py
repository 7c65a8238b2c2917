"""An empty torchvision where the real one does not import.

Symptom: SGLang stops at `import torchvision` or at `AutoImageProcessor requires the Torchvision library`, whatever
model it is asked to serve. PyPI's torchvision is built for CUDA and does not load beside a CPU build of torch.

Upstream: srt/configs/{janus_pro,deepseek_ocr}.py and srt/multimodal/ import it at load time;
srt/configs/utils.py `register_image_processor` needs transformers' `AutoImageProcessor`.

Can go: when upstream imports its image models lazily.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from megatron_bai.compat import releases
from megatron_bai.compat.patch import Patch


def install() -> None:
    """Offer empty modules and an image processor that registers nothing, unless torchvision works."""
    try:
        importlib.import_module("torchvision")
        return
    except Exception:  # absent, or a CUDA build whose library fails to load in its own ways
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]

    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # cached: transformers must go on knowing that there is none
    sys.meta_path.append(_StubFinder())
    import sglang  # noqa: F401  (it puts its own module object in transformers' place)
    import transformers

    namespace: Any = transformers
    namespace.AutoImageProcessor = _ImageProcessorStub


class _ImageProcessorStub:
    """Accepts the image processors that SGLang registers for models that are not served here."""

    @staticmethod
    def register(*args: Any, **kwargs: Any) -> None:
        pass


class _StubModule(ModuleType):
    """A module from which any name can be imported; using one raises an error that names what is missing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def absent(*args: Any, **kwargs: Any) -> None:
            raise NotImplementedError(f"{self.__name__}.{name}: torchvision does not work here, so images cannot")

        return type(name, (), {"__init__": absent})


class _StubFinder(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] == "torchvision" else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


PATCH = Patch(
    name="sglang_torchvision",
    distribution="sglang",
    versions=releases.sglang_releases(),
    scope="sglang-cpu",
    summary="SGLang imports torchvision for every model, and PyPI's needs CUDA",
    install=install,
)
