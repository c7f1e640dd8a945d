"""Both drawings: the picture and the page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pyra.tasks.reports import pareto_plot
from pyra.tasks.reports.layout import COLOURS, FRONT, MANY, Plot


class Page(HTMLParser):
    """Collects tags with their attributes, the text of table cells and the scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.cells, self.scripts, self.inside = [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.cells.append(data)
        if self.inside == "script":
            self.scripts.append(data)


def test_page_is_self_contained_and_shows_everything(rows, make, tmp_path):
    rows[0] = make("</script><b>&", 0.452, 812.4, 356_000_000)
    pareto_plot(rows, tmp_path / "a.png", tmp_path / "a.html", title="A <b> & C")
    text = (tmp_path / "a.html").read_text(encoding="utf-8")
    page = Page(text)
    from plotly.offline import get_plotlyjs

    library, own = page.scripts
    assert library == get_plotlyjs()
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+", text.replace(library, ""))
    for tag, attrs in page.tags:
        assert not {"src", "href"} & set(attrs)
        assert tag not in ("link", "iframe", "img", "b")
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert "connect-src" not in policy
    assert any(a.get("name") == "viewport" for _, a in page.tags)
    assert "prefers-color-scheme: dark" in text
    assert {"LoRA + PYRA", "60.4", "66,102", "2.98x", "</script><b>&", "2,421"} <= {c.strip() for c in page.cells}
    data = json.loads(re.search(r"= (\{.*\});", own).group(1))
    line, points = data["traces"]
    assert points["y"] == pytest.approx([45.2, 68.3, 58.1, 60.4])
    assert points["x"] == [812.4, 806.0, 2501.0, 2421.0]
    assert line["x"] == [2501.0, 2421.0, 2421.0, 806.0, 806.0]
    assert line["y"] == pytest.approx([58.1, 58.1, 60.4, 60.4, 68.3])
    assert "60.4" in points["text"][3]
    assert "2.98x" in points["text"][3]
    texts = [{a["text"] for a in step["annotations"]} for step in data["steps"]]
    assert all({"LoRA", "LoRA + PYRA", "LoRA + ToMe", "&lt;/script&gt;&lt;b&gt;&amp;"} == names for names in texts)


def test_png_has_the_size_the_points_and_the_front(rows, tmp_path):
    pareto_plot(rows, tmp_path / "new" / "a.png", tmp_path / "a.html")
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (1920, 1200)
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = set((pixels.astype(int) @ [65536, 256, 1]).tolist())
    assert {int(FRONT[1:], 16), int(COLOURS[-1][1:], 16)} <= colours
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.html", "a.png"]


@pytest.mark.parametrize(
    "changes",
    [
        [{}],
        [{}, {}],
        [{"speed": 1.0}, {"method": "b", "value": 0.3, "speed": 900.0}],
        [{"speed": None}, {"method": "b", "value": 0.3, "speed": None, "macs": 10**8}],
        [{"value": 0.0, "speed": 0.0, "macs": 0}],
        [{"method": "{} $x_1$ " * 30}],
    ],
    ids=["one", "twins", "far apart", "macs", "zeros", "odd name"],
)
def test_edges_are_drawn(changes, make, tmp_path):
    pareto_plot([make(**each) for each in changes], tmp_path / "a.png", tmp_path / "a.html")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1920, 1200)


def test_macs_take_the_place_of_unmeasured_speed_and_cheaper_is_right(make):
    plot = Plot([make(speed=None, macs=4 * 10**9), make("b", 0.3, None, 10**9)])
    assert plot.xs == [4.0, 1.0]
    assert "MACs (G)" in plot.x_title
    (dear, _), (cheap, _) = plot.pixels((0, 0, 600, 400), plot.xs, plot.ys)
    assert cheap > dear


def test_nothing_to_plot_is_refused_and_leaves_no_file(make, tmp_path):
    for rows in ([], [make(), make(task="b")]):
        with pytest.raises(ValueError, match=r"no results|one task"):
            pareto_plot(rows, tmp_path / "a.png", tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_import_draws_in_no_plotting_library():
    code = "import sys, pyra.tasks.reports as r; print({'matplotlib', 'plotly'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_drawing_leaves_pyplot_alone(rows, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    pareto_plot(rows, tmp_path / "a.png", tmp_path / "a.html")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_of_many_rows_some_of_the_front_are_named_and_the_rest_is_small(make, tmp_path):
    few = Plot([make(f"m{k}", 0.5 - k / 100, 100 + k) for k in range(MANY)], spreads=[0.01] * MANY)
    many = Plot([make(f"m{k}", 0.5 - k / 1000, 100 + k) for k in range(500)], spreads=[0.01] * 500)
    assert len(few.labelled) == MANY and few.spreads == pytest.approx([1.0] * MANY)
    assert len(many.labelled) == 10 and many.labelled[0] == 499 and many.labelled[-1] == 0
    assert many.spreads == [None] * 500 and many.diameters[0] < few.diameters[0] / 2
    assert few.y_range[1] > 51 and len(many.labels((62, 70, 852, 544), 14)) == 10
