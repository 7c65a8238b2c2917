"""The sampling parameters of every request: all that SGLang has, so that no default of a server changes the policy.

A server puts the parameters that a request leaves out from its own `--preferred-sampling-params`
(managers/tokenizer_manager.py); a model's `generation_config.json` is in the defaults of its OpenAI endpoints, which
nothing here uses. A penalty, a truncation or a constraint would sample from another policy than the one whose
log-probabilities training computes, unless it is one of `rollout` that training computes with as well: `top_k`, `top_p`
and `min_p` (`kept_ids.py`), and `min_new_tokens`, before which SGLang gives end tokens no probability, in its
log-probabilities too. SGLang 0.5.19 to 0.5.21 have the same parameters (sampling/sampling_params.py).
"""

from collections.abc import Collection, Mapping
from typing import Any

from megatron_bai.config import Rollout
from megatron_bai.config.limits import is_set
from megatron_bai.errors import UserError

_TRUNCATION = ("top_p", "min_p", "top_k")  # the last one alone is a truncation that a server says the ids of
# SGLang 0.5.21 to 0.5.23 (utils/hf_transformers/common.py)
_ALWAYS_ENDS = ("<|eom_id|>", "<|content_model_end_sampling|>", "<|ifm|im_end|>")
_MOST_STOPS = 32  # texts of a request (sampling/sampling_params.py)
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


def make_rollout_params(
    rollout: Rollout,
    temperature: float,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
    seed: int,
    num_sampled: int = 0,
) -> dict[str, Any]:
    """Make the `sampling_params` of a request for a sample, with the rollout's truncation and ends.

    Args:
        rollout: its settings; the default ones add nothing to `make_sampling_params`.
        temperature: as there.
        max_new_tokens: as there.
        stop_token_ids: as there.
        seed: as there.
        num_sampled: tokens of the response that are in the request's input.
    """
    params = make_sampling_params(temperature, max_new_tokens, stop_token_ids, seed)
    if rollout.top_k:
        params |= {"top_k": rollout.top_k, "top_p": rollout.top_p, "min_p": rollout.min_p}
    if rollout.stop:
        params["stop"] = list(rollout.stop)
    # SGLang counts the tokens of a request alone, and refuses a minimum above its limit
    remaining = min(rollout.min_new_tokens - num_sampled, max_new_tokens)
    return params | ({"min_new_tokens": remaining} if remaining > 0 else {})


def needs_tokenizer(rollout: Rollout) -> bool:
    """Return whether servers need the model's tokenizer, without which they are faster.

    With stop texts they decode what they sample; `min_new_tokens` asks it for the end token.
    """
    return bool(rollout.stop) or rollout.min_new_tokens > 0


def servers_end_tokens(added_vocab: Mapping[str, int]) -> list[int]:
    """Return the ids that end a response wherever a server has the tokenizer, whatever the model says.

    Args:
        added_vocab: ids of the tokens that the tokenizer adds to its model's.
    """
    return [added_vocab[text] for text in _ALWAYS_ENDS if text in added_vocab]


def validate_sampling(rollout: Rollout, vocab_size: int) -> None:
    """Refuse sampling settings that contradict each other, or under which the policy that sampled is not known.

    Args:
        rollout: its settings.
        vocab_size: of the model.

    Raises:
        UserError: names the setting.
    """
    truncation = next((f"rollout.{n}={getattr(rollout, n):g}" for n in _TRUNCATION if is_set(rollout, n)), "")
    minimum = f"rollout.min_new_tokens={rollout.min_new_tokens}" if rollout.min_new_tokens else ""
    for is_fault, fault in (
        (rollout.top_k == 1, "rollout.top_k is 1: every sample of a prompt would be the same; set at least 2, or 0"),
        (rollout.top_k > vocab_size, f"rollout.top_k ({rollout.top_k}) is more than model.vocab_size ({vocab_size})"),
        (
            truncation and not rollout.top_k,
            f"{truncation} without rollout.top_k: a server says which tokens a draw kept of the top_k likeliest alone, "
            "and training must know them; set rollout.top_k",
        ),
        (
            rollout.min_p and rollout.deterministic,
            "rollout.min_p with rollout.deterministic=true: SGLang ends at a request with both; set "
            "rollout.deterministic=false, or leave it out",
        ),
        (
            rollout.exact and (truncation or minimum),
            f"rollout.exact with {truncation or minimum}: the engines round otherwise there; leave one of them out",
        ),
        (
            rollout.min_new_tokens > rollout.max_new_tokens,
            f"{minimum} is more than rollout.max_new_tokens ({rollout.max_new_tokens})",
        ),
        (any(not text for text in rollout.stop), "rollout.stop has an empty text, which would end every response"),
        (len(rollout.stop) > _MOST_STOPS, f"rollout.stop has {len(rollout.stop)} texts: SGLang takes {_MOST_STOPS}"),
        (
            rollout.stop and rollout.partial_tokens,
            "rollout.stop with rollout.partial_tokens: a server does not see a text that begins in one round and ends "
            "in the next; use rollout.stop_token_ids",
        ),
        (
            any(token >= vocab_size for token in rollout.stop_token_ids),
            f"rollout.stop_token_ids {list(rollout.stop_token_ids)} has an id outside the vocabulary of {vocab_size}",
        ),
    ):
        if is_fault:
            raise UserError(fault)


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
