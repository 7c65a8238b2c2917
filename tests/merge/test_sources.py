"""What sources must agree on besides their tensors, whose tokenizer the output has, and what is kept of the base."""

import argparse
import json
import signal
from pathlib import Path

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

from megatron_bai.checkpoint.hf_files import SINGLE
from megatron_bai.cli import entry_point
from megatron_bai.errors import UserError
from megatron_bai.merge.recipe.output_spec import OutputSpec
from megatron_bai.merge.recipe.plan import Plan
from megatron_bai.merge.recipe.sources_agree import choose_tokenizer, compare_sources
from megatron_bai.merge.recipe.token_texts import read_token_texts

CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_experts": 2, "num_experts_per_tok": 1,
    "moe_intermediate_size": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "eos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip


def write(path: Path, seed: int, config: dict | None = None, drop=(), megatron=False, extra=()) -> Path:
    """Write a checkpoint of either format with a `config.json`; `extra` are more tensors' names."""
    tensors = {"model.embed_tokens.weight": torch.randn(9, 8, generator=torch.Generator().manual_seed(seed))}
    tensors |= {key: torch.full((4,), float(seed)) for key in extra}
    if megatron:
        checkpoints.write(path, tensors)
    else:
        path.mkdir()
        save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    content = {key: value for key, value in (CONFIG | (config or {})).items() if key not in drop}
    (path / "config.json").write_text(json.dumps(content))
    return path


def tokenizer(path: Path, texts: dict[int, str], template: str | None = None) -> Path:
    content = {"model": {"type": "WordLevel", "vocab": {text: index for index, text in texts.items()}}}
    (path / "tokenizer.json").write_text(json.dumps(content))
    if template:
        (path / "chat_template.jinja").write_text(template)
    return path


def merge(monkeypatch, capsys, base: Path, members: list[Path], output: Path, *more: str) -> tuple[int, str]:
    """Run the command; return its exit code and all that it printed."""
    weights = [1 / len(members)] * len(members)
    listed = ",".join(map(str, members))
    words = [f"merge.pretrained={base}", f"merge.members=[{listed}]", f"merge.weights={weights}".replace(" ", "")]
    monkeypatch.setattr("sys.argv", ["megatron-bai", "merge", *words, f"merge.output={output}", *more])
    code = 0
    try:
        entry_point.main()
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize(
    "key, value",
    [
        ("rope_theta", 1e7),
        ("num_experts_per_tok", 2),
        ("rms_norm_eps", 1e-5),
        ("norm_topk_prob", True),
        ("hidden_act", "gelu"),
        ("rope_scaling", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("head_dim", 2),
        ("num_key_value_heads", 2),
        ("mlp_only_layers", [0]),
    ],
)
def test_what_changes_the_forward_pass_is_refused(tmp_path, megatron, key, value):
    base = write(tmp_path / "base", 0, megatron=megatron)
    member = write(tmp_path / "member", 1, {key: value}, megatron=megatron)
    with pytest.raises(UserError, match=rf"{base}.* in {member}.*allow_different=") as refused:
        compare_sources(base, [member], [], None)
    assert key in str(refused.value) or key == "rope_scaling" and "rope_parameters" in str(refused.value)


def test_a_key_left_out_means_its_default(tmp_path):
    base = write(tmp_path / "base", 0, {"rope_theta": 10000.0, "norm_topk_prob": False})
    member = write(tmp_path / "member", 1, drop=["rope_theta"])
    assert compare_sources(base, [member], [], None).differences == ()
    other = write(tmp_path / "other", 2)
    with pytest.raises(UserError, match=rf"rope_theta is 10000.0 in {member} and 1000000.0 in {other}"):
        compare_sources(member, [other], [], None)


def test_megatrons_arguments_are_compared_with_config_json(tmp_path):
    base = write(tmp_path / "base", 0, megatron=True)
    member = checkpoints.write(tmp_path / "member", {"model.embed_tokens.weight": torch.zeros(9, 8)})
    arguments = {"rotary_base": 10000, "norm_epsilon": 1e-6, "moe_router_topk": 1, "num_query_groups": 1}
    torch.save({"args": argparse.Namespace(**arguments)}, member / "common.pt")
    with pytest.raises(UserError, match="rope_theta is 1000000.0 in .* and 10000 in "):
        compare_sources(base, [member], [], None)
    assert not compare_sources(base, [member], ["rope_theta"], None).differences[1:]


ARGUMENTS = {  # as Megatron-LM's parser gives them for CONFIG, the defaults of what is not used included
    "rotary_base": 1000000, "rotary_percent": 1.0, "norm_epsilon": 1e-6, "hidden_size": 8, "num_layers": 1,
    "num_attention_heads": 2, "num_query_groups": 1, "group_query_attention": True, "kv_channels": 4,
    "ffn_hidden_size": 32, "num_experts": 2, "moe_router_topk": 1, "moe_ffn_hidden_size": 8,
    "moe_router_score_function": "softmax", "moe_router_pre_softmax": True, "q_lora_rank": None, "kv_lora_rank": 32,
    "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "multi_latent_attention": False,
    "position_embedding_type": "rope", "rotary_interleaved": False, "exit_signal": signal.SIGTERM,
}  # fmt: skip


def write_arguments(path: Path, **changes) -> Path:
    checkpoints.write(path, {"model.embed_tokens.weight": torch.zeros(9, 8)})
    torch.save({"args": argparse.Namespace(**ARGUMENTS | changes)}, path / "common.pt")
    return path


def test_megatrons_own_arguments_suit_config_json(tmp_path):
    base = write(tmp_path / "base", 0, megatron=True)
    member = write_arguments(tmp_path / "member")
    assert not [each for each in compare_sources(base, [member], [], None).differences if each.key != "tokenizer"]
    alike = write_arguments(tmp_path / "alike", group_query_attention=False, num_query_groups=1, num_experts=None)
    with pytest.raises(UserError, match=r"num_key_value_heads is 1 in .* and 2 in"):
        compare_sources(base, [alike], [], None)


@pytest.mark.parametrize(
    "changes, key",
    [
        ({"moe_router_pre_softmax": False}, "norm_topk_prob is false in .* and true"),
        ({"position_embedding_type": "none"}, "position_embedding_type"),
        ({"rotary_interleaved": True}, "rotary_interleaved"),
        ({"rotary_base": 10000}, "rope_theta"),
        ({"moe_router_topk": 2}, "num_experts_per_tok"),
        ({"multi_latent_attention": True}, "multi_latent_attention"),
    ],
)
def test_megatrons_arguments_are_compared_with_each_other(tmp_path, changes, key):
    base, member = write_arguments(tmp_path / "base"), write_arguments(tmp_path / "member", **changes)
    with pytest.raises(UserError, match=key):
        compare_sources(base, [member], [], None)


SECTIONS = {
    "known": {"model_type": "qwen3_vl_moe", "text_config": {**CONFIG, "model_type": "qwen3_vl_moe_text"}},
    "unknown": {"model_type": "own_vl", "text_config": {"model_type": "own", "rope_theta": 1e6}},
    "other name": {"model_type": "own_vl", "llm_config": {"model_type": "own", "rope_theta": 1e6}},
    "deeper": {"model_type": "own_omni", "thinker_config": {"text_config": {"rope_theta": 1e6}}},
}


@pytest.mark.parametrize("content", SECTIONS.values(), ids=SECTIONS)
def test_sections_of_config_json_are_compared(tmp_path, content):
    paths = []
    for name, theta in (("base", "1000000.0"), ("equal", "1000000.0"), ("member", "10000.0")):
        paths.append(write(tmp_path / name, 0))
        (paths[-1] / "config.json").write_text(json.dumps(content).replace("1000000.0", theta))
    base, equal, member = paths
    assert not compare_sources(base, [equal], [], None).differences
    with pytest.raises(UserError, match=rf"rope_theta is 1000000.0 in {base} and 10000.0 in {member}"):
        compare_sources(base, [member], [], None)
    said = compare_sources(base, [member], ["rope_theta"], None).differences
    assert said and all("10000.0" in str(each) for each in said)


@pytest.mark.parametrize("megatron", [False, True])
def test_what_is_allowed_is_said_everywhere(tmp_path, monkeypatch, capsys, megatron):
    base = write(tmp_path / "base", 0, megatron=megatron)
    member = write(tmp_path / "member", 1, {"rope_theta": 1e7, "eos_token_id": [1, 2], "own": 3}, megatron=megatron)
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out")
    assert code == 2 and not (tmp_path / "out").exists() and "Traceback" not in text
    allow = "merge.allow_different=[rope_theta]"
    for more in ((allow, "merge.dry_run=true"), (allow,)):
        code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out", *more)
        assert code == 0 and "1000000.0" in text and "10000000.0" in text and str(base) in text and "own: null" in text
    noted = {each["key"]: each for each in checkpoints.provenance(tmp_path / "out")["differences"]}
    assert noted["rope_theta"]["values"] == {str(base): "1000000.0", str(member): "10000000.0"}
    assert noted["rope_theta"]["outcome"].endswith(str(base)) and noted["eos_token_id"] and noted["own"]
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 1e6


def test_unknown_names_of_keys_get_the_nearest(tmp_path):
    base, member = write(tmp_path / "base", 0), write(tmp_path / "member", 1)
    with pytest.raises(UserError, match="merge.allow_different names 'rope_thta'.*did you mean rope_theta"):
        compare_sources(base, [member], ["rope_thta"], None)


def test_ids_of_other_tokens_are_refused(tmp_path, monkeypatch, capsys):
    base = tokenizer(write(tmp_path / "base", 0), {0: "a", 1: "<end>", 2: "<think>"})
    member = tokenizer(write(tmp_path / "member", 1), {0: "a", 1: "<think>", 2: "<end>"})
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out")
    assert code == 2 and f"token 1 is '<end>' in {base} and '<think>' in {member}" in text
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out", "merge.allow_different=[tokenizer]")
    assert code == 0 and "the first of 2 ids" in text


def test_members_are_compared_where_the_base_has_no_token(tmp_path):
    base = tokenizer(write(tmp_path / "base", 0), {0: "a"})
    members = [tokenizer(write(tmp_path / text, 1), {0: "a", 5: text}) for text in ("x", "y")]
    with pytest.raises(UserError, match="token 5 is 'x' in .* and 'y' in "):
        compare_sources(base, members, [], None)
    assert any("first of 1 ids" in str(each) for each in compare_sources(base, members[:1], [], None).differences)


def test_every_form_of_a_tokenizer_is_read(tmp_path):
    wanted = {0: "a", 1: "b", 2: "<new>"}
    added = {"content": "<new>"}
    forms: list[dict[str, str | bytes]] = [
        {"tokenizer.json": json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [added | {"id": 2}]})},
        {"tokenizer.json": json.dumps({"model": {"vocab": [["a", 0.0], ["b", -1.0], ["<new>", -2.0]]}})},
        {"vocab.json": '{"a": 0, "b": 1}', "added_tokens.json": '{"<new>": 2}'},
        {"vocab.json": '{"a": 0, "b": 1}', "tokenizer_config.json": json.dumps({"added_tokens_decoder": {"2": added}})},
        {"vocab.txt": "a\nb\n<new>\n"},
        {"tokenizer.model": b"\x0a\x08\x0a\x01a\x15\x00\x00\x00\x00\x0a\x03\x0a\x01b\x0a\x07\x0a\x05<new>"},
    ]  # fmt: skip
    forms += [{f"tokenizer/{name}": content for name, content in files.items()} for files in forms]
    for index, files in enumerate(forms):
        (tmp_path / str(index)).mkdir()
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / str(index) / name).parent.mkdir(exist_ok=True)
            (tmp_path / str(index) / name).write_bytes(data)
        assert read_token_texts(tmp_path / str(index)) == wanted, files
    assert read_token_texts(tmp_path) == {}
    (tmp_path / "vocab.json").write_text("[")
    with pytest.raises(UserError, match=r"vocab.json is damaged"):
        read_token_texts(tmp_path)


@pytest.mark.parametrize("megatron", [False, True])
@pytest.mark.parametrize(
    "base_has, setting, expected",
    [
        (True, "", "base"), (False, "", "member"), (True, "1", "member"), (True, "pretrained", "base"),
        (True, "member", "member"),
    ],
)  # fmt: skip
def test_whose_tokenizer_the_output_has(tmp_path, monkeypatch, capsys, megatron, base_has, setting, expected):
    base = write(tmp_path / "base", 0, megatron=megatron)
    member = write(tmp_path / "member", 1, {"eos_token_id": [2, 3]}, megatron=megatron)
    for path in (base, member) if base_has else (member,):
        tokenizer(path, {0: "a", 1: "b"} if path == base else {0: "a", 1: "b", 2: "c"})
        (path / "generation_config.json").write_text(json.dumps({"temperature": path.name}))
    (member / "chat_template.jinja").write_text("{{ messages }}")
    more = [f"merge.tokenizer={setting}"] if setting else []
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out", *more)
    assert code == 0, text
    out, source = tmp_path / "out", tmp_path / expected
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (out / name).exists() == (source / name).exists()
        assert not (out / name).exists() or (out / name).read_bytes() == (source / name).read_bytes()
    eos = json.loads((out / "config.json").read_text())["eos_token_id"]
    assert eos == json.loads((source / "config.json").read_text())["eos_token_id"]
    assert checkpoints.provenance(out)["tokenizer"] == str(source)
    assert ("chat template" in text) == (expected == "base"), "that the output has none is said"
    code, text = merge(monkeypatch, capsys, base, [member], out, *more)
    assert "nothing to do" in text


def test_end_tokens_that_the_tokenizers_source_lacks_are_not_the_bases(tmp_path, monkeypatch, capsys):
    base, member = write(tmp_path / "base", 0), write(tmp_path / "member", 1, drop=["eos_token_id"])
    for path in (base, member):
        tokenizer(path, {0: "a"})
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out", "merge.tokenizer=1")
    assert code == 0, text
    assert f"null ({member}); taken: that of {member}" in text
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] is None


def test_a_tokenizer_in_a_directory_of_its_own_is_taken_whole(tmp_path, monkeypatch, capsys):
    base, member = write(tmp_path / "base", 0), write(tmp_path / "member", 1)
    for path in (base, member):
        (path / "tokenizer").mkdir()
        tokenizer(path / "tokenizer", {0: path.name}, template=path.name)
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out")
    assert code == 2 and "token 0 is 'base'" in text
    more = "merge.tokenizer=1", "merge.allow_different=[tokenizer]"
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out", *more)
    assert code == 0, text
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out/tokenizer" / name).read_text() == (member / "tokenizer" / name).read_text()


def test_a_members_number_stands_over_directories_of_that_name():
    assert choose_tokenizer("1", "/base", ["/x/2", "/x/1"]) == Path("/x/2")
    assert choose_tokenizer("pretrained", "/base", ["/x/pretrained"]) == Path("/base")
    assert choose_tokenizer("final", "/base", ["/x/final", "/x/1"]) == Path("/x/final")
    with pytest.raises(UserError, match=r"'final', the last part of /x/final and of /y/final: give the whole path"):
        choose_tokenizer("final", "/base", ["/x/final", "/y/final"])
    assert choose_tokenizer("/y/final", "/base", ["/x/final", "/y/final"]) == Path("/y/final")


def test_an_unknown_tokenizer_is_refused():
    with pytest.raises(UserError, match=r"merge.tokenizer is '3': choose pretrained, 1, 2 "):
        choose_tokenizer("3", "/base", ["/a", "/b"])
    with pytest.raises(UserError, match=r"merge.tokenizer is 'pretrained': choose 1, 2 "):
        choose_tokenizer("pretrained", "", ["/a", "/b"])


@pytest.mark.parametrize("megatron", [False, True])
def test_tensors_of_the_base_alone_are_kept_by_name(tmp_path, monkeypatch, capsys, megatron):
    base = write(tmp_path / "base", 3, extra=["mtp.layers.0.weight", "mtp.norm"], megatron=megatron)
    members = [write(tmp_path / "a", 1, megatron=megatron), write(tmp_path / "b", 2, megatron=megatron)]
    code, text = merge(monkeypatch, capsys, base, members, tmp_path / "out")
    assert code == 2 and "merge.keep=[mtp]" in text
    code, text = merge(monkeypatch, capsys, base, members, tmp_path / "out", "merge.keep=[mtp]", "merge.dry_run=true")
    assert code == 0 and "mtp.norm: kept as in" in text
    code, text = merge(monkeypatch, capsys, base, members, tmp_path / "out", "merge.keep=[mtp]", "merge.verify=all")
    assert code == 0 and "2 tensors kept" in text, text
    merged, before = checkpoints.read(tmp_path / "out"), checkpoints.read(base)
    assert merged.keys() == before.keys() and torch.equal(merged["mtp.norm"], before["mtp.norm"])
    assert not torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    noted = checkpoints.provenance(tmp_path / "out")
    assert noted["tensors"]["mtp.norm"]["fate"] == "kept"
    code, text = merge(monkeypatch, capsys, base, members, tmp_path / "out", "merge.keep=[mtq]")
    assert code == 2 and "merge.keep fits no tensor" in text


@pytest.mark.parametrize("megatron", [False, True])
def test_tensors_of_a_member_alone_are_left_out_by_name(tmp_path, monkeypatch, capsys, megatron):
    base = write(tmp_path / "base", 0, megatron=megatron)
    member = write(tmp_path / "member", 1, extra=["v_head.weight"], megatron=megatron)
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out")
    assert code == 2 and "merge.keep=[v_head]" in text
    code, text = merge(monkeypatch, capsys, base, [member], tmp_path / "out", "merge.keep=[v_head]", "merge.verify=all")
    assert code == 0, text
    assert checkpoints.read(tmp_path / "out").keys() == checkpoints.read(base).keys()
    dropped = checkpoints.provenance(tmp_path / "out")["sources"][1]["dropped"]
    assert ["v_head.weight"] in dropped.values()


def test_what_is_kept_is_decided_once_for_all_tensors():
    """Asked for by each tensor of each source: to look at all regions each time would be quadratic."""

    class Regions(dict):
        looks = 0

        def items(self):
            Regions.looks += 1
            return super().items()

    names = [str(index) for index in range(50)]
    plan = Plan(None, (), (), dict.fromkeys(names), Regions(dict.fromkeys(names, ())), (), {}, OutputSpec(), ())
    assert plan.keys_read(object()) == [] and Regions.looks == 1  # a tensor without regions counts as kept
