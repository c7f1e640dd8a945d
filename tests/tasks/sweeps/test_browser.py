"""The report in a real browser: drawn, filtered, reached by keys, readable on a phone and in the dark."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from headless_browser import DARK, LIGHT, look, photograph
from PIL import Image

from pyra.tasks.reports.layout import FRONT
from pyra.tasks.sweeps.report import write_report

pytestmark = pytest.mark.browser

COUNT = "document.getElementById('count').textContent"
PLOT = "({...document.getElementById('plot').dataset})"
NAMES = "[...document.querySelectorAll('#body tr')].map(r => r.cells[0].textContent + ' ' + r.cells[2].textContent)"
KEY = "new KeyboardEvent('keydown', {key: '%s', bubbles: true})"


@pytest.fixture
def page(sweep: Path) -> Path:
    return write_report(sweep)


def test_points_are_drawn_without_errors(page: Path) -> None:
    seen = look(page, probe=f"[{COUNT}, {PLOT}, document.querySelectorAll('#plot .point').length]")
    assert seen.errors == []
    count, plot, drawn = seen.probe
    assert count == "5 of 5 points, 3 on the front"
    assert plot == {"cost": "speedup", "points": "5", "front": "3"} and drawn == 5
    assert "images/s (batch 16), faster →" in seen.dom and "top-1 (%) ↑" in seen.dom
    labels = re.findall(r'class="label"[^>]*>([^<]*)', seen.dom)
    assert labels == ["pyra 0.70", "pyra 0.50", "lora"]


@pytest.mark.parametrize(
    ("fragment", "cost", "count"),
    [
        ("cost=macs&method=pyra", "macs", "2 of 5 points, 2 on the front"),
        ("cost=parameters", "parameters", "5 of 5 points, 2 on the front"),
        ("cost=memory", "memory", "5 of 5 points, 1 on the front"),
        ("cost=speedup&rate=0.6:0.8", "speedup", "2 of 5 points, 1 on the front"),
        ("cost=none&method=none&rate=x:&task=7&sort=none&point=99", "speedup", "5 of 5 points, 3 on the front"),
        ("method=lora&rate=0.5:", "speedup", "0 of 5 points, 0 on the front"),
    ],
)
def test_the_address_chooses_axis_and_filters(page: Path, fragment: str, cost: str, count: str) -> None:
    seen = look(page, fragment, probe=f"[{COUNT}, {PLOT}.cost]")
    assert seen.probe == [count, cost] and seen.errors == []


def test_the_controls_do_the_same_and_write_the_address(page: Path) -> None:
    probe = f"""(() => {{
      const set = (id, value) => {{ document.getElementById(id).value = value; }};
      set('cost', 2); set('low', '0.4');
      document.querySelector('#methods input[value="3"]').checked = false;
      document.getElementById('controls').dispatchEvent(new Event('change'));
      const chosen = [{COUNT}, {PLOT}.cost, location.hash];
      document.querySelector('th[data-key=value] button').click();
      document.querySelector('th[data-key=value] button').click();
      return [chosen, {NAMES}, document.querySelector('[aria-sort]').getAttribute('aria-sort')];
    }})()"""
    seen = look(page, probe=probe)
    assert seen.errors == []
    (count, cost, address), rows, sort = seen.probe
    assert (count, cost) == ("2 of 5 points, 2 on the front", "macs")
    assert address == "#cost=macs&method=linear,lora,pyra&rate=0.4:1"
    assert rows == ["pyra 0.70", "pyra 0.50"] and sort == "ascending"


def test_keys_reach_every_point_and_its_commands(page: Path) -> None:
    probe = f"""(() => {{
      const list = document.querySelector('[role=listbox]'), names = [];
      list.focus();
      list.dispatchEvent({KEY % "Home"});
      for (let k = 0; k < 5; k++) {{
        names.push(document.querySelector('#chosen h2').textContent);
        document.querySelector('[role=listbox]').dispatchEvent({KEY % "ArrowRight"});
      }}
      const last = document.querySelector('[aria-selected=true]').getAttribute('aria-label');
      return [names, last, document.querySelector('#chosen').innerText];
    }})()"""
    seen = look(page, probe=probe)
    names, last, text = seen.probe
    assert seen.errors == [] and sorted(names) == ["linear", "lora", "pyra 0.50", "pyra 0.70", "tome 0.70"]
    assert last.startswith(f"{names[-1]}: top-1 (%) ") and "speed-up" in last
    assert "pyra evaluate /" in text and "--format onnx" in text and "load_run(" in text
    assert "tabindex" in seen.dom


def test_several_tasks_and_points_without_a_speed(write: Callable[..., Path], tmp_path: Path) -> None:
    write("a", "lora", 300)
    write("b", "pyra", 290, 0.5, speed=None)
    write("c", "lora", 200, task="other", speed=None)
    page = write_report(tmp_path / "sweep")
    told = "[...document.querySelectorAll('#cost option')].map(o => o.disabled)"
    assert look(page, probe=f"[{COUNT}, {PLOT}.cost, {told}]").probe == [
        "1 of 2 points, 1 on the front; 1 without this measurement", "speedup", [False] * 5,
    ]  # fmt: skip
    seen = look(page, "task=1&cost=speed", probe=f"[{COUNT}, {PLOT}.cost, {told}, {NAMES}.length]")
    assert seen.probe == ["1 of 1 points, 1 on the front", "macs", [True, True, False, False, False], 1]
    assert seen.errors == []


def test_a_rate_below_zero_is_shown(write: Callable[..., Path], tmp_path: Path) -> None:
    write("a", "lora", 300)
    write("b", "prompts", 290, -0.125)
    seen = look(write_report(tmp_path / "sweep"), probe=f"[{COUNT}, document.getElementById('low').value]")
    assert seen.probe == ["2 of 2 points, 1 on the front", "-0.13"] and seen.errors == []


def test_a_row_of_the_table_is_a_button(page: Path) -> None:
    probe = "(document.querySelectorAll('#body button')[1].click(), document.querySelector('#chosen pre').textContent)"
    seen = look(page, "sort=-speed", probe=probe)
    assert re.fullmatch(r"pyra evaluate \S+/runs/(pyra|tome)-7-0", seen.probe) and seen.errors == []


@pytest.mark.parametrize("fragment", ["", "point=1", "cost=parameters&method=pyra,lora"])
def test_nothing_leaves_a_phone(page: Path, fragment: str) -> None:
    seen = look(page, fragment, width=360, probe="[document.documentElement.scrollWidth, innerWidth]")
    content, window = seen.probe
    assert window == 360 and content <= 360


def test_dark_and_light(page: Path, tmp_path: Path) -> None:
    probe = "[document.body, document.querySelector('td')].map(e => getComputedStyle(e).backgroundColor)"
    inks = "getComputedStyle(document.body).color"
    assert look(page, settings=LIGHT, probe=f"[...{probe}, {inks}]").probe == ["rgb(255, 255, 255)"] * 2 + [
        "rgb(26, 26, 26)"
    ]
    assert look(page, settings=DARK, probe=f"[...{probe}, {inks}]").probe == ["rgb(22, 22, 22)"] * 2 + [
        "rgb(236, 236, 236)"
    ]
    photograph(page, tmp_path / "dark.png", settings=DARK)
    with Image.open(tmp_path / "dark.png") as image:
        assert np.asarray(image.convert("L")).mean() < 60


def test_without_scripts_the_picture_and_the_table_are_there(page: Path, tmp_path: Path) -> None:
    # Headless Chromium takes no picture where scripts are switched off: they are cut out instead.
    text = re.sub(r"<script.*?</script>|</?noscript>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "plain.html").write_text(text, encoding="utf-8")
    photograph(tmp_path / "plain.html", tmp_path / "plain.png", height=1600)
    with Image.open(tmp_path / "plain.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    front = np.abs(pixels - [int(FRONT[k : k + 2], 16) for k in (1, 3, 5)]).sum(-1) < 40
    assert front.sum() > 500  # the line of the picture
    assert (pixels[1150:] < 100).any()  # text below it


def test_labels_lie_apart_from_each_other_and_inside(page: Path) -> None:
    probe = (
        "[...document.querySelectorAll('#plot text')].map(t => { const b = t.getBoundingClientRect(); "
        "return [b.left, b.top, b.right, b.bottom, t.textContent]; })"
    )
    for width in (360, 1280):
        boxes = look(page, width=width, probe=probe).probe
        assert len(boxes) > 8
        for k, (left, top, right, bottom, text) in enumerate(boxes):
            assert left >= 0 and right <= width, text
            for other in boxes[k + 1 :]:
                apart = left >= other[2] - 1 or right <= other[0] + 1 or top >= other[3] - 3 or bottom <= other[1] + 3
                assert apart, (text, other[4])


def test_many_points_stay_usable(write: Callable[..., Path], tmp_path: Path) -> None:
    source = write("0", "lora", 300, answers=False)
    text = (source / "result.json").read_text(encoding="utf-8")
    for number in range(1, 700):
        rate = number / 1000
        folder = source.with_name(str(number))
        shutil.copytree(source, folder)
        changed = text.replace('"rate": 0.0', f'"rate": {rate}').replace('"value": 0.75', f'"value": {0.7 - rate**4}')
        changed = changed.replace('"images_per_second": 100.0', f'"images_per_second": {100 + number % 97}')
        (folder / "result.json").write_text(changed, encoding="utf-8")
    page = write_report(tmp_path / "sweep")
    probe = f"""(() => {{
      const rows = document.querySelectorAll('#body tr').length, start = performance.now();
      location.hash = '#cost=macs';
      dispatchEvent(new HashChangeEvent('hashchange'));
      return [{COUNT}, rows, performance.now() - start, document.getElementById('more').textContent];
    }})()"""
    count, rows, milliseconds, more = look(page, probe=probe).probe
    assert count.startswith("700 of 700 points") and rows == 200 and more == "Show all 700 rows"
    assert milliseconds < 3000
