"""Records, tables, plots: what is written is what was measured."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import memory, records, report, tables
from benchmarks.records import Record

ROOT = Path(__file__).resolve().parents[2]
REQUIRED = {
    "gpu", "torch", "triton", "date", "case", "n_rows", "vocab_size", "dtype", "provider",
    "ms_median", "ms_spread", "gb_per_s", "fraction_of_clone", "peak_bytes",
}  # fmt: skip


@pytest.fixture
def made(about):
    """Records that nobody measured: ours 2 ms, torch 6 ms, compiled 3 ms, Liger failed."""

    def record(provider, ms, copies, case="forward_backward", vocab_size=1000, **changes):
        size = 8 * vocab_size * 4
        return Record(
            **about, case=case, n_rows=8, vocab_size=vocab_size, dtype="float32", provider=provider,
            ms_median=ms, ms_spread=0.1, gb_per_s=2 * size / ms / 1e6, fraction_of_clone=0.9,
            peak_bytes=copies * size, error=1e-7, **changes,
        )  # fmt: skip

    made = []
    for vocab_size in (1000, 2000):
        made += [
            record("fused_ce", 2.0, 1, vocab_size=vocab_size),
            record("torch", 6.0, 3, vocab_size=vocab_size),
            record("torch.compile", 3.0, 1, vocab_size=vocab_size),
            record("clone", 1.5, 1, vocab_size=vocab_size),
        ]
    failed = dataclasses.replace(made[0], provider="liger", ms_median=None, gb_per_s=None,
                                 peak_bytes=None, error=None, note="out of memory")  # fmt: skip
    missing = Record(**about, case="all", n_rows=None, vocab_size=None, dtype=None,
                     provider="quack", note="missing: quack is not installed")  # fmt: skip
    training = dataclasses.replace(made[0], case="train v12", ms_median=50.0, peak_bytes=2**21)
    return [*made, failed, missing, training]


def test_ratios_and_memory(made):
    case = tables.by_case(made)[0]
    assert tables.ratio(case, "torch") == 3.0
    assert tables.ratio(case, "torch.compile") == 1.5
    assert tables.ratio(case, "liger") is None
    assert tables.memory(case, "torch") == 3.0 and tables.memory(case, "fused_ce") == 1.0


def test_table_of_a_machine(made):
    text = report.section(made)
    row = next(line for line in text.splitlines() if "| 1,000 |" in line)
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:8] == [
        "forward backward",
        "float32",
        "8",
        "1,000",
        "2.00",
        "3.00×",
        "1.50×",
        "failed",
    ]
    assert cells[9:11] == ["90%", "1.00×"]
    assert cells[11:13] == ["3.00×", "1.00×"]
    assert "liger (forward_backward, 8 × 1,000 float32): out of memory" in text
    assert "quack: missing: quack is not installed" in text
    assert "| train v12 | float32 | 8 | 1,000 | 50.0000 | 2 |" in text
    assert text.startswith("**a machine**, torch 2, Triton 3, 2020-01-02\n")


def test_pages_are_replaced_between_their_markers(made, tmp_path, monkeypatch):
    records.write(made, tmp_path / "a-machine.json")
    monkeypatch.setattr(tables, "HEADLINE", {made[0].key: "few rows"})
    pages = tmp_path / "README.md", tmp_path / "performance.md"
    for page in pages:
        page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(tmp_path), "--pages", "--readme", str(pages[0])]
    for _ in range(2):  # the second time changes nothing
        assert report.main([*arguments, "--performance", str(pages[1]), "--no-plots"]) == 0
        few, all_of_them = (page.read_text("utf-8") for page in pages)
        for text in (few, all_of_them):
            assert text.startswith("before\n") and text.endswith(f"{report.END}\nafter\n")
            assert "old" not in text and "a machine" in text
        assert few.count("| few rows |") == 1 and few.count("| 2 ms | 3.00 |") == 1
        assert all_of_them.count("| 1,000 | 2.00 |") == 1


def test_what_the_readme_shows_has_been_measured():
    """On some machine; and the pages hold what the results say."""
    machines = report.load(records.RESULTS)
    shown = "\n\n".join(filter(None, map(report.headline, machines.values())))
    assert shown.count("\n|") >= 2 + len(tables.HEADLINE)
    assert shown in report.README.read_text("utf-8")
    for of_machine in machines.values():
        assert report.section(of_machine, brief=True) in report.PERFORMANCE.read_text("utf-8")


@pytest.mark.parametrize("text", ["none", f"{report.END}{report.BEGIN}", 2 * report.BEGIN])
def test_readme_without_its_markers_is_refused(text):
    with pytest.raises(SystemExit, match="needs"):
        report.replace_between_markers(text, "tables")


def test_committed_results_have_the_fields_and_come_from_runs():
    for path in records.RESULTS.glob("*.json"):
        for record in json.loads(path.read_text()):
            assert set(record) >= REQUIRED
            assert path.name == records.file_name(record["gpu"])
            measured = "peak_bytes" if record["case"] == memory.KIND else "ms_median"
            assert record[measured] or record["note"]


def test_a_cut_run_keeps_its_records(made, tmp_path):
    """Killed between two records, without any chance to finish."""
    path = tmp_path / "results.json"
    records.write(made[:3], tmp_path / "made.json")
    code = f"""if True:
        import os, pathlib
        from benchmarks.records import Store, read
        store = Store(pathlib.Path({str(path)!r}))
        for record in read(pathlib.Path({str(tmp_path / "made.json")!r}))[:2]:
            store.add(record)
        os._exit(9)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 9
    assert records.read(path) == made[:2]


def test_merge_replaces_whole_cases(made):
    old, new = made[:8], [dataclasses.replace(made[0], ms_median=1.0)]
    merged = records.merge(old, new)
    assert [r.vocab_size for r in merged] == [2000] * 4 + [1000]
    assert merged[-1].ms_median == 1.0


def test_add_writes_the_machines_file(made, tmp_path):
    records.write(made, tmp_path / "run.json")
    target = report.add(tmp_path / "run.json", tmp_path / "results")
    assert target == tmp_path / "results" / "a-machine.json"
    assert records.read(target) == made
    assert report.add(tmp_path / "run.json", tmp_path / "results") == target
    assert len(records.read(target)) == len(made)


def test_file_names():
    assert records.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert records.file_name("AMD EPYC, 2 threads (CPU)") == "amd-epyc-2-threads-cpu.json"
