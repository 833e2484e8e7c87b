"""``zarrcache report``: one file, opened in a browser; numbers of the runs and of ``plan``."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.data import DataLoader

from tests.support.training import write_config, write_pairs, zarrcache
from zarrcache import ZarrDataset
from zarrcache.config import DataConfig
from zarrcache.data import open_reader
from zarrcache.train import LoaderMonitor

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs, and a cache with room for half of them in which three epochs are recorded."""
    found = tmp_path_factory.mktemp("report")
    write_pairs(found, 12, shape=(16, 16, 16))
    data = ZarrDataset(open_reader(DataConfig.from_yaml(config_of(found))), "train")
    with LoaderMonitor(DataLoader(data, batch_size=None)) as batches:
        for _ in range(3):
            list(batches)
    return found


def config_of(directory: Path, **cache: Any) -> Path:
    path = write_config(directory, **{"limit": "200 KiB", "lookahead": 0, **cache})
    document = yaml.safe_load(path.read_text()) | {"train_fraction": 0.99}
    path.write_text(yaml.safe_dump(document))
    return path


def report(config: Path, page: Path, *options: object) -> str:
    """The text of a report that was written."""
    done = zarrcache("report", config, "-o", page, *options)
    assert (done.code, done.err.splitlines()[-1]) == (0, f"wrote {page}"), done
    return page.read_text(encoding="utf-8")


def rows(text: str, section: str) -> list[list[str]]:
    """Cells of the first table after a heading."""
    table = text[text.index(section) :].partition("</table>")[0]
    return [
        [unescape(cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)]
        for row in re.findall(r"<tr.*?</tr>", table)
    ]


def test_the_page_has_the_numbers_of_the_run_and_of_plan(home: Path, tmp_path: Path) -> None:
    config = config_of(home)
    text = report(config, tmp_path / "r.html", "--epochs", 9)
    [run] = (home / "cache" / "zarrcache-v1" / "runs").iterdir()
    head, *epochs = rows(text, "Recorded epochs")
    for row, line in zip(epochs, map(json.loads, run.read_text().splitlines()), strict=True):
        shown, stats = dict(zip(head, row, strict=True)), line["stats"]
        assert shown["steps"] == str(line["steps"])
        assert shown["waited, s"] == f"{line['waited_s']:,.2f}"
        assert (shown["hits"], shown["requests"]) == (str(stats["hits"]), str(stats["requests"]))
        reads = stats["hits"] + stats["misses"]
        assert shown["hit rate"] == f"{100 * stats['hits'] / reads:.1f} %"
    head, *sizes = rows(text, "another size or policy")
    [now] = [row for row in sizes if row[0].endswith(" (now)")]
    shown = dict(zip(head, now, strict=True))
    plan = zarrcache("plan", config, "--epochs", 9, "--json").document
    for other in plan["others"]:
        if other["eviction"] != "least-recently-used":
            assert shown[other["eviction"]] == f"{100 * other['hit_ratio']:.1f} %"
    assert shown["requests"] == f"{plan['total']['requests']:,}"
    head, *nodes = rows(text, "other numbers of nodes")
    assert [row[0] for row in nodes] == ["1 (now)", "2", "2", "4", "4", "8", "8"]
    plan = zarrcache(
        "plan", config, "--epochs", 9, "--nodes", 4, "--assignment", "node", "--json"
    ).document
    assert nodes[4][1:4:2] == ["node", f"{plan['total']['requests']:,}"]


def test_without_recorded_epochs_it_says_how_to_record_them(home: Path, tmp_path: Path) -> None:
    text = report(config_of(home, dir=str(tmp_path / "none")), tmp_path / "r.html")
    assert "LoaderMonitor" in text
    assert "CacheMonitor" in text
    assert "other numbers of nodes" in text
    assert not (tmp_path / "none").exists()


def test_damaged_files_of_runs_are_named_and_the_others_are_shown(
    home: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "cache" / "zarrcache-v1" / "runs"
    shutil.copytree(home / "cache" / "zarrcache-v1" / "runs", runs)
    [run] = runs.iterdir()
    good = run.read_text().splitlines()
    first = json.loads(good[0])
    bad = [
        good[0][:40],
        "[]",
        "\x00" * 9,
        json.dumps(first | {"waited_s": -1}),
        good[0].replace('"steps": ', '"steps": 0.').replace("0.0", "NaN"),
        json.dumps(first | {"stats": {"hits": True}}),
        json.dumps(first | {"ended_s": 1e300}),
        json.dumps(first | {"parts": {}}),
        "[" * 100_000,
    ]
    run.write_text("\n".join([*bad, *good]))
    (runs / "2.jsonl").write_bytes(b"\xff\xfe")
    (runs / "3.jsonl").symlink_to(run)
    os.mkfifo(runs / "4.jsonl")
    (runs / "5.jsonl").mkdir()
    (runs / "6.jsonl").write_text("")
    page = tmp_path / "r.html"
    done = zarrcache("report", config_of(home, dir=str(tmp_path / "cache")), "-o", page)
    assert done.code == 0, done
    text = page.read_text()
    assert f"{run}: lines 1, 2, 3, 4, 5, ... are damaged and left out." in text
    for name in ("2.jsonl", "3.jsonl", "4.jsonl", "5.jsonl"):
        assert f"{runs / name}" in text
        assert f"warning: {runs / name}" in done.err
    assert "/6.jsonl" not in text
    assert len(rows(text, "Recorded epochs")) == 1 + len(good)


def test_a_cache_of_another_version_is_named(home: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / "zarrcache-v9" / "runs").mkdir(parents=True)
    text = report(config_of(home, dir=str(tmp_path / "cache")), tmp_path / "r.html")
    assert "zarrcache-v9, made by another version of zarrcache" in text


def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    home: Path, tmp_path: Path
) -> None:
    config = config_of(home)
    before = config.read_text()
    for page, why in (
        ("/nowhere/r.html", "No such file or directory"),
        (tmp_path / ("a" * 300), "File name too long"),
        (tmp_path, "Is a directory"),
        (config, "exists and is not an HTML page"),
        (config / "r.html", "Not a directory"),
    ):
        done = zarrcache("report", config, "-o", page)
        assert done.code == 2
        assert why in done.err
        assert str(page) in done.err
    assert config.read_text() == before


def test_an_origin_that_is_gone_costs_the_forecast_only(home: Path, tmp_path: Path) -> None:
    config = config_of(home)
    document = yaml.safe_load(config.read_text())
    places = {"data_dir": "s3://gone/data", "label_dir": "s3://gone/label"}
    s3_kwargs = {"endpoint_url": "http://127.0.0.1:9", "key": "a", "secret": "the-secret"}
    document |= {**places, "s3_kwargs": s3_kwargs}
    document["cache"]["retry"] = {"attempts": 1}
    path = tmp_path / "gone.yaml"
    path.write_text(yaml.safe_dump(document))
    done = zarrcache("report", path, "-o", tmp_path / "r.html")
    assert done.code == 1, done
    text = (tmp_path / "r.html").read_text()
    assert "There is no forecast: " in text
    assert len(rows(text, "Recorded epochs")) == 4
    assert "the-secret" not in text + done.err


#: What the page is like at a width: how far it is too wide, drawings, texts that leave their
#: drawing or cover another, the colour of the paper.
_MEASURE = """
const found = [];
for (const frame of document.querySelectorAll('iframe')) {
  const page = frame.contentDocument, wrong = [], texts = [];
  for (const svg of page.querySelectorAll('figure svg[role=img]')) {
    const around = svg.getBoundingClientRect();
    const boxes = [...svg.querySelectorAll('text')].map(t => [t, t.getBoundingClientRect()]);
    for (const [text, box] of boxes) {
      texts.push(box.height);
      if (box.left < around.left - 1 || box.right > around.right + 1
          || box.bottom > around.bottom + 1)
        wrong.push('outside: ' + text.textContent);
      for (const [other, at] of boxes)
        if (other !== text && box.left < at.right && at.left < box.right
            && box.top + 2 < at.bottom && at.top + 2 < box.bottom)
          wrong.push(text.textContent + ' covers ' + other.textContent);
    }
  }
  const root = page.documentElement;
  found.push({wide: root.scrollWidth - frame.clientWidth, wrong, smallest: Math.min(...texts),
    drawn: texts.length, paper: getComputedStyle(page.body).backgroundColor,
    shapes: [...page.querySelectorAll('circle, rect')].filter(s => s.getBoundingClientRect().width)
      .length, title: page.title});
}
document.body.textContent = JSON.stringify(found);
"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
@pytest.mark.parametrize(
    ("scheme", "paper", "epochs"), [(1, "rgb(255, 255, 255)", 3), (0, "rgb(13, 17, 23)", 300)]
)
def test_a_browser_shows_it_on_small_and_large_screens_in_light_and_dark(
    home: Path, tmp_path: Path, scheme: int, paper: str, epochs: int
) -> None:
    """Without network access and without a script in it."""
    [run] = (home / "cache" / "zarrcache-v1" / "runs").iterdir()
    copied = tmp_path / "cache" / "zarrcache-v1" / "runs" / run.name
    copied.parent.mkdir(parents=True)
    copied.write_text(run.read_text() * (epochs // 3))
    text = report(config_of(home, dir=str(tmp_path / "cache")), tmp_path / "r.html")
    assert not re.search(r"<script|@import|url\(|(?:src|href)=|https?:", text)
    frames = "".join(
        f'<iframe width="{width}" height="900" srcdoc="{escape(text)}"></iframe>'
        for width in (360, 1200)
    )
    (tmp_path / "frames.html").write_text(
        f"<!doctype html><body>{frames}<script>onload = () => {{{_MEASURE}}}</script>"
    )
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={scheme}",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    shown = json.loads(unescape(re.search(r"<body>(.*)</body>", done.stdout, re.S)[1]))  # type: ignore[index]
    assert len(shown) == 2
    for screen in shown:
        assert screen["wide"] <= 0
        assert screen["wrong"] == []
        assert screen["drawn"] > 100
        assert screen["shapes"] > 60
        assert screen["smallest"] >= 9  # pixels
        assert screen["paper"] == paper
        assert screen["title"] == "Training report: GGA"
