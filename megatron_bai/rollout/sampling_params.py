"""The sampling parameters of every request: all that SGLang has, so that no default of a server changes the policy.

A server puts the parameters that a request leaves out from its own `--preferred-sampling-params`
(managers/tokenizer_manager.py); a model's `generation_config.json` is in the defaults of its OpenAI endpoints, which
nothing here uses. A penalty, a truncation or a constraint would sample from another policy than the one whose
log-probabilities training computes. SGLang 0.5.19 to 0.5.21 have the same parameters (sampling/sampling_params.py).
"""

from collections.abc import Collection
from typing import Any

from megatron_bai.errors import UserError

# Parameters with which the model's own distribution is sampled, over the whole vocabulary, until a stop token or the
# limit. None switches a constraint off.
_NEUTRAL: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_new_tokens": 0,
    "n": 1,
    "beam_width": None,
    "stop": None,
    "stop_regex": None,
    "ignore_eos": False,
    "json_schema": None,
    "regex": None,
    "ebnf": None,
    "structural_tag": None,
    "logit_bias": None,
    "custom_params": None,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "no_stop_trim": False,
    "stream_interval": None,
}


def make_sampling_params(
    temperature: float, max_new_tokens: int, stop_token_ids: Collection[int] = (), seed: int | None = None
) -> dict[str, Any]:
    """Make the `sampling_params` of a request.

    Args:
        temperature: above 0.
        max_new_tokens: 0 for a request that only scores its tokens.
        stop_token_ids: any of them ends a response; empty: none but the model's own.
        seed: of the sample; None leaves it to the server.
    """
    return _NEUTRAL | {
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
        "stop_token_ids": sorted(stop_token_ids) or None,
        "sampling_seed": seed,
    }


def refuse_other_defaults(url: str, preferred: object) -> None:
    """Refuse a server whose preferred sampling parameters have one that requests do not set.

    Args:
        url: of the server.
        preferred: its `preferred_sampling_params`, a dict or None.

    Raises:
        UserError: names the server and the parameter.
    """
    if not preferred:
        return
    if not isinstance(preferred, dict):
        raise UserError(f"the server at {url} has --preferred-sampling-params {preferred!r}: start it without")
    if others := sorted(map(str, preferred.keys() - make_sampling_params(1.0, 1).keys())):
        raise UserError(
            f"the server at {url} has --preferred-sampling-params with {', '.join(others)}, which no request can take "
            "back: start it without"
        )
