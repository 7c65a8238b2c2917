"""The other verbs, on the checkpoints and runs of the shortened demo."""

import signal
from pathlib import Path

import pytest
from command import SERVER, Result, succeeded
from pipeline import Demo

from megatron_bai.rollout.servers import control

pytestmark = [pytest.mark.live, pytest.mark.distributed]


def test_to_hugging_face_and_back_changes_no_bit(demo: Demo) -> None:
    there, back = demo.logs / "actor-hf", demo.logs / "actor-back"
    cases = {
        "there": ["convert", f"convert.source={demo.actor}", f"convert.target={there}", "convert.to=hf"],
        "back": ["convert", f"convert.source={there}", f"convert.target={back}", "convert.to=megatron"],
        "inspect": ["inspect", f"inspect.path={demo.actor}", f"inspect.other={back}"],
    }
    said = demo.verbs("convert", cases)["inspect"].out
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {path.name for path in there.iterdir()}
    assert "0 of 12 tensors differ" in said and "merged" in said


def test_a_report_shows_two_runs(demo: Demo, trained: Result, tmp_path: Path) -> None:
    other = tmp_path / "other run"
    other.mkdir()
    for name in ("metrics.jsonl", "config.yaml", "summary.json"):
        (other / name).write_bytes((demo.directory / name).read_bytes())
    output = tmp_path / "both.html"
    runs = f"report.runs=['{demo.directory}','{other}']"
    result = succeeded(demo.verb("report", "report", runs, f"report.output={output}"))
    page = output.read_text()
    assert f"wrote {output}" in result.out and "other run · with replay" in page and "run · with replay" in page


@pytest.mark.long
def test_serve_answers_until_ctrl_c(demo: Demo) -> None:
    command = demo.verb("serve", "serve", f"serve.checkpoint={demo.actor}", "rollout.deterministic=false")
    url = command.until(lambda: "Ctrl-C stops it" in command.said()).said().split(" at ")[1].split()[0]
    body = {"model": "actor", "prompt": "<user>1+2+3<assistant>", "max_tokens": 8, "temperature": 0}
    answer = control.post(url, "/v1/completions", body)
    assert answer["choices"][0]["text"] and answer["usage"]["completion_tokens"] <= 8
    assert len(command.processes(SERVER)) >= 1
    result = command.send(signal.SIGINT).wait()
    assert (result.code, result.err, result.orphans) == (130, "megatron-bai: interrupted\n", [])
