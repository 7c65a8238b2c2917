"""What is asked of servers for one sample."""

from dataclasses import dataclass
from hashlib import blake2b

from megatron_bai.rollout.sample import Sample


@dataclass(frozen=True)
class SampleRequest:
    """A sample to request.

    Attributes:
        prompt_index: index of its prompt in the batch.
        prompt_ids: token ids of the prompt.
        seed: of the sample. SGLang's draw depends on it and the token's position, so one seed serves all requests of a
            sample that is sampled in several goes or turns.
        partial: the sample so far, which the request continues; None: it begins.
    """

    prompt_index: int
    prompt_ids: list[int]
    seed: int
    partial: Sample | None = None


def sampling_seed(seed: int | str, prompt: int, member: int) -> int:
    """Compute the seed of one sample, in `[0, 2⁶³)`. Without seeds SGLang gives every member of a group the same.

    Args:
        seed: of the run, or the name of a stream of prompts.
        prompt: index of the prompt in the stream.
        member: index of the sample in its group.
    """
    digest = blake2b(f"{seed}/{prompt}/{member}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
