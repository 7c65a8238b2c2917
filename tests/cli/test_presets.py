"""Every preset composes and is valid, its batches divide, and a GPU has what it needs, by `plan`'s arithmetic."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
from safetensors.torch import save_file
from whole_models import hf_tensors

from megatron_bai import config
from megatron_bai.checkpoint import manifest
from megatron_bai.cli import compose, plan
from megatron_bai.config import Config
from megatron_bai.data.tokenizer import build_tokenizer
from megatron_bai.errors import UserError
from megatron_bai.memory_plan import run_plan
from megatron_bai.model.architecture import read_architecture

DOCS = Path(__file__).parents[2] / "docs" / "presets.md"
CLUSTERS, UPDATES, REPLAY = ("gpus_8", "gpus_16", "gpus_32"), ("n1", "n2", "n4", "n8"), ("none", "r2", "r3")
MINIRL = "experiment=qwen3_30b_minirl"
BAI = "experiment=qwen3_30b_bai_ppo"


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    config.register_schema()


def composed(*words: str) -> Config:
    return compose.compose(list(words))


def total(settings: Config) -> float:
    return sum(run_plan.gpu_bytes(settings, run_plan.validate_plan(settings)).values()) / run_plan.GB


def test_every_experiment_composes() -> None:
    names = [path.stem for path in (config.conf_dir() / "experiment").glob("*.yaml")]
    assert {"demo", "qwen3_30b_minirl", "qwen3_30b_bai_ppo"} <= set(names)
    for name in names:
        assert composed(f"experiment={name}").run.name


@pytest.mark.parametrize(("cluster", "updates"), list(product(CLUSTERS, UPDATES)))
def test_minirl_in_the_papers_settings(cluster: str, updates: str) -> None:
    """arXiv 2512.01374: mini-batches of 64 prompts × 16 responses, N = 1, 2, 4, 8; none, R2 and R3."""
    settings = composed(MINIRL, f"cluster={cluster}", f"updates={updates}")
    for settings.replay.mode in REPLAY:
        trainer, objective, processes = settings.trainer, settings.objective, run_plan.validate_plan(settings)
        assert trainer.mini_batches == int(updates[1:]) and processes == int(cluster[5:])
        assert trainer.prompts_per_step == 64 * trainer.mini_batches and trainer.group_size == 16
        assert isinstance(objective, config.Minirl)
        assert (objective.clip_low, objective.clip_high, objective.is_max) == (0.2, 0.27, 5.0)
        assert (objective.advantage, trainer.eval_samples) == ("centred", 32)
        assert total(settings) <= settings.cluster.memory_gb == 80


def test_bai_in_the_papers_settings() -> None:
    """arXiv 2509.00309: a merge, then PPO with 8 updates a step on 512 of 4096 responses, rates 1e-6, 1600 steps."""
    settings = composed(BAI)
    trainer, objective = settings.trainer, settings.objective
    assert isinstance(objective, config.Ppo) and isinstance(settings.init, config.MergeInit)
    assert (settings.merge.weights, trainer.steps, trainer.mini_batches) == ([0.5, 0.5], 1600, 8)
    assert trainer.prompts_per_step * trainer.group_size == 4096
    assert (trainer.learning_rate, objective.critic_learning_rate) == (1e-6, None)
    assert total(settings) <= 80
    for cluster in ("gpus_8", "gpus_16"):  # where two models do not fit, plan says so
        assert total(composed(BAI, f"cluster={cluster}")) > 80
        with pytest.raises(UserError, match="GB are needed of a GPU, and cluster.memory_gb is 80: .*parallel"):
            plan.run(composed(BAI, f"cluster={cluster}"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["updates=n1", "trainer.prompts_per_step=66"], r"prompts_per_step \(66\) is not a multiple of .* \(1 × 4\)"),
        (["cluster.processes=12"], r"processes \(12\) is not a multiple of parallel.expert"),
        (["parallel.tensor=8"], r"model.num_query_groups \(4\) is not a multiple of parallel.tensor \(8\)"),
        (["rollout.max_new_tokens=16000"], r"a sample may have 18048 tokens, more than .* \(16384\)"),
        (["rollout.tensor=16"], r"rollout.tensor \(16\) is more than the GPUs of a machine \(8\)"),
        (["rollout.servers=3"], "rollout.servers is 3: 2 machines have room for 2 of 8 GPUs each"),
        (["rollout.servers=2", "rollout.host=10.0.0.1"], "rollout.host=10.0.0.1 is an address of one machine"),
        (["rollout.base_gpu_id=4", "rollout.tensor=4", "cluster.gpus_per_machine=6"], "gpus_per_machine .* is less"),
        (
            ["rollout.mem_fraction_static=0.2"],
            r"0.2: of 80 GB .* less than the 17.3 GB of a server's weights",
        ),
        (["rollout.sync=group"], "NCCL takes no two ranks on one GPU"),
        (["objective=sft", "trainer.tokens_per_micro_batch=0"], "plan is for reinforcement learning"),
        (["parallel.recompute=none"], r"GB are needed of a GPU"),
    ],
)
def test_plan_refuses_by_name(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        plan.run(composed(MINIRL, *words))


@pytest.mark.parametrize(
    ("words", "servers", "on_the_fullest"),
    [
        (["rollout.servers=2"], "2 × 8 GPUs: machine 0: 0-7 (beside the trainer); machine 1: 0-7 (beside the", "both"),
        (
            ["rollout.servers=3", "rollout.servers_per_machine=2", "rollout.tensor=4"],
            "3 × 4 GPUs: machine 0: 0-3, 4-7 (beside the trainer); machine 1: 0-3 (beside the trainer)",
            "both",
        ),
        (
            [
                "rollout.servers=2",
                "rollout.base_gpu_id=8",
                "cluster.gpus_per_machine=16",
                "rollout.sync=group",
                "rollout.sync_host=10.0.0.1",
            ],
            "2 × 8 GPUs: machine 0: 8-15; machine 1: 8-15",
            "trainer",
        ),
    ],
)
def test_plan_shows_where_servers_are(words: list[str], servers: str, on_the_fullest: str) -> None:
    """On GPUs of their own they take nothing of the training's."""
    settings = composed(MINIRL, *words)
    processes = run_plan.validate_plan(settings)
    assert run_plan.describe_batches(settings, processes)["servers"].startswith(servers)
    held = run_plan.gpu_bytes(settings, processes)
    assert "actor: weights" in held and ("server: weights" in held) == (on_the_fullest == "both")


OTHER = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "vocab_size": 96, "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
    "rope_theta": 1e4, "norm_topk_prob": True, "tie_word_embeddings": False, "initializer_range": 0.02,
    "hidden_act": "silu", "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip


def make_checkpoint(directory: Path) -> str:
    """What `plan` reads of one: the architecture is another than `model=tiny`."""
    stage = manifest.make_staging_dir(directory)
    (stage / "config.json").write_text(json.dumps(OTHER), encoding="utf-8")
    save_file(hf_tensors(read_architecture(stage)), stage / "model.safetensors")
    build_tokenizer(config.Arithmetic(), 96).save_pretrained(stage)
    manifest.finalize(stage, directory, {})
    return str(directory)


def test_plan_is_for_the_model_of_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = make_checkpoint(tmp_path / "one"), make_checkpoint(tmp_path / "merged")
    model = config.Model(2, 32, 4, 2, 8, 4, 2, 16, 96, 256)
    count = f"{run_plan.rank_memory.count_params(model).total:,} parameters"
    merge = ["init=merge", f"merge.pretrained={source}", f"merge.members=[{source}]", "merge.weights=[1]"]
    for words in (
        ["init=checkpoint", f"init.checkpoint={source}"],
        [*merge, f"merge.output={output}"],
        [*merge, f"merge.output={tmp_path}/none"],
    ):
        plan.run(composed(*words))
        printed = " ".join(capsys.readouterr().out.split())
        assert count in printed and "model of" in printed


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["init=checkpoint", "init.checkpoint=/nowhere"], "init.checkpoint=/nowhere does not exist"),
        (
            ["init=merge", "merge.pretrained=/a", "merge.members=[/b]", "merge.weights=[1]"],
            "merge.pretrained=/a does not",
        ),
        (
            ["data=dataset", "init=checkpoint", "init.checkpoint={one}", "data.train=/no.jsonl"],
            "data.train=/no.jsonl does",
        ),
        (["reward=function", "reward.function=no_such:f"], "there is no module no_such"),
        (
            ["reward=several", "reward.parts.short.reward=function", "reward.parts.short.function=no_such:f"],
            "reward.parts.short.function=no_such:f: there is no module no_such",
        ),
        (["objective=ppo", "objective.critic_checkpoint=/c"], "objective.critic_checkpoint=/c does not exist"),
        (["init=checkpoint", "init.checkpoint={empty}"], "empty holds neither .*: it is empty"),
    ],
)
def test_plan_refuses_what_does_not_exist(words: list[str], says: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    words = [word.format(one=tmp_path / "one", empty=tmp_path / "empty") for word in words]
    make_checkpoint(tmp_path / "one")
    with pytest.raises(UserError, match=says):
        plan.run(composed(*words))


ROWS = ["data=dataset", "data.train=DIR/rows.jsonl", "data.chat_template=false", "rollout.max_new_tokens=16"]


@pytest.mark.parametrize("init", ["checkpoint", "merge"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            [*ROWS, "data.hold_out=0.5", "trainer.eval_every=1"],
            r"data.eval_prompts is 64, and .* holds out only \d+",
        ),
        ([*ROWS, "data.prompt=question"], "there is no 'question', only 'prompt', 'answer'"),
        ([*ROWS, "data.chat_template=true"], "the tokenizer has no chat template"),
        ([*ROWS, "data.max_prompt_tokens=1"], "leaves 0 rows to train on and 0 held out"),
        ([*ROWS, "rollout.urls=[http://127.0.0.1:1]", "rollout.api_key_file=DIR/key"], "key is open to other users"),
        ([*ROWS, "run.dir=DIR/run"], "summary.json is not what a run wrote"),
        (["data=arithmetic", "data.eval_prompts=1000000"], "data.eval_prompts is 1000000, and the task has"),
        (["init=random", "data=arithmetic", "model.vocab_size=8"], "model.vocab_size is 8"),
    ],
)
def test_plan_refuses_what_train_refuses_before_it_starts(
    words: list[str], says: str, init: str, tmp_path: Path
) -> None:
    source = make_checkpoint(tmp_path / "one")
    rows = (json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(60))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    (tmp_path / "key").write_text("k")
    (tmp_path / "key").chmod(0o644)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("[1]")
    start = ["init=checkpoint", f"init.checkpoint={source}"]
    if init == "merge":
        start = ["init=merge", f"merge.pretrained={source}", f"merge.members=[{source}]", "merge.weights=[1]"]
        start.append(f"merge.output={tmp_path}/none")
    if "init=random" in words:
        start = []
    with pytest.raises(UserError, match=says):
        plan.run(composed(*start, *(word.replace("DIR", str(tmp_path)) for word in words)))


def test_plan_says_which_rows_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "one")
    rows = [{"prompt": f"{i}+1=" + "1" * 99 * (i == 3), "answer": str(i + 1)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word.replace("DIR", str(tmp_path)) for word in ROWS]
    plan.run(
        composed(
            "init=checkpoint", f"init.checkpoint={source}", *words, "data.eval_prompts=0", "data.max_prompt_tokens=50"
        )
    )
    assert re.search(r"rows +.*left out", capsys.readouterr().out)


def test_plan_prints_what_the_docs_show(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"```\n(model  .*?)```", DOCS.read_text(), re.S).group(1)
    monkeypatch.setenv("COLUMNS", "160")
    plan.run(composed(MINIRL))
    printed = capsys.readouterr().out
    lines, expected = ([line.split() for line in text.splitlines() if line.strip()] for text in (printed, shown))
    assert lines == expected


def test_the_docs_totals_are_plans() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \|.*\| ([\d.]+) \|$", DOCS.read_text(), re.M)
    assert len(rows) == 4
    for experiment, cluster, said in rows:
        assert float(said) == pytest.approx(total(composed(f"experiment={experiment}", f"cluster={cluster}")), abs=0.05)


def test_training_on_another_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from megatron_bai.rl import session

    session._validate_processes(config.Cluster(), 3)
    session._validate_processes(config.Cluster(processes=3), 3)
    with pytest.raises(UserError, match="cluster.processes is 16, and 8 were started"):
        session._validate_processes(config.Cluster(processes=16), 8)
