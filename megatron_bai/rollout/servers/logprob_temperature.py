"""Check that a running server returns log-probabilities at the temperature it samples at.

With `SGLANG_RETURN_ORIGINAL_LOGPROB` in its environment it returns those at temperature 1: of another distribution than
the one it samples from. `/server_info` does not have the environment, so the check is by the numbers.
"""

from megatron_bai.errors import UserError
from megatron_bai.rollout.sampling_params import make_sampling_params
from megatron_bai.rollout.servers import control

_TOP = 4  # ids of the prompt (one alone may be padding, without an embedding), and log-probabilities compared
_LEAST_NATS = 0.01  # between the two answers, for a decision: well above the rounding of a server in bfloat16


def require_sampled_logprobs(url: str, temperature: float, timeout_s: float) -> None:
    """Refuse a server whose log-probabilities are not at the temperature of sampling.

    The distance of two log-probabilities is that of the logits over the temperature. Nothing is decided at temperature
    1, or where the model's distribution is next to uniform.

    Args:
        url: of the server.
        temperature: of sampling, above 0.
        timeout_s: of a request.

    Raises:
        UserError: names the server and the variable.
    """
    if temperature == 1:
        return
    plain, sampled = (_spread(url, value, timeout_s) for value in (1.0, temperature))
    expected = plain / temperature
    if abs(expected - plain) > _LEAST_NATS and abs(sampled - plain) < abs(sampled - expected):
        raise UserError(
            f"the server at {url} returns log-probabilities at temperature 1 for samples at {temperature:g}: start it "
            "without SGLANG_RETURN_ORIGINAL_LOGPROB"
        )


def _spread(url: str, temperature: float, timeout_s: float) -> float:
    """Return the distance between the log-probabilities of the likeliest tokens after a prompt, in nats."""
    body = {
        "input_ids": list(range(_TOP)),
        "sampling_params": make_sampling_params(temperature, max_new_tokens=1),
        "return_logprob": True,
        "top_logprobs_num": _TOP,
    }
    reply = control.post(url, "/generate", body, timeout_s)
    try:
        values = [float(entry[0]) for entry in reply["meta_info"]["output_top_logprobs"][0]]
        return max(values) - min(values)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise UserError(f"SGLang at {url} answers /generate without output_top_logprobs: {error!r}") from error
