"""Kept samples that tests make, and texts that break files, terminals and pages."""

from typing import Any

from megatron_bai.monitor.samples.kept_sample import KeptSample

NASTY = {
    "script": "</script><script>alert(1)</script><!--",
    "quotes": "\"'`\\ {[()]} & <b>[/b]",
    "terminal": "\x1b[2J\x1b]0;title\x07\r\x00\x7f\x9b31m",
    "surrogate": "a\ud800b",
    "lines": "one\ntwo\u2028three\u2029four\x85five",
    "direction": "\u202eabc\u2066 שלום עולם مرحبا",
    "emoji": "👩‍👩‍👧 🇩🇪 é",
    "": "",
}


def kept(step: int = 1, response: str = "7+8=15", **changes: Any) -> KeptSample:
    """A sample with a token a character, and some numbers of each."""
    length = len(response)
    values = dict(
        step=step, split="train", kept_as=["best"], prompt_index=3, member=1, prompt="<user>7+8", answer="15",
        response=response, reward=1.0, failure="", advantage=0.5, length=length, finish="stop", discrepancy=0.25,
        prompt_length=2, tokens=list(range(2 + length)), token_lengths=[1] * length,
        logprobs_inference=[-0.5] * length, logprobs_training=[-0.25] * length,
        routes_differ=[[0, 1], [1, 2]][: max(length, 0)], moe_layers=4, versions=[["7", 0, length]],
    )  # fmt: skip
    return KeptSample(**{**values, **changes})


def conversation() -> KeptSample:
    """Two turns with a reply between them, each token a character, and a reply that nobody read."""
    given = [2, 3, 4, 5]
    numbers = [None if i in given else -0.5 for i in range(9)]
    turns = [
        {"start": 0, "end": 2, "ended": True, "messages": [{"role": "tool", "content": "15"}], "reward": 0.25},
        {"start": 6, "end": 9, "ended": True, "messages": [{"role": "user", "content": "well done"}], "reward": None},
    ]
    return kept(response="c;<15>15;", logprobs_inference=numbers, logprobs_training=numbers, turns=turns)
