"""Checks of running SGLang servers: their release, and the flags they were started with.

A server reports its release (`/server_info`). The table of releases is `megatron_bai/compat/releases.py`.
"""

from collections.abc import Sequence
from typing import Any

from megatron_bai.compat import sglang_route_weights
from megatron_bai.compat.releases import (
    SERVERS,
    SGLANG,
    SGLangRelease,
    server_fault,
    sglang_releases,
    untested_server,
)
from megatron_bai.config import Rollout
from megatron_bai.errors import UserError
from megatron_bai.rollout.kept_ids import max_kept
from megatron_bai.rollout.sampling_params import needs_tokenizer, refuse_other_defaults
from megatron_bai.rollout.servers import control

# Settings of a running server, by name, that rollouts need, and others under which routes were wrong or not tried.
_REQUIRED_FLAGS = {"enable_return_routed_experts": "--enable-return-routed-experts"}
_SEED_FLAGS = {"enable_deterministic_inference": "--enable-deterministic-inference"}
_FORBIDDEN_FLAGS = {
    "speculative_algorithm": "--speculative-algorithm",
    "enable_hierarchical_cache": "--enable-hierarchical-cache",
    "enable_dp_attention": "--enable-dp-attention",
}
_DEFAULTS = "preferred_sampling_params"
_MASK_TOKENS, _NO_TOKENIZER = "sampling_mask_max_tokens", "skip_tokenizer_init"


def require_startable(found: str | None, where: str, device: str = "cpu") -> None:
    """Refuse a release that a run does not start: flags and, on a CPU, fixes are for those that were tried.

    Args:
        found: the release; None: none was found.
        where: ends the phrase "SGLang X …" in the error.
        device: `cpu` or `cuda`. `backend.untested` takes other releases on GPUs, where SGLang runs without fixes.

    Raises:
        UserError: names it and those that a run starts.
    """
    known = sglang_releases()
    if found not in known and not (device != "cpu" and is_untested(found) and untested_server(found)):
        fault = server_fault(found) if device != "cpu" and is_untested(found) else ""
        raise UserError(
            f"SGLang {found or '(none)'} {where}{fault}; a run starts servers of {', '.join(known)} alone: "
            f"pip install sglang=={SGLANG}"
        )


def require_route_weights(found: str | None) -> None:
    """Refuse a release whose servers cannot be made to return the weights of a token's experts.

    Args:
        found: the installed release; None: there is none.

    Raises:
        UserError: names it and those that can.
    """
    known = sglang_route_weights.PATCH.versions
    if found not in known:
        raise UserError(
            f"replay.weights=server needs SGLang {', '.join(known)}, whose servers a patch makes return weights, and "
            f"{found or 'none'} is installed: leave replay.weights at live"
        )


def is_untested(found: str | None) -> bool:
    """Return whether a release is not in the table: its rows must be verified before a run trains on them."""
    return found not in SERVERS


def release_of(found: str | None, where: str) -> SGLangRelease:
    """Return the table's entry of a release, or what stands for one that `backend.untested` takes.

    Args:
        found: the release; None: none was found.
        where: ends the phrase "SGLang X …" in an error.

    Raises:
        UserError: it is not taken; names it and what is wrong with it.
    """
    if found in SERVERS:
        return SERVERS[found]
    if untested := untested_server(found):
        return untested
    raise UserError(f"SGLang {found or '(none)'} {where}{server_fault(found)}: use one of {', '.join(SERVERS)}")


def releases(urls: Sequence[str]) -> dict[str, SGLangRelease]:
    """Return the releases of running servers, by URL.

    Raises:
        UserError: one does not answer, or is not in the table.
    """
    return {url: release_of(control.get(url, "/server_info").get("version"), f"answers at {url}") for url in urls}


def check_server_info(url: str, info: dict[str, Any], deterministic: bool) -> None:
    """Refuse a running server that cannot do what rollouts need.

    Args:
        url: of the server.
        info: its `/server_info`.
        deterministic: whether samples have seeds.

    Raises:
        UserError: names the server and the flag.
    """
    release_of(info.get("version"), f"answers at {url}")
    needed = _REQUIRED_FLAGS | (_SEED_FLAGS if deterministic else {})
    if missing := [flag for name, flag in needed.items() if not info.get(name)]:
        raise UserError(f"the server at {url} was started without {' and '.join(missing)}, which rollouts need")
    if barred := [flag for name, flag in _FORBIDDEN_FLAGS.items() if info.get(name)]:
        raise UserError(f"the server at {url} was started with {' and '.join(barred)}, under which routes may be wrong")
    refuse_other_defaults(url, info.get(_DEFAULTS))
    if info.get("dp_size", 1) != 1:
        raise UserError(f"the server at {url} has --dp-size {info['dp_size']}: start {info['dp_size']} servers")


def check_sampling(url: str, info: dict[str, Any], rollout: Rollout) -> None:
    """Refuse a running server that cannot sample as the settings say, or would not say from which tokens.

    Args:
        url: of the server.
        info: its `/server_info`.
        rollout: settings.

    Raises:
        UserError: names the setting and the server.
    """
    if rollout.top_k and not release_of(info.get("version"), f"answers at {url}").has_sampling_masks:
        raise UserError(
            f"rollout.top_k={rollout.top_k}: SGLang {info.get('version')} at {url} does not say which tokens a draw "
            "kept, as its sampler had them: use a newer release, or leave it out"
        )
    if (most := max_kept(rollout.top_k)) > info.get(_MASK_TOKENS, most):
        raise UserError(
            f"rollout.top_k={rollout.top_k}: the server at {url} has --sampling-mask-max-tokens {info[_MASK_TOKENS]}, "
            f"and ties may keep {most}: start it with as many"
        )
    if needs_tokenizer(rollout) and info.get(_NO_TOKENIZER):
        raise UserError(
            f"rollout.stop and rollout.min_new_tokens need a server with the model's tokenizer: start the one at {url} "
            "without --skip-tokenizer-init"
        )
