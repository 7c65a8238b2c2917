"""Where the parts of a training step come from: Transformer Engine, NVIDIA's Apex, or torch."""

from megatron_bai.distributed.kernel_packages import TITLES, TRANSFORMER_ENGINE, KernelPackage, release_of


def describe_kernels(transformer_engine: bool) -> dict[str, str]:
    """Return where the parts of a training step come from, asking the modules of Megatron-Core that use them.

    Args:
        transformer_engine: whether its layers are used.

    Returns:
        For each part a package with its release, or `torch` for Megatron-Core's own code and this library's.
    """
    from megatron.core.optimizer import Adam, clip_grads

    layers = TRANSFORMER_ENGINE if transformer_engine else "torch"
    parts = {
        "layers, norms and attention": layers,
        f"experts ({'grouped' if transformer_engine else 'one after another'})": layers,
        "optimizer": _package_of(Adam),
        "gradient norm and clipping": _package_of(clip_grads.multi_tensor_applier),
    }
    return {part: _title_of(package) for part, package in parts.items()} | {"gradient accumulation": "not fused"}


def format_kernels(transformer_engine: bool) -> str:
    """Return `describe_kernels` in one line, parts of one package together."""
    of_package: dict[str, list[str]] = {}
    for part, package in describe_kernels(transformer_engine).items():
        of_package.setdefault(package, []).append(part)
    return "; ".join(f"{', '.join(parts)}: {package}" for package, parts in of_package.items())


def _package_of(part: object) -> str:
    """Return the top package that a class, a function or an object's class is from."""
    module = getattr(part, "__module__", None) or type(part).__module__
    return str(module).partition(".")[0]


def _title_of(package: str) -> str:
    """Return a package with its release, and `torch` for Megatron-Core's own loops over torch's operators."""
    if package not in TITLES:
        return "torch"
    return KernelPackage(package, release_of(package), "").title
