"""The studies of benchmarks/reproduce: settings that are accepted, equal budgets, and tables that say what ran."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from processes import TESTS

sys.path.insert(0, str(TESTS.parent / "benchmarks" / "reproduce"))

import document  # noqa: E402
import runner  # noqa: E402
import stored_runs  # noqa: E402
import tables  # noqa: E402
from studies import CHECKPOINTS, GROUP, all_studies  # noqa: E402

from megatron_bai import config  # noqa: E402
from megatron_bai.monitor.metrics.table.sections import METRICS  # noqa: E402
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
    rows = document.make_table(stored, stored / "store", "discrepancy").rows
    assert rows["float32"][0] == "not run"
    size, kl, f2 = rows["bfloat16"][:3]
    assert size == "3 × 2, 1 unfinished"
    half = 4.30265 * math.sqrt(7e-6) / math.sqrt(3)  # the variance of 1, 2, 6 is 7
    assert kl == f"3.0e-3 ± {half:.1e} → 1.5e-3 ± {half / 2:.1e}".replace("e-0", "e-") and f2 == "0.250 ± 0 → 0 ± 0"
    assert "7.5e-4" in rows["bfloat16"][-1]  # the paper's


MARKS = "<!-- discrepancy: written by benchmarks/reproduce -->", "<!-- end of discrepancy -->"


def test_a_document_gets_the_tables_between_its_marks(stored: Path, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter")
    table = document.make_table(stored, stored / "store", "discrepancy")
    for _ in range(2):
        document.replace(page, {"discrepancy": table})
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter") and "old" not in text and text.count("\n| ") == 3
    assert "\nNot run: float32, bfloat16-int8, bfloat16-fp8, wide-float32, " in text and "not run" not in text
    with pytest.raises(SystemExit, match="lacks the marks"):
        document.replace(page, {"bai": table})


def test_rows_of_runs_that_are_not_there_stay_and_are_named(stored: Path, tmp_path: Path) -> None:
    page, nowhere = tmp_path / "results.md", tmp_path / "nowhere"
    page.write_text(f"{MARKS[0]}\n{document.make_table(stored, nowhere, 'discrepancy').text()}\n{MARKS[1]}")
    row = next(line for line in page.read_text().splitlines() if line.startswith("| bfloat16 |"))
    none = document.make_table(None, nowhere, "discrepancy")
    for _ in range(2):
        document.replace(page, {"discrepancy": none})
        assert row in page.read_text().splitlines()
        assert "bfloat16: of runs that were not stored." in page.read_text().splitlines()
    kl, *others = none.header[2:-1]
    wider = {name: [size, "", *rest] for name, (size, *rest) in none.rows.items()}
    document.replace(
        page, {"discrepancy": document.Table(["", none.header[1], "new", kl, *others, "paper"], wider, "")}
    )
    assert row.replace("3 × 2, 1 unfinished |", "3 × 2, 1 unfinished |  |") in page.read_text().splitlines()


def test_every_table_is_the_same_from_stored_runs(tmp_path: Path) -> None:
    """Of metrics drawn for all rows of the table of metrics, gaps and alarms among them."""
    random, store = Random(0), tmp_path / "store"
    assert set(stored_runs.METRICS) <= METRICS.keys()
    rows = [metric for name, metric in METRICS.items() if name not in ("step", "alarms")]
    names = [f"{m.family}/{i}" if m.family else m.name for m in rows for i in ((0, 10) if m.family else (0,))]
    for study in STUDIES:
        for variant in list(STUDIES[study].variants)[:2]:
            for seed in range(2):
                records = [draw_record(random, step, names) for step in range(1, 9)]
                target = runner.run_dir(tmp_path / "D", study, variant, seed)
                write_run(target, records)
                stored_runs.write_origin(target, study, variant, seed, 8, 60.0, 30.0)
                assert stored_runs.write_run(target, store, study, variant, seed)
        from_store = document.make_table(None, store, study)
        assert document.make_table(tmp_path / "D", tmp_path / "nothing", study) == from_store
        assert all("–" not in cell for row in list(from_store.rows.values())[:2] for cell in row[1:-1])  # of every cell


def draw_record(random: Random, step: int, names: list[str]) -> dict[str, Any]:
    record: dict[str, Any] = {name: random.random() / 3 for name in names} | {"step": step, "alarms": []}
    for name in random.sample(names, 3):
        record[name] = None
    record |= {name: 100 * random.random() for name in names if name.startswith("responses_by_length/")}
    if step % 2:  # not evaluated in every step
        record = {name: value for name, value in record.items() if not name.startswith("eval_")}
    facts = {"level": random.random(), "baseline": 1.0, "depth": random.random()}
    for detector in ("length_collapse", "reward_hockey_stick", "entropy_collapse") if step > 6 else ():
        record["alarms"].append(
            dict(step=step, detector=detector, metric="m", deviations=random.random(), evidence="", advice="",
                 since=step - 1, action="warn", facts=facts)
        )  # fmt: skip
    return record


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
    store = stored / "store"
    assert runner.run_study(stored, STUDIES["discrepancy"], range(2), 2, ["bfloat16"], store) == 0
    assert "2 of 2 runs are there" in capsys.readouterr().out
    assert not store.exists()  # an older runner's: where they come from is not known
    assert not runner.is_done(runner.run_dir(stored, "discrepancy", "bfloat16", 2), 2)  # in progress
    assert not runner.is_done(runner.run_dir(stored, "discrepancy", "bfloat16", 0), 6)  # shorter than asked for
    for updates, only, says in ((9, [], "--updates 9 is not a multiple of 2"), (8, ["n3"], "no variant 'n3'")):
        with pytest.raises(SystemExit, match=says):
            runner.run_study(stored, STUDIES["minirl"], [0], updates, only, store)


def test_a_stored_run_stands_for_its_directory_while_its_settings_are_todays(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, elsewhere, study = tmp_path / "store", tmp_path / "elsewhere", STUDIES["discrepancy"]
    run = ("discrepancy", "bfloat16", 0)
    stored_runs.write_origin(runner.run_dir(stored, *run), *run, 2, 60.0, 30.0)
    assert runner.run_study(stored, study, [0], 2, ["bfloat16"], store) == 0  # what is there is stored
    assert not stored_runs.write_run(runner.run_dir(stored, "discrepancy", "bfloat16", 2), store, *run[:2], 2)
    assert runner.run_study(elsewhere, study, [0], 2, ["bfloat16"], store) == 0
    assert "1 of 1 runs are there" in capsys.readouterr().out
    assert not runner._is_there(elsewhere, study, *run[1:], 6, store)  # shorter than asked for
    assert not runner._is_there(elsewhere, study, "bfloat16", 1, 2, store)
    file = stored_runs.store_file(store, *run)
    for old, new, says in (
        ("learning_rate=0", "learning_rate=1", "has trainer.learning_rate=1, which studies.py does not declare today"),
        ("=demo_pretrained", "=nothing", "was made from pretrained, which has experiment=nothing"),
    ):
        whole = file.read_text()
        assert whole.count(old) == 1
        file.write_text(whole.replace(old, new))
        assert not runner._is_there(elsewhere, study, *run[1:], 2, store)
        assert f"{file} is left out: it {says}" in capsys.readouterr().err
        assert document.make_table(None, store, "discrepancy").rows["bfloat16"][0] == "not run"
        file.write_text(whole)
    assert document.make_table(None, store, "discrepancy").rows["bfloat16"][0] == "1 × 2"
    target = runner.run_dir(stored, *run)
    origin = target / "origin.json"
    origin.write_text(origin.read_text().replace("learning_rate=0", "learning_rate=1"))
    with pytest.raises(SystemExit, match="seed-0 has a run with other settings: remove it"):
        runner.run_study(stored, study, [0], 2, ["bfloat16"], store)
    file.write_text("{}")
    with pytest.raises(SystemExit, match="is no stored run"):
        document.make_table(None, store, "discrepancy")


def test_only_checkpoints_that_runs_start_from_are_made() -> None:
    assert list(STUDIES["gap"].needed_checkpoints(["global-0.01-fp8"])) == ["gap-global-0.01"]
    assert list(STUDIES["bai"].needed_checkpoints(["bai-0.5"])) == ["pretrained", "instruct", "reasoning"]
    alone = replace(STUDIES["bai"], served="")  # which has the shape of `pretrained`
    assert list(alone.needed_checkpoints(["reasoning"])) == ["pretrained", "reasoning"]  # which was trained from it
    for study in STUDIES.values():
        assert study.needed_checkpoints(study.variants) == study.checkpoints
        assert study.checkpoints.items() <= CHECKPOINTS.items()


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    log = tmp_path / "run" / "output.log"
    assert runner.train(["trainer.nonsense=1"], log) == 2
    assert "nonsense" in runner.last_line(log)
