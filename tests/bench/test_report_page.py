"""The report: one page that needs nothing from outside, with a table, words and a command to every figure."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from bench import exhibits, page, speed_figures
from bench.__main__ import main
from bench.studies import choosing, findings

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"
HANDED = "python -m bench report"


class Page(HTMLParser):
    """Tags with their attributes, and what stands inside which."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: list[dict[str, int]] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "figure":
            self.inside = True
            self.figures.append({})
        elif self.inside:
            self.figures[-1][tag] = self.figures[-1].get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self.inside = False


def some(folder: Path, *names: str) -> Path:
    """A folder with some of the committed result files, cut to a few cases each."""
    folder.mkdir(exist_ok=True)
    for name in names:
        document = json.loads((RESULTS / name).read_text())
        if "cases" in document:
            document["cases"] = document["cases"][::9]
        (folder / name).write_text(json.dumps(document))
    return folder


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a speed run, a study, a measurement of cost and one of weights."""
    names = ("cpu-quick.json", "cpu-memory-study.json", "cpu-cost.json", "cpu-weights.json")
    return page.render(some(tmp_path_factory.mktemp("results"), *names), HANDED)


def test_the_page_asks_for_nothing_from_outside(rendered):
    parsed = Page(rendered)
    for tag, attributes in parsed.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base", "img", "image"}
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            assert (attributes.get(name) or "#").startswith("#"), f"<{tag} {name}={attributes[name]}>"
    assert "://" not in rendered
    assert "@import" not in rendered
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", rendered))


def test_every_inner_link_has_its_target_and_no_name_is_given_twice(rendered):
    attributes = [each for _, each in Page(rendered).tags]
    names = [each["id"] for each in attributes if "id" in each]
    assert len(names) == len(set(names))
    targets = [each[key] for each in attributes for key in ("href", "xlink:href") if key in each]
    assert {target.removeprefix("#") for target in targets} <= set(names)


def test_every_figure_has_its_table_words_and_command(rendered):
    parsed = Page(rendered)
    assert len(parsed.figures) > 15
    for figure in parsed.figures:
        assert figure.get("table") == 1
        assert figure["tr"] >= 2
        assert figure.get("code") == 1
    drawings = [attributes for tag, attributes in parsed.tags if tag == "svg"]
    assert len(drawings) > 12
    for attributes in drawings:
        assert attributes["role"] == "img"
        assert len(attributes["aria-label"]) > 40


def test_it_is_for_phones_and_for_both_colour_schemes(rendered):
    assert '<meta name="viewport" content="width=device-width' in rendered
    assert "@media (prefers-color-scheme: dark)" in rendered
    assert "currentColor" in rendered
    assert "var(--grid)" in rendered
    assert not re.search(r"#010203|#040506|(fill|stroke): ?(#000000|black)", rendered), "ink that is lost in the dark"


def test_kernels_that_have_not_run_on_hardware_are_said_to(tmp_path):
    results = exhibits.load(some(tmp_path, "cpu-quick.json"))
    rows = {row[0]: row for row in speed_figures.ledger(results).rows}
    for kernels in ("CUDA C++, recurrent", "CUDA C++, attention", "Triton, recurrent", "Triton, attention"):
        assert rows[kernels][1] == speed_figures.NOT_RUN
    assert "of" in rows["native C++ (CPU), recurrent"][2]
    assert rows["native C++ (CPU), recurrent"][1] == results.speed["cpu-quick.json"]["environment"]["cpu"]


@pytest.mark.parametrize("where", ["device", "environment"])
def test_a_file_from_a_gpu_enters_its_kernels_into_the_ledger(where, tmp_path):
    document = json.loads((RESULTS / "cpu-quick.json").read_text())
    document["environment"]["commit"] = "c" * 40
    (document if where == "device" else document["environment"])["device"] = "NVIDIA H200"
    case = next(case for case in document["cases"] if case["group"].startswith("lstm"))
    case["contestants"]["fastseq"]["backend"] = "triton"
    document["cases"] = [case]
    (tmp_path / "nvidia-h200-quick.json").write_text(json.dumps(document))
    rows = {row[0]: row for row in speed_figures.ledger(exhibits.load(tmp_path)).rows}
    ran = rows["Triton, recurrent"]
    assert (ran[1], ran[2], ran[3]) == ("NVIDIA H200", "1 of 1 cases right", "c" * 10)
    assert rows["Triton, attention"][1] == rows["native C++ (CPU), recurrent"][1] == speed_figures.NOT_RUN


def test_runs_of_several_backends_on_a_gpu_are_shown_one_by_one(tmp_path):
    entry = {"status": "timed", "reason": "", "errors": {"o": 1e-3}, "median_us": 10.0}
    case = {"name": "attention-forward-T64", "group": "attention forward", "family": "attention",
            "budget": {"o": 2e-3}, "reason": "", "contestants": {"triton": entry, "native": entry, "cudnn": entry},
            "ratios": {"triton": {"cudnn": 0.8, "best": 0.8}, "native": {"cudnn": 1.1, "best": 1.1}}}  # fmt: skip
    lost = {"name": "attention-forward-T128", "reason": "lost", "contestants": {}, "ratios": {}}
    machine = {"device": "NVIDIA H200", "cpu": "some", "commit": "d" * 40, "driver": "1", "versions": {}}
    timed = {"schema": 1, "complete": False, "environment": machine, "cases": [case, lost], "summary": [], "notes": []}
    suites = {"tests/test_triton_attention.py": {"passed": 7, "skipped": 2}}
    tests = {"schema": 1, "complete": True, "environment": machine, "kernels": {"triton": {"suites": suites}}}
    (tmp_path / "nvidia-h200-attention.json").write_text(json.dumps(timed))
    (tmp_path / "nvidia-h200-tests.json").write_text(json.dumps(tests))
    results = exhibits.load(tmp_path)
    assert [speed_figures.ratios(d, n)[0].rows[0][3] for n, d in results.speed.items()] == ["0.80×", "1.10×"]
    ran = [row[:3] for row in speed_figures.ledger(results).rows if row[1] != speed_figures.NOT_RUN]
    assert ran == [
        ["CUDA C++, attention", "NVIDIA H200", "1 of 1 cases right"],
        ["Triton, attention", "NVIDIA H200", "1 of 1 cases right"],
        ["Triton, attention", "NVIDIA H200", "tests: 7 passed"],
    ]
    assert "NVIDIA H200" in page.render(tmp_path, HANDED)


def test_bars_are_sorted_worst_first():
    document = json.loads((RESULTS / "cpu-quick.json").read_text())
    for exhibit in speed_figures.ratios(document, "cpu-quick.json"):
        best = {case["name"]: case["ratios"]["best"] for case in document["cases"]}
        shown = [best[row[0].removesuffix(" !")] for row in exhibit.rows]
        assert shown == sorted(shown)


def test_every_noisy_case_is_marked_and_no_other():
    document = json.loads((RESULTS / "cpu-quick.json").read_text())
    noisy = {case["name"] for case in document["cases"] if case["noisy"]}
    shown = speed_figures.ratios(document, "cpu-quick.json")
    marked = {row[0].removesuffix(" !") for exhibit in shown for row in exhibit.rows if row[0].endswith(" !")}
    assert marked == noisy != set()
    for exhibit in shown:
        assert ("!: noisy" in exhibit.note) == any(row[0].endswith(" !") for row in exhibit.rows)


def test_a_summary_comes_first_then_the_quietest_file(tmp_path):
    some(tmp_path, "cpu-hf.json", "cpu-quick.json", "cpu-steps.json")
    shown = page.sections(exhibits.load(tmp_path))
    assert shown[0].name == "summary"
    (table, _), *_ = shown[0].exhibits
    files = [row[-1] for row in table.rows]
    shares = []
    for name in files:
        document = json.loads((tmp_path / name).read_text())
        shares.append(sum(bool(case.get("noisy")) for case in document["cases"]) / len(document["cases"]))
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert [section.name for section in shown[1 : 1 + len(files)]] == [f"speed-{speed_figures.slug(f)}" for f in files]


def test_the_navigation_is_in_words(rendered):
    titles = re.findall(r'<li><a href="#[^"]+">(.*?)</a>', rendered)
    assert titles[0] == "Summary"
    for title in titles:
        assert not re.search(r"\.json|cpu-|nvidia-", title), title


def test_no_folder_of_the_machine_is_shown(tmp_path):
    document = json.loads((RESULTS / "cpu-quick.json").read_text())
    document["command"] = "python -m bench --json /home/somebody/new.json --plot='/tmp/z.png' bench/results/a.json"
    assert exhibits.command_of(document) == "python -m bench --json new.json --plot='z.png' bench/results/a.json"
    out = tmp_path / "page.html"
    assert main(["report", "--results", str(some(tmp_path, "cpu-quick.json")), "--out", str(out)]) == 0
    assert str(tmp_path) not in out.read_text(encoding="utf-8")


def test_the_budget_used_is_the_worst_tensors_share():
    entry = {"errors": {"y": 1e-6, "h_n": 3e-6, "odd": None}}
    case = {"budget": {"y": 2e-6, "h_n": 4e-6}, "contestants": {"fastseq": entry}}
    assert speed_figures.budget_used(case, "fastseq") == pytest.approx(0.75)
    assert speed_figures.budget_used(case, "torch") is None


def test_partial_files_are_shown_and_said_to_be_partial(tmp_path):
    """What an interrupted run leaves, at several moments: after its sweep, within a seed, and of one part only."""
    whole = json.loads((RESULTS / "cpu-memory-study.json").read_text())
    sweep = [r for r in whole["results"] if r["unit"]["part"] == "sweep"]
    study = [r for r in whole["results"] if r["unit"]["part"] == "study"]
    for kept in (sweep[:5], sweep + study[:10], sweep + study[:50]):
        (tmp_path / "m.json").write_text(json.dumps(whole | {"complete": False, "results": kept}))
        cost = json.loads((RESULTS / "cpu-cost.json").read_text())
        times = [r for r in cost["results"] if r["unit"]["part"] == "time"]
        (tmp_path / "c.json").write_text(json.dumps(cost | {"complete": False, "results": times[: len(kept) // 10]}))
        (tmp_path / "broken.json").write_text("{")
        text = page.render(tmp_path, HANDED)
        assert "broken.json" in text
        assert "cut short" in text or len(kept) == 5


def test_a_folder_without_results_is_told(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert "holds no result file" in capsys.readouterr().err


def test_the_command_writes_the_page(tmp_path, capsys):
    out = tmp_path / "r.html"
    assert main(["report", "--results", str(some(tmp_path, "cpu-weights.json")), "--out", str(out)]) == 0
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert str(out) in capsys.readouterr().out


# --- docs -----------------------------------------------------------------------------------------------------------


def test_the_page_on_choosing_is_what_the_results_say():
    """Every number on it comes from the files: it is made of them, and its template holds none but the folklore's."""
    results = exhibits.load(RESULTS)
    for name in ("choosing", "parallel"):
        read = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
        assert read == choosing.text(results, name), "run: python -m bench report --docs"
    template = (ROOT / "bench" / "studies" / "choosing.md.j2").read_text(encoding="utf-8")
    literal = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", template, flags=re.S)
    assert set(re.findall(r"\d+(?:[.,]\d+)*", literal)) <= {"50", "200", "1", "0"}


def test_docs_refuse_a_run_that_was_cut_short(tmp_path):
    some(tmp_path, "cpu-cost.json")
    with pytest.raises(ValueError, match="bench memory"):
        choosing.sources(exhibits.load(tmp_path))


def test_figures_of_the_docs_are_there_and_told_in_words():
    text = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[(.*?)\]\((figures/[\w-]+\.svg)\)", text)
    assert [path for _, path in shown] == [f"figures/{name}.svg" for name in choosing.SHOWN]
    for alt, path in shown:
        assert len(alt) > 40
        assert (ROOT / "docs" / path).read_text().startswith("<?xml")


def test_what_was_remembered_is_the_longest_distance_before_the_first_failure():
    def scored(distance: int, score: float, seed: int = 0) -> dict:
        unit = {"part": "study", "task": "recall", "kind": "rnn", "distance": distance, "seed": seed}
        return {"unit": unit, "score": score, "solved_at": None, "rate": 0.1}

    document = {"results": [scored(2, 1), scored(5, 0.95), scored(5, 0.92, 1), scored(10, 0.99), scored(10, 0.2, 1),
                            scored(25, 1)]}  # fmt: skip
    assert findings.remembered(document, "recall", "rnn") == 5
    assert findings.remembered({"results": [scored(2, 0.1)]}, "recall", "rnn") is None


def test_the_loss_stops_falling_where_it_is_near_its_lowest():
    def text(losses: dict[int, float]) -> dict:
        unit = {"part": "study", "task": "text", "kind": "rnn", "distance": 9, "seed": 0}
        return {"results": [{"unit": unit, "loss": {str(n): value for n, value in losses.items()}}]}

    assert findings.stops_falling(text({1: 3.0, 2: 2.0, 5: 1.5, 10: 1.49, 25: 1.485}), "rnn") == 5
    assert findings.best_context(text({1: 3.0, 10: 1.49, 25: 1.6}), "rnn") == 10


# --- the browser ----------------------------------------------------------------------------------------------------


def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium here (Debian and Ubuntu: apt-get install chromium): the page is not opened")


QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--hide-scrollbars")  # fmt: skip


def test_a_browser_opens_it(rendered, tmp_path):
    """As a desktop and as a phone: it draws, and nothing is wider than a phone's screen."""
    program = browser()
    # a script of this test's own, for the page has none: the page's width goes into its title
    measuring = "<script>addEventListener('load', () => {document.title = 'wide ' + document.documentElement.scrollWidth + " \
        "' drawn ' + [...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height > 50).length})</script>"  # fmt: skip  # noqa: E501
    html = tmp_path / "report.html"
    html.write_text(rendered.replace("</head>", measuring + "</head>"), encoding="utf-8")
    for width in (1200, 500):
        shot = tmp_path / f"{width}.png"
        command = [program, *QUIET, f"--user-data-dir={tmp_path / f'profile{width}'}", f"--window-size={width},900"]
        handed = {"capture_output": True, "text": True, "timeout": 120, "check": True}
        dumped = subprocess.run([*command, "--dump-dom", html.as_uri()], **handed).stdout
        found = re.search(r"<title>wide (\d+) drawn (\d+)</title>", dumped)
        assert found, dumped[:400]
        assert int(found[1]) <= width
        assert int(found[2]) == rendered.count("<svg")
        subprocess.run([*command, f"--screenshot={shot}", html.as_uri()], **handed)
        assert struct.unpack(">II", shot.read_bytes()[16:24]) == (width, 900)
        assert len(set(shot.read_bytes())) > 200, "a blank page"
