"""Tables, fronts, label places and both drawings of results."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pyra.tasks import reports
from pyra.tasks.reports import pareto_front, pareto_plot, place_labels, results_table
from pyra.tasks.results import RunResult


def make(method="pyra", value=0.5, speed=100.0, macs=1_000_000_000, **changes):
    fields = {"task": "demo", "metric": "accuracy", "schedule": [0], "rate": 0.0, "trained_parameters": 1930, "seed": 0}
    return RunResult(method=method, value=value, images_per_second=speed, macs=macs, **(fields | changes))


@pytest.fixture
def rows():
    return [
        make("linear probe", 0.452, 812.4, 356_000_000, speedup=1.0),
        make("LoRA", 0.683, 806.0, 356_000_000, speedup=1.0, trained_parameters=59_914),
        make("LoRA + ToMe", 0.581, 2501.0, 103_200_000, speedup=3.08, rate=0.71, trained_parameters=59_914),
        make("LoRA + PYRA", 0.604, 2421.0, 103_200_000, speedup=2.98, rate=0.71, trained_parameters=66_102),
    ]


def crowd(count, seed=0):
    rng = random.Random(seed)
    return [
        make(rng.choice(["LoRA + PYRA", "LoRA + ToMe"]), 0.4 + 0.4 * rng.random(), 100 + 900 * rng.random(), seed=index)
        for index in range(count)
    ]


def test_plain_table_holds_the_numbers_in_aligned_columns(rows):
    lines = results_table(rows).splitlines()
    assert re.split(r"\s{2,}", lines[0].strip()) == [
        "method", "rate", "top-1 (%)", "trained parameters", "MACs (M)", "images/s", "speed-up"
    ]  # fmt: skip
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[2:]]
    assert cells[3] == ["LoRA + PYRA", "0.71", "60.4", "66,102", "103.2", "2,421", "2.98x"]
    assert cells[0] == ["linear probe", "0.00", "45.2", "1,930", "356.0", "812", "1.00x"]
    assert len({line.rstrip().rindex("x") for line in lines[2:]}) == 1


def test_markdown_table_with_baseline_and_missing_numbers(rows):
    rows.append(make("a|b", 0.7, None, 17_580_000_000, seed=4))
    lines = results_table(rows, "markdown", baseline="LoRA").splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    head = cells[0]
    assert head[:5] == ["method", "seed", "rate", "top-1 (%)", "difference"]
    assert re.fullmatch(r"\|:-+\|(-+:\|)+", lines[1])
    tome = dict(zip(head, cells[4], strict=True))
    assert (tome["difference"], tome["speed-up"], tome["MACs (G)"]) == ("-10.2", "3.10x", "0.10")
    last = dict(zip(head, cells[6], strict=True))
    assert (last["method"], last["images/s"], last["speed-up"], last["MACs (G)"]) == ("a\\|b", "-", "-", "17.58")


def test_table_of_several_tasks_and_metrics():
    table = results_table([make(), make(task="sst2", metric="f1", value=0.5)])
    assert "task" in table.splitlines()[0]
    assert "top-1 (%) 50.0" in table
    assert "f1 0.500" in table
    assert results_table([]).splitlines()[0].startswith("method")


def test_table_refusals(rows):
    with pytest.raises(ValueError, match="'plain' or 'markdown'"):
        results_table(rows, "latex")
    with pytest.raises(ValueError, match=r"no row of method 'full'.*LoRA"):
        results_table(rows, baseline="full")


def brute_front(rows, speed):
    def beaten(row):
        return any(
            other.value >= row.value
            and speed(other) >= speed(row)
            and (other.value, speed(other)) != (row.value, speed(row))
            for other in rows
        )

    return [row for row in rows if not beaten(row)]


@pytest.mark.parametrize("measured", [True, False])
def test_front_against_brute_force_with_ties(measured):
    rng = random.Random(1)
    for size in [0, 1, 2, 5, 12] * 40:
        rows = [
            make(value=rng.randrange(4) / 4, speed=float(rng.randrange(4)), macs=rng.randrange(1, 5), seed=index)
            for index in range(size)
        ]
        if not measured and rows:
            rows[0] = make(value=rows[0].value, speed=None, macs=rows[0].macs, seed=0)
        speed = (lambda row: row.images_per_second) if measured else (lambda row: -row.macs)
        if not measured and not rows:
            continue
        front = pareto_front(rows)
        assert {row.seed for row in front} == {row.seed for row in brute_front(rows, speed)}
        assert [speed(row) for row in front] == sorted((speed(row) for row in front), reverse=True)


def test_front_keeps_equals_and_refuses_to_compare_tasks(rows):
    assert [row.method for row in pareto_front(rows)] == ["LoRA + ToMe", "LoRA + PYRA", "LoRA"]
    twins = [make("a"), make("b"), make("c", value=0.4)]
    assert [row.method for row in pareto_front(twins)] == ["a", "b"]
    with pytest.raises(ValueError, match="one task and metric"):
        pareto_front([make(), make(task="other")])


def overlaps(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def check_labels(boxes, points, radii, bounds):
    for index, box in enumerate(boxes):
        assert bounds[0] <= box[0] and bounds[1] <= box[1] and box[2] <= bounds[2] and box[3] <= bounds[3]
        assert not any(overlaps(box, other) for other in boxes[:index])
        discs = [(x - r, y - r, x + r, y + r) for (x, y), r in zip(points, radii, strict=True)]
        assert not any(overlaps(box, disc) for disc in discs)


@pytest.mark.parametrize("same_place", [False, True])
def test_labels_never_overlap(same_place):
    rng = random.Random(3)
    for count in (1, 4, 20):
        points = [(rng.uniform(40, 560), rng.uniform(40, 360)) for _ in range(count)]
        points = [(300.0, 200.0)] * count if same_place else points
        boxes = place_labels(points, [8.0] * count, [(110.0, 18.0)] * count, (0, 0, 600, 400))
        check_labels(boxes, points, [8.0] * count, (0, 0, 600, 400))


def test_a_lone_label_is_next_to_its_point_and_an_impossible_one_is_left_out():
    (box,) = place_labels([(100, 100)], [5], [(50, 10)], (0, 0, 300, 300))
    assert box == (109, 95, 159, 105)
    assert place_labels([(100, 100)], [5], [(500, 10)], (0, 0, 300, 300)) == [None]
    (avoiding,) = place_labels([(100, 100)], [5], [(50, 10)], (0, 0, 300, 300), [(100, 100, 300, 100)])
    assert not overlaps(avoiding, (100, 99, 300, 101))


@pytest.mark.parametrize("width", [320, 400, 1060])
def test_every_label_of_twenty_points_has_a_place_at_every_width(width):
    plot = reports._plot(crowd(20))
    assert len(set(plot.labels)) == 20
    step = reports._step(plot, width)
    assert len(step["annotations"]) == 20
    frame, boxes = plot.layout(width, step["height"] - reports._COLOURBAR_HEIGHT, reports._LABEL_FONT)
    points = [frame.pixel(x, y) for x, y in zip(plot.xs, plot.ys, strict=True)]
    check_labels(boxes, points, [d / 2 for d in plot.diameters], frame.bounds)


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


def test_page_is_self_contained_and_shows_everything(rows, tmp_path):
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
    assert list(zip(line["x"], line["y"], strict=True)) == [
        (806.0, pytest.approx(68.3)), (806.0, pytest.approx(60.4)), (2421.0, pytest.approx(60.4)),
        (2421.0, pytest.approx(58.1)), (2501.0, pytest.approx(58.1)),
    ]  # fmt: skip
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
    assert {int(reports._FRONT[1:], 16), int(reports._colours()[-1][1:], 16)} <= colours
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["a.html", "a.png"]


@pytest.mark.parametrize(
    "rows",
    [
        [make()],
        [make(), make()],
        [make(speed=1.0), make("b", 0.3, 900.0)],
        [make(speed=None), make("b", 0.3, None, 10**8)],
        [make(value=0.0, speed=0.0)],
        [make("{} $x_1$ " * 30)],
    ],
    ids=["one", "twins", "log", "macs", "zeros", "odd name"],
)
def test_edges_are_drawn(rows, tmp_path):
    pareto_plot(rows, tmp_path / "a.png", tmp_path / "a.html")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1920, 1200)


def test_macs_take_the_place_of_unmeasured_speed_and_cheaper_is_right():
    plot = reports._plot([make(speed=None, macs=4 * 10**9), make("b", 0.3, None, 10**9)])
    assert plot.xs == [4.0, 1.0]
    assert "MACs (G)" in plot.x_title
    frame, _ = plot.layout(600, 400, 13)
    assert frame.pixel(1.0, 30)[0] > frame.pixel(4.0, 50)[0]


def test_nothing_to_plot_is_refused_and_leaves_no_file(tmp_path):
    for rows in ([], [make(), make(task="b")]):
        with pytest.raises(ValueError, match=r"no results|one task"):
            pareto_plot(rows, tmp_path / "a.png", tmp_path / "a.html")
    assert not list(tmp_path.iterdir())


def test_import_draws_in_no_plotting_library():
    code = "import sys, pyra.tasks.reports as r; print({'matplotlib', 'plotly', 'tabulate'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_drawing_leaves_pyplot_alone(rows, tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    pareto_plot(rows, tmp_path / "a.png", tmp_path / "a.html")
    assert ("matplotlib.pyplot" in sys.modules) == before
