"""The studies of benchmarks/reproduce: settings that are accepted, equal budgets, and tables that say what ran."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from processes import TESTS

sys.path.insert(0, str(TESTS.parent / "benchmarks" / "reproduce"))

import runner  # noqa: E402
import tables  # noqa: E402
from studies import GROUP, all_studies  # noqa: E402

from megatron_bai import config  # noqa: E402
from megatron_bai.rl.validate_settings import validate_settings  # noqa: E402

STUDIES = all_studies(Path("/study"))


def settings_of(study: str, variant: str, updates: int) -> Any:
    config.register_schema()
    words = STUDIES[study].overrides(variant, 1, updates, Path("/study/run"))
    judge = ["reward.url=http://127.0.0.1:20000"] if STUDIES[study].judged else []
    with initialize_config_dir(version_base="1.3", config_dir=str(config.conf_dir())):
        return OmegaConf.to_object(compose("config", overrides=["model=tiny", *words, *judge]))


@pytest.mark.parametrize(
    ("study", "variant"),
    [
        ("bai", "reasoning"), ("bai", "instruct+reasoning"), ("bai", "bai-0.1"),
        ("minirl", "n1-no-is"), ("minirl", "n8-r2-noclip"), ("discrepancy", "wide-bfloat16-fp8"),
        ("gap", "seq-0.001"), ("gap", "global-0.01-fp8"),
        ("gap_rl", "minirl-n2-rspo-noclip"), ("gap_rl", "dppo-n8-frozen"), ("gap_rl", "dppo-n1-r3"),
    ],
)  # fmt: skip
def test_the_product_accepts_the_settings_and_budgets_are_equal(study: str, variant: str) -> None:
    settings = settings_of(study, variant, STUDIES[study].updates)
    validate_settings(settings)
    trainer = settings.trainer
    assert trainer.steps * trainer.mini_batches == STUDIES[study].updates
    samples = trainer.steps * trainer.prompts_per_step * trainer.group_size
    assert samples == STUDIES[study].updates * STUDIES[study].prompts * GROUP
    assert samples // STUDIES[study].updates % trainer.micro_batch_size == 0


def test_variants_are_what_their_names_say() -> None:
    assert len(STUDIES["minirl"].variants) == 22 and len(STUDIES["bai"].variants) == 9
    no_clip = settings_of("minirl", "n4-r3-noclip", 128)
    assert (no_clip.replay.mode, no_clip.objective.clip, no_clip.trainer.mini_batches) == ("r3", False, 4)
    across = settings_of("gap_rl", "dppo-n8-rspo", 64)
    assert (across.objective.name, across.objective.router_shift, across.replay.mode) == ("dppo", True, "none")
    assert len(STUDIES["gap_rl"].variants) == 51 and list(settings_of("gap_rl", "minirl-n1-frozen", 64).trainer.freeze)
    merged = settings_of("bai", "bai-0.7", 160)
    assert (
        merged.merge.alpha == 0.7 and merged.merge.pretrained.endswith("/pretrained") and merged.merge.method == "bai"
    )
    assert all(
        study.updates % each.updates_per_step == 0 for study in STUDIES.values() for each in study.variants.values()
    )


def write_run(target: Path, records: list[dict[str, Any]], complete: bool = True) -> None:
    target.mkdir(parents=True)
    (target / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (target / "summary.json").write_text(json.dumps({"complete": complete, "steps": records}))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Three seeds of one variant of `discrepancy`, the last of which is in progress."""
    for seed, live in enumerate((1e-3, 2e-3, 6e-3)):
        records = [{"step": s, "kl_k3_live": live, "kl_k3": live / 2, "f_2": 0.0, "f_2_live": 0.25} for s in (1, 2)]
        write_run(runner.run_dir(tmp_path, "discrepancy", "bfloat16", seed), records, complete=seed < 2)
    return tmp_path


def test_a_table_has_means_over_seeds_with_students_interval(stored: Path) -> None:
    rows = {
        row.split(" | ")[0].strip("| "): row.split(" | ")[1:]
        for row in tables.of_study(stored, "discrepancy").splitlines()
    }
    assert rows["float32"][0] == "not run"
    size, kl, f2 = rows["bfloat16"][:3]
    assert size == "3 × 2, 1 unfinished"
    half = 4.30265 * math.sqrt(7e-6) / math.sqrt(3)  # the variance of 1, 2, 6 is 7
    assert kl == f"3.0e-3 ± {half:.1e} → 1.5e-3 ± {half / 2:.1e}".replace("e-0", "e-") and f2 == "0.250 ± 0 → 0 ± 0"
    assert "7.5e-4" in rows["bfloat16"][-1]  # the paper's


def test_a_document_gets_the_tables_between_its_marks(stored: Path, tmp_path: Path) -> None:
    document = tmp_path / "results.md"
    marks = "<!-- discrepancy: written by benchmarks/reproduce -->", "<!-- end of discrepancy -->"
    document.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\nafter")
    for _ in range(2):
        tables.replace(document, {"discrepancy": tables.of_study(stored, "discrepancy")})
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text and text.count("not run") == 7
    with pytest.raises(SystemExit, match="lacks the marks"):
        tables.replace(document, {"bai": ""})


def test_where_runs_collapse_is_read_from_their_alarms() -> None:
    def run(*found: tuple[str, int, dict[str, float]]) -> Any:
        alarms = [
            dict(
                step=step,
                detector=name,
                metric="",
                deviations=6.0,
                evidence="",
                advice="",
                since=0,
                action="warn",
                facts=facts,
            )
            for name, step, facts in found
        ]
        return tables.RunData("", "", [{"step": 1, "alarms": alarms}], {}, {}, {})

    fell, later = {"baseline": 40.0, "level": 24.0}, {"baseline": 40.0, "level": 10.0}
    runs = [
        run(("length_collapse", 9, fell), ("length_collapse", 20, later)),
        run(("length_collapse", 14, later)),
        run(),
    ]
    assert (
        tables.length_collapse(runs) == "by 57% from 0 to 11.5 (2 of 3)" and tables.length_collapse(runs[2:]) == "none"
    )
    drop, full = {"depth": 0.5}, {"depth": 0.4, "trough_step": 12.0, "recovery_step": 30.0}
    runs = [run(("length_collapse", 9, {}), ("length_collapse", 20, {})), run(("length_collapse", 14, {})), run()]
    assert tables.alarms("length_collapse", "entropy_collapse")(runs) == "length collapse at 11.5 (2 of 3)"
    sticks = [run(("reward_hockey_stick", 9, drop), ("reward_hockey_stick", 30, full)), run()]
    assert tables.sticks(sticks) == "depth 0.40, trough at 12, recovered at 30 (1 of 2)"
    assert tables.sticks([run(("reward_hockey_stick", 9, drop))]) == "depth 0.50, not recovered (1 of 1)"
    assert tables.alarms("length_collapse")([run()]) == tables.sticks([run()]) == "none"


def test_what_a_merge_keeps_of_its_sources_routes_stands_in_the_recipes_order() -> None:
    steps = [{"step": 1, "merge_routes_kept/0": 0.25, "merge_routes_kept/1": 0.5}, {"step": 2}]
    run = tables.RunData("", "", steps, {}, {}, {})
    assert tables.routes_kept([run]) == "0.250 / 0.500"
    assert tables.routes_kept([tables.RunData("", "", steps[1:], {}, {}, {})]) == "–"


def test_a_collapse_of_the_reward_is_measured_at_its_best_level() -> None:
    def run(*rewards: float) -> Any:
        return tables.RunData("", "", [{"step": i, "reward_mean": r} for i, r in enumerate(rewards, 1)], {}, {}, {})

    fell, grew = run(0.5, 0.8, 0.8, 0.7, 0.3, 0.4, 0.3, 0.3), run(0.1, 0.3, 0.9, 0.4, 0.9, 0.8, 0.7, 0.6)
    assert tables.collapse([fell, grew]) == "at 6 (1 of 2)"  # 0.35, the mean of 0.3 and 0.4, of 0.8 at its best
    assert tables.collapse([grew]) == "none"  # one bad step is none


def test_what_is_complete_is_not_run_again(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.run_study(stored, STUDIES["discrepancy"], range(2), 2, ["bfloat16"]) == 0
    assert "2 of 2 runs are there" in capsys.readouterr().out
    assert not runner.is_done(runner.run_dir(stored, "discrepancy", "bfloat16", 2), 2)  # in progress
    assert not runner.is_done(runner.run_dir(stored, "discrepancy", "bfloat16", 0), 6)  # shorter than asked for
    for updates, only, says in ((9, [], "--updates 9 is not a multiple of 2"), (8, ["n3"], "no variant 'n3'")):
        with pytest.raises(SystemExit, match=says):
            runner.run_study(stored, STUDIES["minirl"], [0], updates, only)


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    log = tmp_path / "run" / "output.log"
    assert runner.train(["trainer.nonsense=1"], log) == 2
    assert "nonsense" in runner.last_line(log)
